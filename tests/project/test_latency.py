"""benchmarks/latency.py times a run's networks, and refuses an ONNX file that computes something else."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import kddp_ext
from benchmarks import latency
from benchmarks.settings import Settings
from kddp_ext.workflow.config import RunConfig, StudentConfig
from kddp_ext.workflow.datasets import INFO
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.models import build_student

HAS_ONNX = all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
WIDTH, PRUNED = 24, 16


@pytest.mark.skipif(not HAS_ONNX, reason="onnx, onnxscript or onnxruntime is not installed")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
def test_sizes_latencies_and_the_agreement_of_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(student=StudentConfig(channels=(4, 8), width=WIDTH))
    paths = []
    for removed in (0, PRUNED):
        history = kddp_ext.PruningHistory({"hidden": WIDTH})
        history.steps.append({"hidden": list(range(removed))})
        model = build_student(config, INFO["digits"])
        history.replay(model, (torch.zeros(2, 1, 8, 8),))
        paths.append(tmp_path / f"{removed}.safetensors")
        kddp_ext.save_student(paths[-1], model, history, {"stage": "kddp", "config": json.dumps(config.to_json())})
    settings = Settings(1, 1e-3, 3, False, True)
    whole, pruned = latency.compare_latencies(paths, (1, 5), settings)
    # A hidden neuron has weights for 8 channels of 2x2 and a bias, and each of 10 classes has a weight for it.
    assert whole["parameters"] - pruned["parameters"] == PRUNED * (32 + 1 + 10)
    assert whole["macs"] - pruned["macs"] == PRUNED * (32 + 10)
    assert whole["file_bytes"] == paths[0].stat().st_size
    assert 0 <= pruned["largest_difference"] < 1e-5
    assert {engine: times.keys() for engine, times in whole["latency"].items()} == {
        "pytorch": {"1", "5"},
        "onnxruntime": {"1", "5"},
    }
    assert whole["latency"]["pytorch"]["5"]["ratio"]["median"] == 1.0
    assert len(pruned["latency"]["onnxruntime"]["1"]["rounds_ms"]) == 3

    monkeypatch.setattr(latency._OnnxModel, "__call__", lambda _self, images: torch.full((len(images), 10), 9.0))
    with pytest.raises(WorkflowError, match=r"0\.safetensors: the logits of ONNX Runtime and PyTorch differ by up to"):
        latency.compare_latencies(paths[:1], (1,), settings)
