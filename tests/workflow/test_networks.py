"""Networks of the user's own: how they are found, what they may be, what is refused, and a run with them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from drawn_images import draw_images
from rich.console import Console
from torch import nn

import kddp_ext
from kddp_ext.workflow.cli import main
from kddp_ext.workflow.config import RunConfig, SweepConfig, TeacherConfig, for_own_networks, preset
from kddp_ext.workflow.datasets import DatasetInfo
from kddp_ext.workflow.errors import WorkflowError
from kddp_ext.workflow.folder import RunFolder
from kddp_ext.workflow.inspect import describe, evaluate
from kddp_ext.workflow.models import build_teacher
from kddp_ext.workflow.networks import Renormalised, build_own

NETWORKS = """
from types import SimpleNamespace
from torch import nn

def big(classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(72, classes))

def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, 2))

class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = big(2)

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.network(pixel_values), loss=None)

def normalised():
    network = big(2)
    network.mean, network.std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.1)
    return network

def nothing(): pass
def ten(): return big(10)
def a_list(): return nn.Identity()
def failing(): return big(2, depth=3)
def unprunable(): return nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
constant = 3
"""
INFO = DatasetInfo("shapes", 8, 3, ("bright", "dark"), (128.0, 120.0, 110.0), (60.0, 50.0, 70.0))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with own_networks.py."""
    (tmp_path / "own_networks.py").write_text(NETWORKS)
    (tmp_path / "not_importable.py").write_text("import colours_of_nothing")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("own_networks", "not_importable"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.parametrize("network", ["own_networks:big", "own_networks:small", "own_networks:Transformer"])
def test_a_network_is_found_in_the_current_directory(here: Path, network: str) -> None:
    assert isinstance(build_own("--teacher", network, INFO), nn.Module)


@pytest.mark.parametrize("name", ["weights.pt", "checkpoint.pt", "ddp.pt", "weights.safetensors"])
def test_weights_are_loaded(here: Path, name: str) -> None:
    state = build_own("--teacher", "own_networks:big", INFO).state_dict()
    if name == "weights.safetensors":
        safetensors.torch.save_file(state, name)
    else:
        wrapped = {f"module.{key}": value for key, value in state.items()} if name == "ddp.pt" else state
        torch.save({"state_dict": wrapped, "epoch": 3} if name == "checkpoint.pt" else wrapped, name)
    loaded = build_own("--teacher", f"own_networks:big:{name}", INFO).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("own_networks", "expected MODULE:FUNCTION, such as networks:small, got own_networks"),
        ("no_networks:big", "there is no module no_networks in {here} or among the installed packages"),
        ("not_importable:big", "importing not_importable fails: ModuleNotFoundError: No module named 'colours_of_"),
        ("own_networks:huge", "there is no function huge in {here}/own_networks.py"),
        ("own_networks:constant", "there is no function constant in {here}/own_networks.py"),
        ("own_networks:nothing", "own_networks:nothing: expected nothing to return a torch.nn.Module, got NoneType"),
        ("own_networks:failing", "own_networks:failing: calling failing fails: TypeError: big() got an unexpected"),
        ("own_networks:ten", "own_networks:ten: expected logits of shape (2, 2), for 2 images and 2 classes, got "),
        ("own_networks:a_list", "own_networks:a_list: expected logits of shape (2, 2), for 2 images"),
        ("own_networks:big:lost.pt", "the file of the weights, lost.pt, does not exist"),
        ("own_networks:big:own_networks.py", "own_networks.py cannot be read as weights: "),
        ("own_networks:big:small.pt", "the weights in small.pt do not fit the network: RuntimeError: Error(s)"),
    ],
)  # fmt: skip
def test_a_network_that_cannot_be_used_is_refused_in_one_line(
    here: Path, network: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = draw_images(here / "shapes")
    torch.save(build_own("--student", "own_networks:small", INFO).state_dict(), "small.pt")
    options = ["--dataset", "folder", "--data-dir", str(folder), "--size", "8"]
    assert main(["run", *options, "--teacher", network]) == 2
    printed = capsys.readouterr().err
    expected = message.format(here=here)
    assert printed.startswith((f"kddp run: --teacher: {expected}", f"kddp run: --teacher {expected}"))
    assert printed.count("\n") == 1
    assert [path.name for path in (here / "runs").iterdir()] == ["images"]


def test_a_student_that_cannot_be_pruned_is_refused_before_the_teacher_trains(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--dataset", "folder", "--data-dir", str(draw_images(here / "shapes")), "--size", "8"]
    for student, message in (
        ("own_networks:unprunable", "--student own_networks:unprunable: it cannot be pruned: "),
        ("own_networks:small:x.pt", "--student: expected MODULE:FUNCTION, because students are trained, got "),
    ):
        assert main(["run", *options, "--student", student]) == 2
        assert message in capsys.readouterr().err
    assert main(["sweep", *options, "--student", "own_networks:small", "--widths", "8"]) == 2
    assert "--widths: expected none for own_networks:small, which has no hidden layer" in capsys.readouterr().err
    assert main(["run", *options, "--student", "own_networks:small", "--pruning.layers", "hidden"]) == 2
    assert "--pruning.layers: expected all for own_networks:small" in capsys.readouterr().err


def test_a_teacher_gets_the_normalisation_that_it_wants(here: Path) -> None:
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (INFO.mean, INFO.std))
    pixels = torch.rand(2, 3, 8, 8)
    images = (pixels * 255 - mean) / std

    def seen(network: str, **settings: object) -> torch.Tensor:
        config = dataclasses.replace(RunConfig(), teacher=TeacherConfig(network=network, **settings))  # type: ignore[arg-type]
        teacher, inputs = build_teacher(config, INFO), []
        inner = teacher.network if isinstance(teacher, Renormalised) else teacher
        inner.register_forward_pre_hook(lambda _module, given: inputs.append(given[0]))
        teacher(images)
        return inputs[0]

    assert torch.equal(seen("own_networks:big"), images)
    own = (torch.tensor(values).view(-1, 1, 1) for values in ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1)))
    torch.testing.assert_close(seen("own_networks:normalised"), (pixels - next(own)) / next(own))
    torch.testing.assert_close(seen("own_networks:normalised", mean=(0.0,), std=(1.0,)), pixels)
    with pytest.raises(WorkflowError, match=r"--teacher\.mean: expected 1 or 3 numbers, one for each channel"):
        seen("own_networks:big", mean=(0.5, 0.5), std=(0.5, 0.5))
    with pytest.raises(WorkflowError, match=r"--teacher\.mean: expected numbers for pixels from 0 to 1"):
        seen("own_networks:big", mean=(127.0,), std=(60.0,))


