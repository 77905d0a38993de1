"""The studies that train or measure networks, in small."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks import prediction, recipe_search, shrinking
from benchmarks.trainings import changed
from kddp_ext.workflow.config import preset


@pytest.fixture
def results(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that runs a study of the finished run's teacher and returns its results and its page."""

    def run(study: ModuleType, *options: str) -> tuple[dict[str, Any], str]:
        folder, page = tmp_path / "results", tmp_path / "page.md"
        command = ["study", finished_run / "teacher", "--folder", folder, "--markdown", page, *options]
        monkeypatch.setattr(sys, "argv", [str(each) for each in command])
        study.main()  # type: ignore[attr-defined]
        return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}, page.read_text()

    return run


def test_the_prediction_ranks_neurons_as_the_true_increase_of_the_distillation_loss_does(results: Any) -> None:
    found, page = results(prediction, "--neurons", "20", "--images", "500")
    (both,) = found.values()
    assert both.keys() == prediction.LOSSES.keys()
    predicted, true = both["distillation"]["predicted"], both["distillation"]["true"]
    assert len(predicted) == len(true) == 20
    assert prediction.rank_correlation(predicted, true) > 0.8
    assert "| distillation | 20 |" in page


def test_contenders_meet_the_budget_and_are_not_trained_again(results: Any, capsys: pytest.CaptureFixture[str]) -> None:
    contenders = ["--contenders", "saliency", "contribution", "narrower"]
    options = ["--epochs", "1", "--budgets", "0.5", "--seeds", "0", "--at-once", "saliency", *contenders]
    found, page = results(shrinking, *options)
    original = found.pop("original")
    assert found.keys() == {"at once, saliency, 0.5", *(f"{each}, 0.5, seed 0" for each in contenders[1:])}
    for result in found.values():
        assert 0.3 * original["macs"] < result["macs"] <= 0.5 * original["macs"]
    assert page.count("| 50% of MACs |") == 4
    capsys.readouterr()
    assert results(shrinking, *options)[1] == page
    assert "processor_seconds" not in capsys.readouterr().out


def test_settings_are_compared_on_held_out_images(results: Any) -> None:
    changes = ["student.epochs=1,student.width=16", "student.epochs=1,distillation.alpha=0.5"]
    found, page = results(recipe_search, "--validation", "300", "--stage", "kddp", "--changes", *changes)
    assert found.keys() == {f"kddp {change}, seed 0" for change in changes}
    narrow, standard = (found[f"kddp {change}, seed 0"] for change in changes)
    assert narrow["parameters"] < standard["parameters"]
    assert 300 * narrow["accuracy"] == pytest.approx(round(300 * narrow["accuracy"]))  # of 300 images
    width = sum(narrow["widths"].values())
    assert f"| kddp | epochs=1, width=16 | {100 * narrow['accuracy']:.2f} | {width} |" in page


def test_a_search_without_held_out_images_is_refused(results: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        results(recipe_search)
    assert "--validation: expected" in capsys.readouterr().err


def test_a_change_may_hold_numbers_texts_flags_and_lists() -> None:
    standard = preset("cifar10", "default")
    new = changed(standard, "seed=3,student.channels=[8, 16],compile=true,distillation.alpha=0.5,student.select=best")
    assert (new.seed, new.student.channels, new.compile) == (3, (8, 16), True)
    assert (new.distillation.alpha, new.student.select) == (0.5, "best")
    assert changed(standard, "") == standard
