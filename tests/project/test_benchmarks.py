"""The benchmarks run, compare only implementations that agree, and write their tables. No time is asserted."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kddp_ext
from benchmarks import cases, latency, timing
from benchmarks.comparisons import COMPARISONS, memory
from benchmarks.gpu import clocks, command, contenders, device
from benchmarks.settings import Settings
from kddp_ext.workflow.config import RunConfig, StudentConfig
from kddp_ext.workflow.datasets import INFO
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.models import build_student

ROOT = Path(__file__).parents[2]
HAS_ONNX = not latency.missing_packages()


SETTINGS = Settings(threads=1, seconds=0.001, rounds=2, compile=False, smoke=True)
NAMES = [
    "loss", "class-counts", "threads", "memory", "statistics", "divergences", "fused-linear", "gradient-products",
    "compaction", "pruning", "prune-step", "saliency-step",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_each_comparison_gives_tables_and_json(name):
    assert list(COMPARISONS) == NAMES
    comparison = COMPARISONS[name]
    by_heap = dict.fromkeys(comparison.heaps, comparison.measure(SETTINGS))
    by_heap = json.loads(json.dumps(by_heap))
    for table in comparison.tables(by_heap):
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.columns)}


def test_the_command_writes_json_markdown_and_a_picture(tmp_path):
    options = ["--smoke", "--no-compile", "--only", "loss", "--threads", "1", "--rounds", "1", "--seconds", "0.001"]
    files = [tmp_path / name for name in ("figures.json", "picture.png", "tables.md")]
    files[2].write_text("Before.\n\n<!-- table loss-warm -->\nold\n<!-- end -->\n\nAfter.\n")
    options += ["--json", str(files[0]), "--plot", str(files[1]), "--markdown", str(files[2])]
    subprocess.run([sys.executable, "-m", "benchmarks", *options], cwd=ROOT, check=True)
    content = json.loads(files[0].read_text())
    assert content["version"] == 1
    assert {"torch", "cpu", "threads", "instruction_set", "date", "compiler"} <= content["machine"].keys()
    assert content["comparisons"]["loss"].keys() == {"default", "warm"}
    assert files[1].read_bytes().startswith(b"\x89PNG")
    text = files[2].read_text()
    assert text.startswith("Before.\n\n<!-- table loss-warm -->\n**Loss")
    assert text.endswith("<!-- end -->\n\nAfter.\n")
    assert "old" not in text


def test_implementations_that_disagree_are_refused():
    inputs = cases.make_inputs(cases.Shape(8, 10, 4))
    losses = {"eager": cases.fused, "wrong": lambda i: cases.fused(i, label_smoothing=0.1)}
    with pytest.raises(RuntimeError, match="wrong and eager PyTorch do not compute the same"):
        cases.require_agreement(losses, inputs)


def test_without_a_gpu_the_command_says_so(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--device", "cuda", "--json", str(tmp_path / "figures.json")]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert "sees no CUDA device" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def stand_in():
    """The CPU as a device; a captured step is the step itself."""
    clock = clocks.WallClock(lambda: None)
    return device.Device("cpu", clock, clock, memory._peak_bytes, lambda step: step)


@pytest.fixture
def liger(monkeypatch):
    """A fake Liger with PyTorch's losses; its cross entropy overwrites its input as Liger's does."""

    class CrossEntropy(torch.nn.CrossEntropyLoss):
        def forward(self, logits, labels):
            loss = super().forward(logits * 1, labels)
            logits.detach().fill_(torch.nan)
            return loss

    module = SimpleNamespace(LigerKLDIVLoss=torch.nn.KLDivLoss, LigerCrossEntropyLoss=CrossEntropy)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(transformers=module))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    return module


def test_the_gpu_benchmark_runs_on_the_cpu_with_fakes(stand_in, liger, monkeypatch, tmp_path, capsys):
    properties = SimpleNamespace(
        L2_cache_size=1000, name="a GPU", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    files = SimpleNamespace(
        only=["loss", "compaction"], json=str(tmp_path / "figures.json"), markdown=str(tmp_path / "tables.md")
    )
    described = command.describe()
    assert command.run(files, SETTINGS, stand_in, described) == 0
    assert "a GPU (132 multiprocessors, 80 GiB)" in capsys.readouterr().out.replace("\n", " ")
    content = json.loads(Path(files.json).read_text())
    shape = content["gpu"]["loss"]["shapes"][0]
    names = {"kddp_ext", "eager", "Liger", "kddp_ext, CUDA graph", "eager, CUDA graph"}
    assert shape["seconds"].keys() == shape["repeated"]["seconds"].keys() == names
    assert shape["bytes_beyond"].keys() == {"kddp_ext", "eager", "Liger"}
    assert shape["missing"] == {}
    text = Path(files.markdown).read_text()
    for place in ("gpu", "gpu-loss", "gpu-loss-repeated", "gpu-memory", "gpu-compaction"):
        assert f"<!-- table {place} -->\n" in text
    table = text.partition("gpu-loss -->")[2].partition("<!-- end")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 6
    assert {line.count("|") for line in lines} == {12}


def test_missing_implementations_have_a_reason(stand_in, liger, monkeypatch):
    def refuse(step):
        raise RuntimeError("operation not permitted when stream is capturing")

    inputs = cases.make_inputs(cases.Shape(8, 10, 4))
    broken = stand_in._replace(capture=refuse)
    wrong = torch.nn.MSELoss
    monkeypatch.setattr(liger, "LigerKLDIVLoss", lambda reduction: wrong())
    steps, missing = contenders.all_contenders(inputs, SETTINGS, broken)
    assert list(steps) == ["kddp_ext", "eager"]
    assert missing["Liger"].startswith("failed: RuntimeError: Liger and eager PyTorch do not compute the same loss")
    assert missing["eager, CUDA graph"] == "failed: operation not permitted when stream is capturing"
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    _, missing = contenders.all_contenders(inputs, SETTINGS, stand_in)
    assert missing == {"Liger": "not installed"}
    timed = timing.Rounds({"kddp_ext": [1.0], "eager": [2.0]}).to_json("kddp_ext")
    shape = {"shape": "8×10", "needed_bytes": 1, **timed, "repeated": timed, "bytes_beyond": {}, "missing": missing}
    table = command.COMPARISONS["loss"].tables({"copy_bytes_per_second": 1.0, "shapes": [shape]})[0]
    assert table.rows == [
        ["8×10", "1,000,000", "2,000,000", "not installed", "2.0x (2.0–2.0)", "not installed", "100%"]
    ]


WIDTH, PRUNED = 24, 16


@pytest.fixture
def students(tmp_path):
    """The files of a whole and of a pruned student."""
    config = RunConfig(student=StudentConfig(channels=(4, 8), width=WIDTH))
    paths = [tmp_path / run / "kddp" / "student.safetensors" for run in ("whole", "other")]
    for path, removed in zip(paths, (0, PRUNED), strict=True):
        path.parent.mkdir(parents=True)
        history = kddp_ext.PruningHistory({"hidden": WIDTH})
        history.add_step({"hidden": list(range(removed))})
        model = build_student(config, INFO["digits"])
        history.replay(model, (torch.zeros(2, 1, 8, 8),))
        metadata = {"config": json.dumps(config.to_json()), "data": json.dumps(dataclasses.asdict(INFO["digits"]))}
        kddp_ext.save_student(path, model, history, {"stage": "kddp", **metadata})
    return paths


def test_the_students_command_writes_tables_and_json(students, tmp_path):
    files = [tmp_path / name for name in ("figures.json", "tables.md")]
    command = [sys.executable, "-m", "benchmarks.students", *map(str, students), "--smoke", "--batches", "1,3"]
    subprocess.run([*command, "--json", str(files[0]), "--markdown", str(files[1])], cwd=ROOT, check=True)
    whole, pruned = json.loads(files[0].read_text())["students"]
    assert [whole["path"], pruned["path"]] == list(map(str, students))
    # A hidden neuron has weights for 8 channels of 2x2 and a bias, and each of 10 classes has a weight for it.
    assert whole["parameters"] - pruned["parameters"] == PRUNED * (32 + 1 + 10)
    assert whole["macs"] - pruned["macs"] == PRUNED * (32 + 10)
    assert whole["file_bytes"] == students[0].stat().st_size
    engines = pruned["latency"]
    assert all(batches.keys() == {"1", "3"} for batches in engines.values())
    assert len(engines["pytorch"]["1"]["rounds_ms"]) == 1
    assert whole["latency"]["pytorch"]["3"]["ratio"]["median"] == 1.0
    assert engines.keys() == ({"pytorch", "onnxruntime"} if HAS_ONNX else {"pytorch"})
    assert not HAS_ONNX or 0 <= pruned["largest_difference"] < 1e-5
    text = files[1].read_text()
    table = text.partition("students-latency -->")[2]
    rows = [line.split(" | ")[0] for line in table.splitlines() if "/kddp, " in line]
    titles = {"pytorch": "PyTorch", "onnxruntime": "ONNX Runtime"}
    assert rows == [f"| {run}/kddp, {titles[engine]}" for engine in engines for run in ("whole", "other")]
    assert ("ONNX Runtime needs missing packages" in text) == (not HAS_ONNX)
    ended = subprocess.run([*command[:3], "nowhere"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    own = [line for line in ended.stderr.splitlines() if "torch/utils/cpp_extension.py" not in line]  # it may warn
    assert own == ["nowhere: no such file or folder"]


@pytest.mark.skipif(not HAS_ONNX, reason="onnx, onnxscript or onnxruntime is not installed")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
def test_an_onnx_file_that_computes_something_else_is_refused(students, monkeypatch):
    monkeypatch.setattr(latency._OnnxModel, "__call__", lambda _self, images: torch.full((len(images), 10), 9.0))
    with pytest.raises(WorkflowError, match=r"student\.safetensors: the logits of .* differ by up to"):
        latency.compare_latencies(students[:1], (1,), SETTINGS)
