"""The diagrams: `python docs/pictures` draws the same ones every time, and no text overlaps other text or the edge."""

import importlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from docs.blocks import ROOT
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PICTURES = ROOT / "docs" / "pictures"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of three epochs, with the files that the picture of the widths reads."""
    for stage, widths in (("kd", [None] * 3), ("kddp", [64, 40, 9])):
        (tmp_path / stage).mkdir()
        epochs = [
            {"epoch": number, "width": width, "validation_accuracy": number / 4}
            for number, width in enumerate(widths, 1)
        ]
        (tmp_path / stage / "metrics.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))
        (tmp_path / stage / "result.json").write_text(json.dumps({"width": 64}))
    return tmp_path


def overlaps(figure: Figure) -> list[str]:
    """The texts of a figure that overlap others or its edge."""
    figure.set_canvas(FigureCanvasAgg(figure))
    figure.canvas.draw()
    extents = {text.get_text(): text.get_window_extent() for axes in figure.axes for text in axes.texts}
    extents.pop("", None)
    edge = figure.bbox
    outside = [text for text, at in extents.items() if not (edge.x0 <= at.x0 and at.x1 <= edge.x1)]
    outside += [text for text, at in extents.items() if not (edge.y0 <= at.y0 and at.y1 <= edge.y1)]
    pairs = itertools.combinations(extents.items(), 2)
    return outside + [f"{one} | {other}" for (one, at), (other, there) in pairs if at.overlaps(there)]


def test_no_texts_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PICTURES)
    for name in ("compaction", "training_step"):
        figure = importlib.import_module(name).draw()
        assert len(figure.axes[0].texts) > 10
        assert overlaps(figure) == []


def test_the_widths_are_those_of_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PICTURES)
    widths, accuracies = importlib.import_module("width").draw(run).axes
    steps = widths.get_lines()[1]
    assert list(steps.get_xdata()) == [0, 1, 2, 3]
    assert list(steps.get_ydata()) == [64, 64, 40, 9]
    assert [list(line.get_ydata()) for line in accuracies.get_lines()] == [[25, 50, 75]] * 2


def test_the_command_draws_the_same_pictures_every_time(run: Path, tmp_path: Path) -> None:
    drawn = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        subprocess.run([sys.executable, PICTURES, "--run", run, "--folder", folder], check=True, cwd=ROOT)
        drawn.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert drawn[0] == drawn[1]
    study = {f"study-{name}.svg" for name in ("accuracy", "widths", "ablations")}
    assert set(drawn[0]) == {"compaction.svg", "training-step.svg", "width-over-epochs.svg", *study}
    assert set(drawn[0]) <= {path.name for path in (ROOT / "docs" / "images").iterdir()}


def test_the_pictures_of_the_study_show_its_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PICTURES)
    path = ROOT / "docs" / "cifar10-study.json"
    figures = importlib.import_module("study").pictures(path)
    trainings = json.loads(path.read_text())["cnn5"]
    widths = [list(line.get_ydata()) for line in figures["study-widths"].axes[0].get_lines()]
    found = [training["widths"] for name in trainings if name.startswith("kddp, l1") for training in trainings[name]]
    assert widths == found
    kddp, *_ = (list(lines[0].get_ydata()) for lines in figures["study-accuracy"].axes[0].containers)
    assert kddp == pytest.approx([83.25, 84.41, 85.01, 84.91, 85.03], abs=0.005)  # of the page's table, by size
    assert len(figures["study-ablations"].axes[0].get_yticklabels()) == 6
