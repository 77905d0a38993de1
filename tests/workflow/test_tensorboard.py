"""`--tensorboard` writes each epoch exactly once, however often the run was interrupted."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from workflow_ranks import KilledError, dies_after

from kddp_ext.workflow import train
from kddp_ext.workflow.cli import main
from kddp_ext.workflow.config import RunConfig
from kddp_ext.workflow.folder import RunFolder
from kddp_ext.workflow.jobs import STAGES
from kddp_ext.workflow.tensorboard import scalars


@pytest.fixture(scope="module")
def config(small: RunConfig) -> RunConfig:
    return dataclasses.replace(
        small,
        teacher=dataclasses.replace(small.teacher, epochs=2),
        student=dataclasses.replace(small.student, epochs=2),
    )


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Each curve's steps and values, as TensorBoard reads them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_events_are_the_metrics(run: Path, stage: str, images: int) -> None:
    folder = RunFolder(run)
    curves = read_events(folder.tensorboard(stage))
    epochs = folder.read_epochs(stage)
    expected = [scalars(metrics, images) for metrics in epochs]
    assert curves.keys() == expected[0].keys()
    for tag, points in curves.items():
        assert [step for step, _ in points] == [metrics["epoch"] for metrics in epochs], tag
        assert [value for _, value in points] == pytest.approx([values[tag] for values in expected], rel=1e-6), tag


def test_events_hold_each_epoch_once(
    config: RunConfig, tmp_path: Path, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    path = tmp_path / "run"
    # Killed in the teacher's second epoch, then in that of scratch, which starts without event files.
    for epochs, wanted in ((1, True), (2, False)):
        with monkeypatch.context() as patch:
            patch.setattr(train, "train_epoch", dies_after(train.train_epoch, epochs))
            with pytest.raises(KilledError):
                run(path, config, resume=True, tensorboard=wanted)
        if wanted:
            assert_events_are_the_metrics(path, "teacher", images=896)  # 7 batches of 128
    assert not RunFolder(path).tensorboard("scratch").exists()
    run(path, config, resume=True, tensorboard=True)
    for stage in STAGES[1:]:
        assert_events_are_the_metrics(path, stage, images=896)
    assert "size/width" in read_events(RunFolder(path).tensorboard("kddp"))


def test_a_missing_tensorboard_is_named_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(["run", "--tensorboard", "--runs-dir", str(tmp_path), "--threads", "1"]) == 2
    assert capsys.readouterr().err == (
        "kddp run: --tensorboard: needs the package tensorboard (import of torch.utils.tensorboard halted; None in "
        "sys.modules); pip install 'kddp_ext[tensorboard]'\n"
    )
    assert not list(tmp_path.iterdir())
