"""Exported students are checked before they get their names, and nothing is left of those that fail."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from kddp_ext.workflow import export as module
from kddp_ext.workflow.cli import main
from kddp_ext.workflow.folder import RunFolder
from kddp_ext.workflow.saved_models import read_student

ON_ONNX = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript or onnxruntime is not installed",
)
IMAGES = torch.rand(5, 1, 8, 8)


@pytest.fixture
def student(finished_run: Path) -> Path:
    return RunFolder(finished_run).student("kddp")


def logits(student: Path) -> Tensor:
    with torch.no_grad():
        return read_student(student).load().eval()(IMAGES)  # type: ignore[no-any-return]


@ON_ONNX
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
def test_an_onnx_file_computes_the_same(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnxruntime

    assert main(["export", str(student), "--onnx", str(tmp_path / "s.onnx")]) == 0
    assert "s.onnx: " in (printed := capsys.readouterr().out)
    assert "checked on 3 random images" in printed
    session = onnxruntime.InferenceSession(tmp_path / "s.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), logits(student), rtol=1e-3, atol=1e-4)


def test_a_program_and_state_dicts_compute_the_same(student: Path, tmp_path: Path) -> None:
    files = {name: str(tmp_path / name) for name in ("s.pt2", "s.pt", "s.safetensors")}
    assert main(["export", str(student), "--torch-export", files["s.pt2"], "--state-dict", files["s.pt"]]) == 0
    assert main(["export", str(student), "--state-dict", files["s.safetensors"]]) == 0
    program = torch.export.load(files["s.pt2"]).module()
    torch.testing.assert_close(program(IMAGES), logits(student))
    expected = read_student(student).load().state_dict()
    for loaded in (torch.load(files["s.pt"], weights_only=True), safetensors.torch.load_file(files["s.safetensors"])):
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    assert sorted(path.name for path in tmp_path.glob("*s.*")) == sorted(files)


def test_nothing_is_written_if_the_check_or_the_export_fails(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out" / "s.pt"
    assert main(["export", str(student), "--state-dict", str(file)]) == 2
    assert f"{file}: the folder {file.parent} does not exist" in capsys.readouterr().err
    file.parent.mkdir()

    def wrong(_model: nn.Module, path: Path, _images: Tensor) -> module.Compute:
        path.write_text("half")
        return lambda images: torch.zeros(len(images), 10)

    def failing(_model: nn.Module, path: Path, _images: Tensor) -> module.Compute:
        path.write_text("half")
        raise RuntimeError("no such\noperator")

    for write, message in (
        (wrong, "not written: its logits differ"),
        (failing, "exported: no such operator"),
    ):
        monkeypatch.setattr(module, "_to_state_dict", write)
        assert main(["export", str(student), "--state-dict", str(file)]) == 2
        assert message in capsys.readouterr().err
        assert list(file.parent.iterdir()) == []
    assert main(["export", str(student)]) == 2
    assert "expected --onnx FILE, --torch-export FILE or --state-dict FILE" in capsys.readouterr().err


def test_the_output_of_transformers_becomes_plain_logits(tmp_path: Path) -> None:
    class Model(nn.Module):
        def forward(self, pixel_values: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=pixel_values.mean((2, 3)))

    compute = module._to_program(Model(), tmp_path / "s.pt2", IMAGES)
    torch.testing.assert_close(compute(IMAGES), IMAGES.mean((2, 3)))