def test_timm_names_its_normalisation_in_pretrained_cfg(here: Path) -> None:
    (here / "own_networks.py").write_text(
        NETWORKS
        + """
def timm_like():
    network = big(2)
    network.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "input_size": (3, 8, 8)}
    return network
"""
    )
    config = dataclasses.replace(RunConfig(), teacher=TeacherConfig(network="own_networks:timm_like"))
    teacher = build_teacher(config, INFO)
    assert isinstance(teacher, Renormalised)
    assert teacher.scale.flatten().tolist() == pytest.approx([60 / 255 / 0.25, 50 / 255 / 0.25, 70 / 255 / 0.25])


def test_a_run_with_own_networks(here: Path, run: Callable[..., None], quiet: Console) -> None:
    teacher = build_own("--teacher", "own_networks:Transformer", INFO)
    torch.save(teacher.state_dict(), "weights.pt")
    base = preset("folder", "quick", 8, 32)
    config = for_own_networks(base, "own_networks:Transformer:weights.pt", "own_networks:small")
    config = dataclasses.replace(
        config,
        data_dir=str(draw_images(here / "shapes", 16)),
        student=dataclasses.replace(config.student, epochs=4, batch_size=4, learning_rate=1e-2),
        pruning=dataclasses.replace(config.pruning, threshold=0.3, patience=1),
    )
    run(here / "runs" / "own", config)
    folder = RunFolder(here / "runs" / "own")
    results = {stage: folder.read_result(stage) or {} for stage in ("teacher", "kd", "kddp")}
    assert folder.read_epochs("teacher") == []
    saved = torch.load(folder.checkpoint("teacher"), weights_only=True)["model"]
    assert all(torch.equal(saved[key], value) for key, value in teacher.state_dict().items())
    assert results["kddp"]["parameters"] < results["kd"]["parameters"]
    assert results["kddp"]["width"] is None
    assert "2 classes: bright, dark" in folder.report.read_text()

    printed = quiet.file.getvalue  # type: ignore[attr-defined]
    with pytest.raises(WorkflowError, match="trained from own_networks:small; give --student own_networks:small if"):
        evaluate(folder.student("kddp"), None, "cpu", quiet)
    own = {"teacher": "own_networks:Transformer", "student": "own_networks:small"}
    evaluate(folder.path, None, "cpu", quiet, own)
    for stage, result in results.items():
        assert f"{stage:<8} {result['test_accuracy']:.2%} of 6 test images" in printed()
    describe(folder.student("kddp"), quiet)
    assert "It was trained from --student own_networks:small" in printed()
    run(here / "runs" / "own", config, resume=True)  # finished: trains nothing
    blind = dataclasses.replace(config.pruning, minimum_width=99)
    run(here / "runs" / "again", dataclasses.replace(config, seed=1, pruning=blind), teacher_from=folder.path)
    assert "warning: kddp: nothing was removed; try a larger --pruning.threshold (now 0.3)" in printed()
    (here / "shapes" / "dark" / "0.png").unlink()
    with pytest.raises(WorkflowError, match="was started with other images"):
        run(here / "runs" / "own", config, resume=True)
    assert kddp_ext.read_student_header(folder.student("kddp"))["metadata"].keys() == {"stage", "config", "data"}


def test_a_sweep_of_an_own_student_has_no_widths() -> None:
    run = for_own_networks(preset("digits", "quick"), "", "networks:small")
    assert SweepConfig(run).run.pruning.layers == "all"
    with pytest.raises(WorkflowError, match="--retrain: expected False"):
        SweepConfig(run, retrain=True)
