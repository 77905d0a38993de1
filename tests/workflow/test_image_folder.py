"""Folders of images: what is read, how it is split, that it is decoded once, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_images import CLASSES, draw_images
from PIL import Image
from rich.console import Console

from kddp_ext.workflow import image_folder
from kddp_ext.workflow.cli import main
from kddp_ext.workflow.config import RunConfig, preset
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.datasets import DatasetInfo, RawDataset
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.image_folder import decode, read_image_folder


def read(folder: Path, **options: object) -> tuple[RawDataset, DatasetInfo, str]:
    """The folder, decoded beside it, and what was printed."""
    config = dataclasses.replace(RunConfig(), dataset="folder", data_dir=str(folder), size=8, **options)  # type: ignore[arg-type]
    output = io.StringIO()
    raw, info = read_image_folder(config, folder.parent / "cache", Console(file=output, width=200))
    return raw, info, output.getvalue()


def splits(raw: RawDataset, info: DatasetInfo) -> tuple[int, int, int]:
    config = dataclasses.replace(RunConfig(), validation=0)
    data = ImageData(raw, info, config, torch.device("cpu"))
    assert data.train.labels.unique().tolist() == data.test.labels.unique().tolist() == [0, 1]
    return len(data.train), len(data.validation), len(data.test)


@pytest.mark.parametrize("suffix", ["png", "jpeg", "webp"])
def test_a_tree_is_split_class_by_class_by_the_data_seed(tmp_path: Path, suffix: str) -> None:
    folder = draw_images(tmp_path / "shapes", 10, suffix)
    raw, info, printed = read(folder)
    assert (info.name, info.class_names, info.channels, info.size) == ("shapes", CLASSES, 3, 8)
    assert (splits(raw, info), printed) == ((16, 0, 4), "")
    rows = [read(folder, data_seed=seed)[0].test_rows for seed in (0, 0, 1)]
    assert [np.array_equal(rows[0], each) for each in rows] == [True, True, False]  # type: ignore[arg-type]
    means = [raw.train_images[raw.train_labels == label].mean() for label in (0, 1)]
    assert means == pytest.approx([200, 60], abs=3)


@pytest.mark.parametrize(
    ("folders", "expected"),
    [(("train", "val"), (16, 0, 4)), (("train", "test"), (16, 0, 4)), (("train", "valid", "test"), (16, 4, 4)),
     (("train",), (12, 0, 4))],
)  # fmt: skip
def test_the_folders_of_a_split(tmp_path: Path, folders: tuple[str, ...], expected: tuple[int, ...]) -> None:
    for name in folders:
        draw_images(tmp_path / "shapes" / name, 8 if name == "train" else 2)
    raw, info, _ = read(tmp_path / "shapes")
    assert splits(raw, info) == expected


def test_the_moments_are_those_of_the_training_images(tmp_path: Path) -> None:
    raw, info, _ = read(draw_images(tmp_path / "shapes"))
    images = raw.train_images[raw.train_rows].astype(float)  # type: ignore[index]
    assert info.mean == pytest.approx(images.mean(axis=(0, 1, 2)))
    assert info.std == pytest.approx(images.std(axis=(0, 1, 2)))


def test_grey_images_stay_grey_unless_colour_is_wanted(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "shapes", colour=False)
    assert [read(folder, channels=channels)[1].channels for channels in (0, 1, 3)] == [1, 1, 3]
    Image.new("RGB", (9, 9)).save(folder / "dark" / "colour.png")
    assert read(folder)[1].channels == 3


def test_images_are_resized_and_cropped_around_the_centre(tmp_path: Path) -> None:
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert decode(tmp_path / "wide.png", 8, 3).min() > 200  # the filter reaches one pixel beyond
    Image.fromarray(np.full((5, 5), 40_000, np.uint16)).save(tmp_path / "16bit.png")
    assert np.unique(decode(tmp_path / "16bit.png", 8, 1)).tolist() == [40_000 >> 8]


def test_images_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = draw_images(tmp_path / "shapes")
    first = read(folder)[0].train_images.copy()
    decoded: list[Path] = []
    monkeypatch.setattr(image_folder, "decode", lambda path, *options: decoded.append(path) or decode(path, *options))
    again, _, _ = read(folder)
    assert not decoded
    assert isinstance(again.train_images, np.memmap)
    assert np.array_equal(first, again.train_images)
    for file in (tmp_path / "cache").glob("*.npy"):
        file.write_bytes(b"damaged")
    assert np.array_equal(read(folder)[0].train_images, first)
    assert len(decoded) == 16
    shutil.copy(folder / "dark" / "1.png", folder / "dark" / "new.png")
    assert len(read(folder)[0].train_images) == 17


def test_broken_images_are_named_and_left_out(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "shapes", 20)
    (folder / "dark" / "text.png").write_text("not an image")
    whole = (folder / "dark" / "3.png").read_bytes()
    (folder / "dark" / "3.png").write_bytes(whole[: len(whole) // 2])
    for _ in range(2):  # also when they come from the cache
        raw, info, printed = read(folder)
        assert f"left out 2 images that cannot be read: {folder}/dark/3.png, {folder}/dark/text.png" in printed
        assert sum(splits(raw, info)) == 39
    (folder / "dark" / "0.png").write_bytes(b"")
    with pytest.raises(WorkflowError, match=r"3 of 41 images cannot be read, more than 5%: .*/dark/0.png"):
        read(folder)


def emptied(folder: Path) -> None:
    for file in (folder / "dark").iterdir():
        file.unlink()


def damaged(folder: Path) -> None:
    for file in (folder / "dark").iterdir():
        file.write_text("text")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (emptied, "{0}/dark: expected PNG, JPEG or WebP images of this class, found none; add images or remove"),
        (lambda folder: shutil.rmtree(folder / "dark"), "{0}: expected at least two folders, one for each class"),
        (shutil.rmtree, "{0}: expected a folder with train/CLASS/* and val/CLASS/*, or CLASS/*, found no such folder"),
        (damaged, "8 of 16 images cannot be read, more than 5%: {0}/dark/0.png, "),
        (lambda folder: draw_images(folder / "train") and draw_images(folder / "val") and
         (folder / "val" / "dark").rename(folder / "val" / "dim"),
         "{0}/val: expected the classes of {0}/train: bright, dark, found bright, dim"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, change: Callable[[Path], object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = draw_images(tmp_path / "shapes")
    change(folder)
    runs = tmp_path / "runs"
    assert main(["run", "--dataset", "folder", "--data-dir", str(folder), "--size", "8", "--runs-dir", str(runs)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"kddp run: {message.format(folder)}")
    assert printed.count("\n") == 1
    assert [file for file in runs.rglob("*") if file.is_file()] == []


def test_the_preset_of_a_folder_makes_enough_steps_and_poolings() -> None:
    for size, poolings in ((8, 1), (28, 2), (32, 3), (64, 4), (224, 5), (512, 6)):
        for images, least in ((100, 400), (50_000, 1500)):
            for name in ("quick", "default"):
                config = preset("folder", name, size, images)  # type: ignore[arg-type]
                assert len(config.student.channels) == poolings
                assert config.student.epochs * (images // config.student.batch_size) >= least
    assert preset("folder", "default", 64, 50_000).student.epochs == 30
