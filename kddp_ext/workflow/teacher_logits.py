"""The teacher's logits for every view of the training images, computed once and cached on disk."""

from __future__ import annotations

from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from kddp_ext.files import atomic_write, hash_json, hash_tensors, remove_leftovers
from kddp_ext.workflow import distributed
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.folder import locked
from kddp_ext.workflow.networks import logits_of
from kddp_ext.workflow.runtime import Runtime

_BATCH = 1000
_VERSION = 2


class TeacherLogits:
    """Logits of the training split, one memory-mapped file for each view of the images.

    A file's name is a hash of everything that its content depends on: the teacher's weights, the images, the seed and
    number of the augmented view, and the precision. So runs and sweeps can share a folder, and a file is never stale.
    Its header holds a hash of the logits; a damaged file is computed again. Files are renamed into place when they are
    complete. Without augmentation one file serves every epoch. If several processes share a training, each computes its
    share of the logits, and the first process writes the file.
    """

    def __init__(self, teacher: nn.Module, data: ImageData, shift: int, folder: Path, runtime: Runtime) -> None:
        self._teacher = teacher.eval()
        self._data = data
        self._shift = shift
        self._folder = folder
        self._runtime = runtime
        self._key = {
            "version": _VERSION,
            "teacher": hash_tensors(teacher.state_dict()),
            "images": hash_tensors({"images": data.train.images}),
            "normalisation": [list(data.info.mean), list(data.info.std)],
            "flips": data.info.flips,
            "precision": f"{runtime.device.type} {runtime.dtype}",
        }
        self._latest: tuple[Path, Tensor] = Path(), torch.empty(0)

    def view(self, view: int) -> Tensor:
        """Logits for the view numbered `view`, float32 (N, classes); row i is for training image i."""
        augmentation = {"seed": self._data.seed, "view": view, "shift": self._shift} if self._data.augment else None
        path = self._folder / f"{hash_json({**self._key, 'augmentation': augmentation})[:32]}.safetensors"
        if self._latest[0] != path:
            logits = self._read(path)
            self._latest = path, (self._compute(path, view) if logits is None else logits).to(self._runtime.device)
        return self._latest[1]

    def _compute(self, path: Path, view: int) -> Tensor:
        distributed.on_rank_zero(lambda: self._folder.mkdir(parents=True, exist_ok=True))
        with distributed.held_on_rank_zero(locked(self._folder)):  # if two runs need it, only one computes it
            logits = self._read(path)
            if logits is not None:
                return logits
            distributed.on_rank_zero(lambda: remove_leftovers(self._folder))
            logits = self._ask_teacher(view)
            distributed.on_rank_zero(lambda: write_logits(path, logits))
        return logits

    def _read(self, path: Path) -> Tensor | None:
        """The logits in the file; None unless every process can read them."""
        logits = read_logits(path, (len(self._data.train), self._data.info.classes))
        return logits if all(distributed.gather(logits is not None)) else None

    @torch.inference_mode()
    def _ask_teacher(self, view: int) -> Tensor:
        count = len(self._data.train)
        logits = torch.zeros(count, self._data.info.classes, dtype=torch.float32, device=self._runtime.device)
        for number, indices in enumerate(torch.arange(count, device=self._runtime.device).split(_BATCH)):
            if number % distributed.count() == distributed.rank():
                images = self._data.training_images(indices, view, self._shift)
                with self._runtime.autocast():
                    logits[indices] = logits_of(self._teacher(images)).float()
        return distributed.total(logits)  # each row is zero on all processes but one


def write_logits(path: Path, logits: Tensor) -> None:
    """Write a file of logits, with their hash in its header."""
    content = safetensors.torch.save({"logits": logits.cpu()}, {"sha256": hash_tensors({"logits": logits})})
    atomic_write(path, lambda file: file.write(content))


def read_logits(path: Path, shape: tuple[int, int]) -> Tensor | None:
    """The float32 logits of shape `shape` in a file, mapped into memory; None if it is missing or damaged."""
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header, logits = file.metadata() or {}, file.get_tensor("logits")
    except (safetensors.SafetensorError, ValueError):
        return None
    intact = header.get("sha256") == hash_tensors({"logits": logits})
    return logits if intact and logits.shape == shape and logits.dtype == torch.float32 else None
