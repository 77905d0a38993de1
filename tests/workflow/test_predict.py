"""Predictions agree with the accuracy that a run measured, wherever the paths come from."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from kddp_ext.workflow.cli import main
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.datasets import INFO, read_dataset
from kddp_ext.workflow.folder import RunFolder


@pytest.fixture
def images(finished_run: Path, tmp_path: Path) -> Path:
    """All test images of the digits as files, named after their place and class."""
    data = ImageData(
        read_dataset("digits", None), INFO["digits"], RunFolder(finished_run).read_config().run, torch.device("cpu")
    )
    (tmp_path / "images").mkdir()
    for number, (image, label) in enumerate(zip(data.test.images, data.test.labels, strict=True)):
        Image.fromarray(image[..., 0].numpy()).save(tmp_path / "images" / f"{number:03}-{int(label)}.png")
    return tmp_path / "images"


def test_predictions_have_the_accuracy_of_the_run(
    finished_run: Path, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    student = str(RunFolder(finished_run).student("kddp"))
    assert main(["predict", student, str(images)]) == 0
    printed = capsys.readouterr().out
    rows = [line.split("\t") for line in printed.splitlines()]
    right = sum(Path(path).stem.endswith(f"-{name}") for path, name, _ in rows)
    result = RunFolder(finished_run).read_result("kddp") or {}
    assert right / len(rows) == pytest.approx(result["test_accuracy"], abs=1e-9)
    assert all(0.1 < float(probability) <= 1 for _, _, probability in rows)

    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(path for path, _, _ in rows[:3]) + "\n"))
    assert main(["predict", student, "-", rows[3][0], "--json"]) == 0
    values = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert values == [{"path": path, "class": name, "probability": float(p)} for path, name, p in rows[:4]]


def test_what_cannot_be_predicted_is_named(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = str(RunFolder(finished_run).student("kddp"))
    Image.new("L", (20, 10)).save(tmp_path / "good.webp")
    (tmp_path / "text.png").write_text("text")
    (tmp_path / "empty").mkdir()
    files = [str(tmp_path / name) for name in ("text.png", "good.webp", "lost.png")]
    assert main(["predict", student, *files]) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{tmp_path}/good.webp\t")
    assert printed.err == (
        f"kddp predict: {tmp_path}/text.png: expected a PNG, JPEG or WebP image: damaged, or of another format "
        "(and 1 more images)\n"
    )
    for arguments, message in (
        ([student, str(tmp_path / "empty")], "expected a folder with PNG, JPEG or WebP images, found none"),
        ([student], "expected image files or folders after the student's file"),
        ([str(tmp_path), files[1]], "expected a student's file, such as runs/NAME/kddp/student.safetensors"),
        (
            [student, files[1], "--student", "a:b"],
            "trained from --student.architecture cnn; leave out --student",
        ),
    ):
        assert main(["predict", *arguments]) == 2
        assert message in capsys.readouterr().err
