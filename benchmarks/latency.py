"""The latency of trained networks on one CPU thread, in float32: in PyTorch and, exported, in ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kddp_ext
from benchmarks.settings import Settings
from benchmarks.timing import Step, in_turns
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.measure import count_macs, count_parameters
from kddp_ext.workflow.runtime import Runtime
from kddp_ext.workflow.saved_models import find_models

TOLERANCE = 1e-3  # of the largest logit; float32 sums in another order differ by about 1e-6


def missing_packages() -> list[str]:
    """The packages that ONNX Runtime needs and that are not installed."""
    return [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]


def compare_latencies(paths: Sequence[Path], batches: Sequence[int], settings: Settings) -> list[dict[str, Any]]:
    """Time the networks in turns, with each engine at each batch size.

    Args:
        paths: student files, or folders of runs; every finished network of a run is timed.
        batches: numbers of images in a call.
        settings: how to measure; `threads` must be 1.

    Returns:
        For each network: "path", "parameters", "macs" (of one image), "file_bytes" (None for a teacher, whose file
        also has its optimizer), "onnx_bytes" and "largest_difference" between the logits of the two engines (None
        without ONNX Runtime), and "latency": by engine and by batch size as text, the median "ms" of a call, "ratio" to
        the first network with the same engine and batch size, and "rounds_ms".

    Raises:
        WorkflowError: a path is not a student file or run, or the logits of the two engines differ.
    """
    results, steps = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for index, saved in enumerate(saved for path in paths for saved in find_models(path)):
            info = saved.info
            generator = torch.Generator().manual_seed(0)
            images = torch.randn(max(2, *batches), info.channels, info.size, info.size, generator=generator)
            inputs = {batch: images[:batch].contiguous(memory_format=torch.channels_last) for batch in batches}
            # The workflow trains in channels-last layout. ONNX Runtime has a layout of its own.
            model = Runtime("cpu", "float32").place(saved.load().eval().requires_grad_(False))
            result: dict[str, Any] = {
                "path": str(saved.path),
                "parameters": count_parameters(model),
                "macs": count_macs(model, images[:1]),
                "file_bytes": saved.path.stat().st_size if saved.history is not None else None,
                "onnx_bytes": None,
                "largest_difference": None,
            }
            engines = {"pytorch": model}
            if not missing_packages():
                path = Path(folder) / f"{index}.onnx"
                kddp_ext.export_onnx(model, path, (torch.zeros(2, *images.shape[1:]),))
                engines["onnxruntime"] = _OnnxModel(path)
                result["onnx_bytes"] = path.stat().st_size
                result["largest_difference"] = _difference(saved.path, engines, inputs)
            for engine, call in engines.items():
                for batch, images in inputs.items():
                    steps[index, engine, batch] = partial(call, images)
            results.append(result)
        for engine in {engine: None for _, engine, _ in steps}:
            for batch in batches:
                _time(results, engine, batch, steps, settings)
    return results


def _time(
    results: list[dict[str, Any]], engine: str, batch: int, steps: dict[tuple[int, str, int], Step], settings: Settings
) -> None:
    with torch.inference_mode():
        rounds = in_turns({str(index): steps[index, engine, batch] for index in range(len(results))}, settings)
    for index, result in enumerate(results):
        result.setdefault("latency", {}).setdefault(engine, {})[str(batch)] = {
            "ms": 1000 * rounds.median(str(index)),
            "ratio": rounds.ratio(str(index), "0")._asdict(),
            "rounds_ms": [1000 * seconds for seconds in rounds.seconds[str(index)]],
        }


class _OnnxModel:
    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._name = self._session.get_inputs()[0].name

    def __call__(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self._session.run(None, {self._name: images.contiguous().numpy()})[0])


def _difference(path: Path, engines: dict[str, Any], inputs: dict[int, Tensor]) -> float:
    """The largest difference between the logits of the two engines."""
    largest = 0.0
    for batch, images in inputs.items():
        expected = engines["pytorch"](images)
        difference = float((engines["onnxruntime"](images) - expected).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):  # also refuses NaN
            raise WorkflowError(
                f"{path}: the logits of ONNX Runtime and PyTorch differ by up to {difference:.3g} at batch {batch}"
            )
        largest = max(largest, difference)
    return largest
