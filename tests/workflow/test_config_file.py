"""Settings from a file: a run's config.json repeats the run, options override, and mistakes are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kddp_ext.workflow import runs
from kddp_ext.workflow.cli import main
from kddp_ext.workflow.config import SweepConfig, differences, preset

TOML = """
dataset = "fashion-mnist"
preset = "quick"
[student]
width = 96
[pruning]
l1-weight = 0.5
"""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, SweepConfig]]:
    """Records what would have been started."""
    calls: list[tuple[Path, SweepConfig]] = []
    monkeypatch.setattr(runs, "run_sweep", lambda path, sweep, *_, **__: calls.append((path, sweep)))
    return calls


def test_a_runs_config_repeats_the_run(
    started: list[tuple[Path, SweepConfig]], finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(finished_run / "config.json")
    expected = SweepConfig.from_json(json.loads(Path(config).read_text()))
    assert main(["run", "--config", config]) == main(["run", "--config", config, "--seed", "4", "--name", "x"]) == 0
    assert started[0] == (Path("runs/finished-again"), expected)
    path, sweep = started[1]
    assert (path, sweep.seeds) == (Path("runs/x"), (4,))
    assert differences(expected.run.options(), sweep.run.options()) == ["seed: 0 was saved, 4 is wanted"]


def test_a_sweeps_config_repeats_the_sweep(
    started: list[tuple[Path, SweepConfig]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = SweepConfig(seeds=(1, 2), ablations=("dead",))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(sweep.to_json()))
    assert main(["sweep", "--config", str(path)]) == 0
    assert started[0][1] == sweep
    assert main(["run", "--config", str(path)]) == 2
    assert capsys.readouterr().err == (
        f"kddp run: {path}: it holds the settings of a sweep; use kddp sweep --config {path}\n"
    )


@pytest.mark.parametrize("suffix", ["toml", "json", "yaml"])
def test_a_file_overrides_the_preset_that_it_names(
    started: list[tuple[Path, SweepConfig]], tmp_path: Path, suffix: str
) -> None:
    if suffix == "yaml":
        pytest.importorskip("yaml")
    nested: dict[str, Any] = {"dataset": "fashion-mnist", "preset": "quick", "student": {"width": 96}}
    text = TOML if suffix == "toml" else json.dumps({**nested, "pruning.l1_weight": 0.5})  # JSON is YAML
    (tmp_path / f"mine.{suffix}").write_text(text)
    assert main(["run", "--config", str(tmp_path / f"mine.{suffix}")]) == 0
    path, sweep = started[0]
    assert path == Path("runs/mine")
    assert differences(preset("fashion-mnist", "quick").options(), sweep.run.options()) == [
        "student.width: 256 was saved, 96 is wanted",
        "pruning.l1_weight: 0.002 was saved, 0.5 is wanted",
    ]


def test_own_networks_in_a_file_choose_their_settings(started: list[tuple[Path, SweepConfig]], tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('[student]\nnetwork = "networks:small"\n')
    assert main(["sweep", "--config", str(tmp_path / "own.toml")]) == 0
    sweep = started[0][1]
    assert (sweep.run.pruning.layers, sweep.widths, sweep.retrain) == ("all", (), False)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "colour = 3", "{0}: the settings do not fit this version of kddp_ext: missing or unknown: run."),
        ("a.toml", "[student]\nepochs = -1", "{0}: --student.epochs: expected a positive number, got -1"),
        ("a.toml", "student = 3", "{0}: run.student: expected a JSON object, got 3"),
        ("a.toml", "a = ", "--config: {0} cannot be read: Invalid value"),
        ("a.yaml", "a: [", "--config: {0} cannot be read: while parsing"),
        ("a.json", "[]", "--config: expected settings by name in {0}, got a list"),
        ("a.json", '{"version": 1}', "--config: {0} was written by another version of kddp_ext"),
        ("a.txt", "", "--config: expected a .json, .toml or .yaml file, got {0}"),
        ("a.json", None, "--config: {0} cannot be read: No such file or directory"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_is_named(
    tmp_path: Path, name: str, text: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if name.endswith("yaml"):
        pytest.importorskip("yaml")
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main(["run", "--config", str(tmp_path / name), "--runs-dir", str(tmp_path / "runs")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"kddp run: {message.format(tmp_path / name)}")
    assert printed.count("\n") == 1
    assert not (tmp_path / "runs").exists()
