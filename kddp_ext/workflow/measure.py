"""What is measured of a network: accuracy, active neurons, parameters, multiply-accumulates and latency."""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kddp_ext import export_onnx
from kddp_ext.workflow import distributed
from kddp_ext.workflow.data import ImageData, Split
from kddp_ext.workflow.networks import logits_of
from kddp_ext.workflow.runtime import Runtime

# For each true class, the number of images by the predicted class's number; classes without images are left out.
Confusion = list[dict[str, int]]
_EVALUATION_BATCH = 1000
ACTIVE_IMAGES = 5000  # enough images to find a neuron that is active for any


def accuracy(model: nn.Module, data: ImageData, split: Split, runtime: Runtime, *, views: bool = False) -> float:
    """The share of the images of `split` that `model` classifies correctly, 0 to 1; `views` is as for `confusion`."""
    return share_correct(confusion(model, data, split, runtime, views=views))


def share_correct(counts: Tensor) -> float:
    """The accuracy, 0 to 1, in what `confusion` counted."""
    return int(counts.diagonal().sum()) / int(counts.sum())


def nonzero_counts(counts: Tensor) -> Confusion:
    """What `confusion` counted, in the form that JSON holds."""
    return [{str(predicted): count for predicted, count in enumerate(row) if count} for row in counts.tolist()]


@torch.inference_mode()
def confusion(model: nn.Module, data: ImageData, split: Split, runtime: Runtime, *, views: bool = False) -> Tensor:
    """How many images of each class `model` takes for which: int64 (classes, classes), a row for each true class.

    The processes share the images. `views` averages the logits of several views of each image: the image, and the image
    moved by one pixel along each diagonal, each also mirrored if the data set allows flips, with the weights of
    Jordan (2024).
    """
    model.eval()
    classes = data.info.classes
    counts = torch.zeros(classes * classes, dtype=torch.int64, device=runtime.device)
    shares = (distributed.share(part).split(_EVALUATION_BATCH) for part in (split.images, split.labels))
    for images, labels in zip(*shares, strict=True):
        with runtime.autocast():
            normalised = data.normalise(images)
            logits = _logits_of_views(model, normalised, data.info.flips) if views else logits_of(model(normalised))
        counts += torch.bincount(labels * classes + logits.argmax(1), minlength=len(counts))
    return distributed.total(counts).view(classes, classes).cpu()


def _logits_of_views(model: nn.Module, images: Tensor, flips: bool) -> Tensor:
    padded = nn.functional.pad(images, (1, 1, 1, 1), mode="reflect")
    size = images.shape[-1]
    views = [(0.5, images), (0.25, padded[..., :size, :size]), (0.25, padded[..., 2:, 2:])]
    if flips:
        views += [(weight, view.flip(3)) for weight, view in views]
    return torch.stack([weight * logits_of(model(view)).float() for weight, view in views]).sum(0)


@torch.inference_mode()
def count_active(model: nn.Module, layer: nn.Linear, data: ImageData, runtime: Runtime) -> int:
    """The number of neurons of `layer` that fire for any of the first 5000 training images, which processes share."""
    active = torch.zeros(layer.out_features, dtype=torch.bool, device=runtime.device)

    def note(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        active.logical_or_((output > 0).any(0))

    model.eval()
    with layer.register_forward_hook(note):
        for images in distributed.share(data.train.images[:ACTIVE_IMAGES]).split(_EVALUATION_BATCH):
            with runtime.autocast():
                model(data.normalise(images))
    return int((distributed.total(active.int()) > 0).sum())


def count_parameters(model: nn.Module) -> int:
    """The number of weights and biases."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def count_macs(model: nn.Module, image: Tensor) -> int:
    """The multiply-accumulates of all matrix products and convolutions for one image, `image` (1, C, S, S)."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(image)
    return int(counter.get_total_flops()) // 2


def latencies(models: Sequence[nn.Module], images: Tensor) -> list[dict[str, float]]:
    """Milliseconds of one call of each model, with one of the `images` and with all, measured in turns.

    In PyTorch on the models' device, and in ONNX Runtime on the CPU where its packages are installed.
    """
    calls: dict[str, list[Callable[[], object]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, model in enumerate(models):
            for batch in (images[:1], images):
                for engine, call in _engines(model.eval(), batch, Path(folder) / f"{number}.onnx"):
                    calls.setdefault(f"{engine}, batch of {len(batch)}", []).append(call)
        found = {name: _in_turns(each) for name, each in calls.items()}
    return [{name: times[number] for name, times in found.items()} for number in range(len(models))]


@contextmanager
def silent_exporters() -> Iterator[None]:
    """Keep the warnings of torch's exporters, which are about themselves, off the terminal."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _engines(model: nn.Module, batch: Tensor, file: Path) -> list[tuple[str, Callable[[], object]]]:
    def in_torch() -> object:
        with torch.inference_mode():
            return model(batch)

    engines: list[tuple[str, Callable[[], object]]] = [("PyTorch", in_torch)]
    if all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        import onnxruntime

        if not file.exists():
            with silent_exporters():
                export_onnx(model, file, (batch,))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        inputs = {session.get_inputs()[0].name: batch.cpu().contiguous().numpy()}
        engines.append(("ONNX Runtime", lambda: session.run(None, inputs)))
    return engines


def _in_turns(calls: Sequence[Callable[[], object]], rounds: int = 15) -> list[float]:
    """The median milliseconds of each call."""
    seconds: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(rounds):
        for call, own in zip(calls, seconds, strict=True):
            started = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            own.append(time.perf_counter() - started)
    return [1000 * statistics.median(own) for own in seconds]
