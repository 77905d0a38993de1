"""Folders of images: their listing, decoding them once into an array of bytes, and their split."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from rich.console import Console

from kddp_ext.files import atomic_write, hash_json, parse_json, remove_leftovers, write_json
from kddp_ext.workflow.config import RunConfig
from kddp_ext.workflow.datasets import LARGEST_SIZE, DatasetInfo, RawDataset
from kddp_ext.workflow.errors import DataFileError, OptionError, WorkflowError
from kddp_ext.workflow.folder import locked
from kddp_ext.workflow.image_files import find_images

TEST_SHARE = 0.2  # of each class, if the folder has no split of its own
MOST_BROKEN = 0.05  # share of the images
_VERSION = 1  # of the decoded files
_CHUNK = 512  # images that are decoded before they are written
_NAMED = 5  # broken images that a message names
_VALIDATION = ("val", "valid", "validation")


class _Listed(NamedTuple):
    """The images of a folder, split by split and class by class. `splits` is 0 (train), 1 (validation) or 2 (test)."""

    files: list[Path]
    labels: NDArray[np.int64]
    splits: NDArray[np.int64]
    class_names: tuple[str, ...]


def read_image_folder(config: RunConfig, cache: Path, console: Console) -> tuple[RawDataset, DatasetInfo]:
    """The images in `config.data_dir` and what is known of them, resized to `config.size`.

    The decoded images are kept in the folder `cache`, in a file named after a hash of the listing (names, sizes and
    modification times) and of the options; the arrays map it into memory. The first process that needs it decodes.
    Broken images are left out and named on `console`.

    Raises:
        WorkflowError: the folder has no classes, a class has no images, or more than 5% of the images are broken.
        OSError: the cache cannot be written.
    """
    if not config.data_dir:
        raise OptionError("data-dir", "the folder of the images for --dataset folder", "none")
    if config.size > LARGEST_SIZE:
        raise OptionError("size", f"at most {LARGEST_SIZE} pixels", config.size)
    root = Path(config.data_dir)
    listed = _list_splits(root)
    images, channels, broken = _decoded(root, listed.files, config, cache, console)
    if broken:
        console.print(
            f"warning: left out {_count(len(broken))} that cannot be read: {_named(broken)}",
            style="yellow", highlight=False, soft_wrap=True, markup=False,
        )  # fmt: skip
    train, validation, test = _split(listed, np.isin(range(len(listed.files)), [*broken.values()]), config.data_seed)
    mean, std = _moments(images, train)
    name = root.resolve().name or "images"
    info = DatasetInfo(name, config.size, channels, listed.class_names, mean, std, config.flip)
    labels = listed.labels
    return RawDataset(images, labels, images, labels, train, validation if len(validation) else None, test), info


def decode(path: Path, size: int, channels: int) -> NDArray[np.uint8]:
    """Decode an image to uint8 (size, size, channels): resized and cropped around its centre.

    Raises WorkflowError naming the file if it cannot be read.
    """
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as opened:
            mode = "L" if channels == 1 else "RGB"
            opened.draft(mode, (size, size))  # a JPEG is decoded at the smallest scale that suffices
            image: Image.Image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits, which `convert` would clip
                image = Image.fromarray((np.asarray(image).clip(0, 2**16 - 1) >> 8).astype(np.uint8))
            image = ImageOps.fit(image.convert(mode), (size, size), Image.Resampling.BILINEAR)
            return np.asarray(image).reshape(size, size, channels)
    except Exception as error:  # a damaged image can raise any kind of exception
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "damaged, or of another format"
        raise WorkflowError(f"{path}: expected a PNG, JPEG or WebP image: {reason}") from error


def decoded_or_reason(path: Path, size: int, channels: int) -> NDArray[np.uint8] | str:
    """The same, but the message of the error instead of raising it."""
    try:
        return decode(path, size, channels)
    except WorkflowError as error:
        return str(error)


# Listing


def _list_splits(root: Path) -> _Listed:
    if not root.is_dir():
        raise DataFileError(root, "a folder with train/CLASS/* and val/CLASS/*, or CLASS/*", "no such folder")
    train = root / "train"
    held_out = [_first(root, _VALIDATION), _first(root, ("test",))] if train.is_dir() else [None, None]
    if held_out[1] is None:  # val is the only held-out split
        held_out.reverse()
    files: list[Path] = []
    labels: list[int] = []
    splits: list[int] = []
    class_names: tuple[str, ...] = ()
    for split, folder in enumerate((train if train.is_dir() else root, *held_out)):
        if folder is None:
            continue
        classes = _list_classes(folder)
        class_names = class_names or tuple(classes)
        if tuple(classes) != class_names:
            raise DataFileError(
                folder, f"the classes of {train}: {', '.join(class_names)}", ", ".join(classes) or "none"
            )
        for label, images in enumerate(classes.values()):
            files += images
            labels += [label] * len(images)
            splits += [split] * len(images)
    return _Listed(files, np.array(labels, np.int64), np.array(splits, np.int64), class_names)


def _first(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _list_classes(folder: Path) -> dict[str, list[Path]]:
    """The images of each class by its name, which is that of its folder."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    classes = {name: find_images(folder / name) for name in names}
    if len(classes) < 2:
        found = f"only {names[0]}" if names else "none"
        raise DataFileError(folder, "at least two folders, one for each class of images", found)
    for name, images in classes.items():
        if not images:
            raise DataFileError(
                folder / name, "PNG, JPEG or WebP images of this class", "none; add images or remove the folder"
            )
    return classes


