"""A run that is killed or interrupted, or whose output cannot be written."""

from __future__ import annotations

import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fault_preparations import broken_pipe, full_stderr, full_stdout, ignore_interrupts, killed_at
from fault_runs import Process, phase_of, shorten, start
from run_files import differences, ending, unfinished_files

from kddp_ext.workflow.cli import main


def test_killed_again_and_again_in_the_middle_of_its_writes(tmp_path: Path, expected: dict[str, Any]) -> None:
    # Of about 300 calls that change files: in the first file, in a checkpoint, in the metrics after it.
    left = []
    for call in (4, 24, 33, 51):
        ended = start(tmp_path, "--resume", prepare=partial(killed_at, call)).wait()
        assert ended.code == -signal.SIGKILL
        left += unfinished_files(tmp_path)
    assert left  # otherwise no kill fell into a write
    assert start(tmp_path, "--resume", prepare=shorten).wait().code == 0
    assert not unfinished_files(tmp_path)
    assert not differences(ending(tmp_path), expected)


def wait_for(process: Process, runs: Path, phase: str) -> None:
    end = time.monotonic() + 60
    while phase_of(runs) != phase:
        assert process.running(), process.wait()
        assert time.monotonic() < end
        time.sleep(0.002)


def test_ctrl_c_and_sigterm_say_how_to_resume(tmp_path: Path, expected: dict[str, Any]) -> None:
    for number, phase, options in ((signal.SIGINT, "teacher", []), (signal.SIGTERM, "kddp", ["--resume"])):
        process = start(tmp_path, *options, prepare=shorten)
        wait_for(process, tmp_path, phase)
        process.signal(number)
        ended = process.wait()
        assert ended.code == 128 + number, ended
        assert ended.err.startswith("Interrupted. Finished epochs are kept; continue with: kddp run --runs-dir ")
        assert ended.err.endswith(" --resume\n")
        assert ended.err.count("\n") == ended.err.count("--resume") == 1
        assert not unfinished_files(tmp_path)
    assert start(tmp_path, "--resume", prepare=shorten).wait().code == 0
    assert not differences(ending(tmp_path), expected)


def test_an_ignored_ctrl_c_stays_ignored(tmp_path: Path) -> None:
    process = start(tmp_path, prepare=ignore_interrupts)
    wait_for(process, tmp_path, "teacher")
    process.signal(signal.SIGINT)
    wait_for(process, tmp_path, "kd")
    process.signal(signal.SIGKILL)
    assert process.wait().code == -signal.SIGKILL


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (full_stdout, "kddp run: cannot write to stdout: No space left on device\n"),
        (broken_pipe, ""),  # as other programs do when `head` has read enough
    ],
)
def test_a_stdout_that_cannot_be_written_to(tmp_path: Path, prepare: Any, message: str) -> None:
    ended = start(tmp_path, prepare=prepare).wait()
    assert (ended.code, ended.err) == (1, message)


def test_a_stderr_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    ended = start(tmp_path, prepare=full_stderr).wait()
    assert (ended.code, ended.err) == (2, "")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["run", "--help"]], ids=" ".join)
def test_help_that_cannot_be_printed(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert main(arguments) == 1
    assert capfd.readouterr().err.endswith(": No space left on device\n")
