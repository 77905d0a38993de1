"""The diagrams: each is drawn, the same each time, and no words lie over others or over the edge."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from docs.blocks import ROOT
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PICTURES = ROOT / "docs" / "pictures"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of three epochs, as far as the picture of its widths reads it."""
    for stage, widths in (("kd", [None] * 3), ("kddp", [64, 40, 9])):
        (tmp_path / stage).mkdir()
        epochs = [
            {"epoch": number, "width": width, "validation_accuracy": number / 4}
            for number, width in enumerate(widths, 1)
        ]
        (tmp_path / stage / "metrics.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))
        (tmp_path / stage / "result.json").write_text(json.dumps({"width": 64}))
    return tmp_path


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The modules that draw, which import one another by their bare names."""
    monkeypatch.syspath_prepend(PICTURES)
    import compaction
    import training_step
    import width

    found = {"compaction": compaction, "training_step": training_step, "width": width}
    yield found
    for name in (*found, "shapes"):
        sys.modules.pop(name, None)


def crossing(figure: Figure) -> list[str]:
    """Words of a figure that lie over others, or beyond its edge."""
    figure.set_canvas(FigureCanvasAgg(figure))
    figure.canvas.draw()
    words = [text for axes in figure.axes for text in axes.texts if text.get_text()]
    extents = {text.get_text(): text.get_window_extent() for text in words}
    edge = figure.bbox
    found = [
        words for words, at in extents.items() if at.x0 < 0 or at.y0 < 0 or at.x1 > edge.width or at.y1 > edge.height
    ]
    pairs = itertools.combinations(extents.items(), 2)
    return found + [f"{one} | {other}" for (one, at), (other, there) in pairs if at.overlaps(there)]


@pytest.mark.parametrize("name", ["compaction", "training_step"])
def test_no_words_cross(name: str, modules: dict[str, ModuleType]) -> None:
    figure = modules[name].draw()
    assert len(figure.axes[0].texts) > 10
    assert crossing(figure) == []


def test_crossing_words_are_noticed() -> None:
    figure = Figure(figsize=(2, 2))
    axes = figure.add_axes((0, 0, 1, 1))
    for x, words in ((0.1, "one"), (0.12, "two"), (0.9, "beyond the edge")):
        axes.text(x, 0.5, words)
    assert crossing(figure) == ["beyond the edge", "one | two"]


def test_widths_are_those_of_the_run(run: Path, modules: dict[str, ModuleType]) -> None:
    widths, accuracies = modules["width"].draw(run).axes
    steps = widths.get_lines()[1]
    assert list(steps.get_xdata()) == [0, 1, 2, 3]
    assert list(steps.get_ydata()) == [64, 64, 40, 9]
    assert [list(line.get_ydata()) for line in accuracies.get_lines()] == [[25, 50, 75]] * 2


def test_the_command_draws_all_of_them_alike_each_time(run: Path, tmp_path: Path) -> None:
    drawn = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        command = [sys.executable, str(PICTURES), "--run", str(run), "--folder", str(folder)]
        subprocess.run(command, check=True, cwd=ROOT)
        drawn.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert drawn[0] == drawn[1]
    assert set(drawn[0]) == {"compaction.svg", "training-step.svg", "width-over-epochs.svg"}
    assert set(drawn[0]) <= {path.name for path in (ROOT / "docs" / "images").iterdir()}