def _split(
    listed: _Listed, broken: NDArray[np.bool_], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The rows of the training, validation and test images; raises WorkflowError if a class is left without any."""
    splits = np.where(broken, -1, listed.splits)
    if not (listed.splits == 2).any():
        random = np.random.default_rng(seed)
        for label in range(len(listed.class_names)):
            rows = random.permutation(np.flatnonzero((listed.labels == label) & ~broken))
            splits[rows[: max(1, round(TEST_SHARE * len(rows)))]] = 2
    for label, name in enumerate(listed.class_names):
        for split, purpose in ((0, "to train on"), (2, "to test on")):
            if not ((splits == split) & (listed.labels == label)).any():
                raise WorkflowError(f"the class {name} has no readable image {purpose}; add images or remove it")
    train, validation, test = (np.flatnonzero(splits == split) for split in range(3))
    return train, validation, test


# Decoding


def _decoded(
    root: Path, files: list[Path], config: RunConfig, cache: Path, console: Console
) -> tuple[NDArray[np.uint8], int, dict[str, int]]:
    """The decoded images, mapped into memory, their number of channels, and the rows of the broken ones by name."""
    states = [file.stat() for file in files]
    listing = [
        [str(file.relative_to(root)), state.st_size, state.st_mtime_ns]
        for file, state in zip(files, states, strict=True)
    ]
    options = {"version": _VERSION, "size": config.size, "channels": config.channels}
    key = hash_json({**options, "listing": listing})[:32]
    array, about = cache / f"{key}.npy", cache / f"{key}.json"
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache):
        found = _open_decoded(array, about, len(files))
        if found is None:
            remove_leftovers(cache)
            with console.status(f"decoding {len(files):,} images"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of Pillow, about odd but readable files
                channels = config.channels or (1 if all(map(_is_grey, files)) else 3)
                broken: dict[str, int] = {}
                write = partial(_write_decoded, files=files, size=config.size, channels=channels, broken=broken)
                atomic_write(array, write)
            write_json(about, {"channels": channels, "broken": broken})
            found = _open_decoded(array, about, len(files))
    if found is None:
        raise WorkflowError(f"{array} changed while it was read; start again")
    return found


def _open_decoded(array: Path, about: Path, count: int) -> tuple[NDArray[np.uint8], int, dict[str, int]] | None:
    """The content of a pair of cache files; None if it is missing or damaged."""
    try:
        values = parse_json(about.read_text(encoding="utf-8"))
        # Copy on write: PyTorch wants writable arrays, and the file must not change.
        images = np.load(array, mmap_mode="c")
        if images.dtype != np.uint8 or images.shape[0] != count or images.shape[3] != values["channels"]:
            return None
        return images, values["channels"], values["broken"]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _write_decoded(file: BinaryIO, files: list[Path], size: int, channels: int, broken: dict[str, int]) -> None:
    """Write the images as an array in NumPy's format; a broken one is black, and its row goes into `broken`."""
    header: dict[str, Any] = {"descr": "|u1", "fortran_order": False, "shape": (len(files), size, size, channels)}
    np.lib.format.write_array_header_1_0(file, header)
    black = np.zeros((size, size, channels), np.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow decodes without the interpreter's lock
        for start in range(0, len(files), _CHUNK):
            chunk = files[start : start + _CHUNK]
            read = partial(decoded_or_reason, size=size, channels=channels)
            for row, image in enumerate(threads.map(read, chunk), start):
                if isinstance(image, str):
                    broken[str(files[row])] = row
                file.write((black if isinstance(image, str) else image).tobytes())
    if len(broken) > MOST_BROKEN * len(files):
        raise WorkflowError(
            f"{len(broken):,} of {_count(len(files))} cannot be read, more than {MOST_BROKEN:.0%}: {_named(broken)}; "
            "remove or replace them"
        )


def _is_grey(path: Path) -> bool:
    """Whether an image has no colours by its format. A broken image, which is left out, counts as grey."""
    try:
        with Image.open(path) as image:
            return image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I")
    except Exception:
        return True


def _named(broken: dict[str, int]) -> str:
    """The names of the first broken images."""
    return ", ".join([*broken][:_NAMED]) + (f" and {len(broken) - _NAMED} more" if len(broken) > _NAMED else "")


def _count(images: int) -> str:
    return f"{images:,} image{'s' * (images != 1)}"


def _moments(images: NDArray[np.uint8], rows: NDArray[np.int64]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of some images, on the scale 0 to 255."""
    counts = np.zeros((images.shape[3], 256), np.int64)
    for start in range(0, len(rows), _CHUNK):
        pixels_by_channel = images[rows[start : start + _CHUNK]].reshape(-1, images.shape[3]).T
        counts += [np.bincount(channel, minlength=256) for channel in pixels_by_channel]
    values = np.arange(256)
    pixels = counts.sum(axis=1)
    mean = counts @ values / pixels
    std = np.sqrt(counts @ values**2 / pixels - mean**2)
    return tuple(mean.tolist()), tuple(np.maximum(std, 1.0).tolist())  # a constant channel is only shifted
