"""The teacher's logits for every view of the training images, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from kddp_ext.files import atomic_write, hash_tensors, remove_leftovers
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.folder import locked
from kddp_ext.workflow.progress import Progress
from kddp_ext.workflow.runtime import Runtime

_BATCH = 1000
_VERSION = 2


@dataclass
class CacheUse:
    """What the cache did in this process.

    Attributes:
        computed: views that the teacher was asked for.
        computing: seconds that took.
        read: epochs that were served from disk or memory instead.
        saved: seconds that computing those had taken.
    """

    computed: int = 0
    computing: float = 0.0
    read: int = 0
    saved: float = 0.0

    def __str__(self) -> str:
        return (
            f"teacher's logits: {self.computed} views computed in {self.computing:.0f} s; "
            f"{self.read} epochs read them from disk, which saved {self.saved:.0f} s"
        )


class TeacherLogits:
    """Logits of the training split, one memory-mapped file for each view of the images.

    The key of a file is a hash of everything that its content depends on: the teacher's weights, the images
    themselves, the seed and number of the augmented view, and the precision. So runs and sweeps can share a
    folder, and a file is right or not found. Its header holds a digest of the logits: a damaged file is
    computed again. Files are renamed into place once they are whole. Without augmentation one file serves
    every epoch. Of several processes of a run each asks the teacher for its share, and the first writes the file.

    Args:
        teacher: the trained network.
        data: its training images.
        shift: the most pixels that their views are moved by.
        folder: where the files are kept; made when the first is written.
        runtime: device and precision.
        progress: shows a bar while logits are computed.

    Attributes:
        use: what was computed and what was saved.
    """

    def __init__(
        self, teacher: nn.Module, data: ImageData, shift: int, folder: Path, runtime: Runtime, progress: Progress
    ) -> None:
        self.use = CacheUse()
        self._teacher = teacher.eval()
        self._data = data
        self._shift = shift
        self._folder = folder
        self._runtime = runtime
        self._progress = progress
        self._key = {
            "version": _VERSION,
            "teacher": hash_tensors(teacher.state_dict()),
            "images": hash_tensors({"images": data.train.images}),
            "normalisation": [list(data.info.mean), list(data.info.std)],
            "precision": f"{runtime.device.type} {runtime.dtype}",
        }
        self._latest: tuple[str, Tensor, float] | None = None

    def view(self, view: int) -> Tensor:
        """Logits for the view numbered `view`, float32 (N, classes), row i for training image i."""
        name = self._name(view)
        path = self._folder / f"{name}.safetensors"
        kept = self._latest is not None and self._latest[0] == name
        found = self._latest[1:] if self._latest is not None and kept else self._found(path)
        if found is None:
            found = self._compute(path, view)
        else:
            self.use.read += 1
            self.use.saved += found[1]
        self._latest = (name, found[0].to(self._runtime.device), found[1])
        return self._latest[1]

    def _name(self, view: int) -> str:
        augmentation = {"seed": self._data.seed, "view": view, "shift": self._shift} if self._data.augment else None
        text = json.dumps({**self._key, "augmentation": augmentation}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _compute(self, path: Path, view: int) -> tuple[Tensor, float]:
        processes = self._runtime.processes
        processes.on_rank_zero(lambda: self._folder.mkdir(parents=True, exist_ok=True))
        with processes.held_on_rank_zero(locked(self._folder, wait=True)):  # of two runs that need it, one computes it
            found = self._found(path)
            if found is not None:
                return found
            processes.on_rank_zero(lambda: remove_leftovers(self._folder))
            started = time.perf_counter()
            logits = self._ask_teacher(view)
            seconds = time.perf_counter() - started
            processes.on_rank_zero(lambda: _write(path, logits, seconds))
        self.use.computed += 1
        self.use.computing += seconds
        return logits, seconds

    def _found(self, path: Path) -> tuple[Tensor, float] | None:
        """What is in the file; nothing unless every process of the run can read it."""
        found = _read(path, (len(self._data.train), self._data.info.classes))
        return found if self._runtime.processes.all(found is not None) else None

    @torch.inference_mode()
    def _ask_teacher(self, view: int) -> Tensor:
        processes, count = self._runtime.processes, len(self._data.train)
        logits = torch.zeros(count, self._data.info.classes, dtype=torch.float32, device=self._runtime.device)
        with self._progress.bar("teacher's logits", count) as bar:
            for number, indices in enumerate(torch.arange(count, device=self._runtime.device).split(_BATCH)):
                if number % processes.count == processes.rank:
                    images = self._data.training_images(indices, view, self._shift)
                    with self._runtime.autocast():
                        logits[indices] = self._teacher(images).float()
                bar.advance(len(indices))
        return processes.sum(logits)  # each row is of one process, and zero on the others


def _write(path: Path, logits: Tensor, seconds: float) -> None:
    header = {"sha256": hash_tensors({"logits": logits}), "seconds": f"{seconds:.3f}"}
    content = safetensors.torch.save({"logits": logits.cpu()}, header)
    atomic_write(path, lambda file: file.write(content))


def _read(path: Path, shape: tuple[int, int]) -> tuple[Tensor, float] | None:
    """The logits of a whole and undamaged file, mapped into memory, and the seconds that they had taken."""
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header, logits = file.metadata() or {}, file.get_tensor("logits")
        seconds = float(header.get("seconds", "nan"))
    except (safetensors.SafetensorError, ValueError):
        return None
    fits = logits.shape == shape and logits.dtype == torch.float32 and math.isfinite(seconds)
    return (logits, seconds) if fits and header.get("sha256") == hash_tensors({"logits": logits}) else None
