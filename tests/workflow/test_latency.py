"""Latencies of finished students: every engine, batch and round is there, and the engines agree."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import kddp_ext
from kddp_ext.workflow import latency
from kddp_ext.workflow.config import RunConfig, StudentConfig
from kddp_ext.workflow.datasets import INFO
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.models import build_student

ON_ONNX = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript or onnxruntime is not installed",
)
WIDTH, PRUNED = 24, 16


@pytest.fixture
def students(tmp_path: Path) -> list[Path]:
    """Files of a student of the digits and of the same one without 16 of its 24 hidden neurons."""
    config = RunConfig(student=StudentConfig(channels=(4, 8), width=WIDTH))
    metadata = {"stage": "kddp", "config": json.dumps(config.to_json())}
    paths = []
    for removed in (0, PRUNED):
        history = kddp_ext.PruningHistory({"hidden": WIDTH})
        history.steps.append({"hidden": list(range(removed))})
        model = build_student(config, INFO["digits"])
        history.replay(model, (torch.zeros(2, 1, 8, 8),))
        paths.append(tmp_path / f"{WIDTH - removed}.safetensors")
        kddp_ext.save_student(paths[-1], model, history, metadata)
    return paths


def measure(paths: list[Path], **options: Any) -> list[dict[str, Any]]:
    return latency.compare_latencies(paths, (1, 5), rounds=3, seconds=1e-4, **options)


@pytest.fixture
def without_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "missing_packages", lambda: ["onnxruntime"])


@pytest.mark.usefixtures("without_onnx")
def test_without_onnx_runtime_only_pytorch_is_measured(students: list[Path]) -> None:
    threads = torch.get_num_threads()
    whole, pruned = json.loads(json.dumps(measure(students)))
    assert torch.get_num_threads() == threads
    assert [whole["path"], pruned["path"]] == [str(path) for path in students]
    # A neuron of the hidden layer reads 8 channels of 2x2 and a bias, and is read by 10 classes.
    assert whole["parameters"] - pruned["parameters"] == PRUNED * (32 + 1 + 10)
    assert whole["macs"] - pruned["macs"] == PRUNED * (32 + 10)
    assert whole["file_bytes"] == students[0].stat().st_size
    for result in (whole, pruned):
        assert result["onnx_bytes"] is None
        assert result["largest_difference"] is None
        assert result["latency"].keys() == {"pytorch"}
        assert result["latency"]["pytorch"].keys() == {"1", "5"}


@pytest.mark.usefixtures("without_onnx")
def test_ratios_are_made_within_a_round_and_the_first_student_is_their_base(
    students: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each round twice as slow as the last. Warm-up of both; then rounds, of which the second begins with the other.
    seconds = iter([9.0, 9.0, 1.0, 3.0, 6.0, 2.0, 4.0, 12.0] * 2)
    monkeypatch.setattr(latency, "median_seconds", lambda answer, budget: next(seconds))
    first, second = (result["latency"]["pytorch"]["5"] for result in measure(students))
    assert first["rounds_ms"] == [1000.0, 2000.0, 4000.0]
    assert first["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert second["rounds_ms"] == [3000.0, 6000.0, 12000.0]
    assert second["ms"] == 6000.0
    assert second["ratio"] == {"median": 3.0, "low": 3.0, "high": 3.0}


@pytest.mark.usefixtures("without_onnx")
def test_a_run_stands_for_all_of_its_networks(finished_run: Path) -> None:
    results = measure([finished_run])
    assert [result["stage"] for result in results] == ["teacher", "scratch", "kd", "kddp"]
    assert results[0]["file_bytes"] is None  # a teacher's checkpoint holds its optimizer too
    assert all(result["file_bytes"] for result in results[1:])


@ON_ONNX
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
def test_onnx_runtime_computes_the_same(students: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for result in measure(students):
        assert result["latency"].keys() == {"pytorch", "onnxruntime"}
        assert result["latency"]["onnxruntime"].keys() == {"1", "5"}
        assert result["onnx_bytes"] > 4 * result["parameters"]
        assert 0 <= result["largest_difference"] < 1e-5
    monkeypatch.setattr(latency, "_call_onnx", lambda session, images: lambda: torch.full((len(images), 10), 9).numpy())
    with pytest.raises(WorkflowError, match=r"24\.safetensors: ONNX Runtime's logits differ from PyTorch's by up to"):
        measure(students[:1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": []}, "at least one student's file"),
        ({"batches": []}, "batches: expected one or more positive numbers"),
        ({"batches": [0]}, r"batches: .*\[0\]"),
        ({"rounds": 0}, "rounds: expected at least 1, got 0"),
        ({"seconds": 0.0}, "seconds: expected more than 0"),
    ],
)
def test_what_cannot_be_measured_is_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(WorkflowError, match=message):
        latency.compare_latencies(**{"paths": [tmp_path / "student.safetensors"], **options})
