"""The teacher's logits of every training image in every epoch, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from kddp_ext.files import atomic_write
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.progress import Progress
from kddp_ext.workflow.runtime import Runtime

_BATCH = 1000
_VERSION = 1


class TeacherLogits:
    """Logits of the training split, one file for each epoch's views of the images.

    The key of a file is a hash of everything that its content depends on: the teacher's weights, the images
    themselves, the seed and epoch of the augmentation, and the precision. So a file is right or not found;
    a damaged one is computed again. Without augmentation one file serves every epoch.

    Args:
        teacher: the trained network.
        data: its training images.
        folder: where the files are kept; made when the first is written.
        runtime: device and precision.
        progress: shows a bar while logits are computed.
    """

    def __init__(self, teacher: nn.Module, data: ImageData, folder: Path, runtime: Runtime, progress: Progress) -> None:
        self._teacher = teacher.eval()
        self._data = data
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
        self._latest: tuple[str, Tensor] | None = None

    def epoch(self, epoch: int) -> Tensor:
        """Logits for the views of `epoch`, float32 (N, classes), row i for training image i."""
        name = self._name(epoch)
        if self._latest is None or self._latest[0] != name:
            path = self._folder / f"{name}.safetensors"
            logits = self._read(path)
            if logits is None:
                logits = self._compute(epoch)
                content = safetensors.torch.save({"logits": logits.cpu()})
                self._folder.mkdir(parents=True, exist_ok=True)
                atomic_write(path, lambda file: file.write(content))
            self._latest = (name, logits.to(self._runtime.device))
        return self._latest[1]

    def _name(self, epoch: int) -> str:
        view = {"seed": self._data.seed, "epoch": epoch} if self._data.augment else None
        text = json.dumps({**self._key, "view": view}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _read(self, path: Path) -> Tensor | None:
        if not path.is_file():
            return None
        try:
            logits = safetensors.torch.load(path.read_bytes())["logits"]
        except (safetensors.SafetensorError, KeyError):
            return None
        rows_fit = logits.dim() == 2 and len(logits) == len(self._data.train)
        return logits if rows_fit and logits.dtype == torch.float32 else None

    @torch.inference_mode()
    def _compute(self, epoch: int) -> Tensor:
        parts = []
        count = len(self._data.train)
        with self._progress.bar("teacher's logits", count) as bar:
            for indices in torch.arange(count, device=self._runtime.device).split(_BATCH):
                images = self._data.training_images(indices, epoch)
                with self._runtime.autocast():
                    parts.append(self._teacher(images).float())
                bar.advance(len(indices))
        return torch.cat(parts)


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
