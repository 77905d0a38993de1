"""If the disk is full or read-only, one line names the file, and nothing is lost."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fault_preparations import full_disk_from, limit_files, without_privileges
from fault_runs import Ended, shorten, start
from run_files import differences, ending, unfinished_files

from kddp_ext.workflow.tensorboard import write_events


def resumed(runs: Path, prepare: Callable[[], object] = shorten) -> dict[str, Any]:
    ended = start(runs, "--resume", prepare=prepare).wait()
    assert ended.code == 0, ended.err
    assert not unfinished_files(runs)
    return ending(runs)


def assert_one_line(ended: Ended, *parts: str) -> None:
    """Check that it ended with code 1 and one line that has these parts."""
    assert ended.code == 1, ended
    assert ended.err.startswith("kddp run: "), ended.err
    assert ended.err.count("\n") == 1, ended.err
    assert all(part in ended.err for part in parts), ended.err


# Of about 300 calls: in the first file, in a checkpoint, and while a student trains.
@pytest.mark.parametrize("call", [4, 33, 150])
def test_a_disk_that_is_full_from_some_call_on(tmp_path: Path, expected: dict[str, Any], call: int) -> None:
    ended = start(tmp_path, prepare=partial(full_disk_from, call)).wait()
    assert_one_line(ended, f"{tmp_path}/", "No space left on device")
    assert not unfinished_files(tmp_path)
    assert not differences(resumed(tmp_path), expected)


def test_a_file_that_grows_larger_than_the_system_allows(tmp_path: Path, expected: dict[str, Any]) -> None:
    ended = start(tmp_path, prepare=limit_files).wait()
    assert_one_line(ended, f"cannot write {tmp_path}/run/teacher/checkpoint.pt: File too large")
    assert not unfinished_files(tmp_path)
    assert not differences(resumed(tmp_path), expected)


@contextmanager
def mounted(path: Path, options: str) -> Iterator[None]:
    """Mount a small file system at `path`."""
    path.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(path)]
    try:
        made = subprocess.run(command, check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        made = False
    if not made:
        pytest.skip("not allowed to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_small_disk(tmp_path: Path, expected: dict[str, Any]) -> None:
    runs = tmp_path / "disk"
    with mounted(runs, "size=80k"):
        ended = start(runs, prepare=shorten, output=tmp_path).wait()
        assert_one_line(ended, f"cannot write {runs}/", "No space left on device")
        assert not unfinished_files(runs)
        kept = {path: path.read_bytes() for path in runs.rglob("checkpoint.pt")}
        assert kept
        again = start(runs, "--resume", prepare=shorten, output=tmp_path).wait()
        assert_one_line(again, "No space left on device")
        assert all(path.read_bytes() == content for path, content in kept.items())
        subprocess.run(["mount", "-o", "remount,size=10m", str(runs)], check=True)
        assert not differences(resumed(runs), expected)


def test_a_disk_that_is_full_where_event_files_go(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    folder = tmp_path / "tensorboard"
    with mounted(folder, "size=4k"):
        (folder / "all there is").write_bytes(bytes(4096))
        with pytest.raises(OSError, match=f"cannot write {folder}: No space left"):
            write_events(folder, [], 1)
    assert capfd.readouterr().err == ""


def test_a_disk_that_is_read_only(tmp_path: Path) -> None:
    runs = tmp_path / "disk"
    with mounted(runs, "size=1m"):
        (runs / "kept").write_text("")
        subprocess.run(["mount", "-o", "remount,ro", str(runs)], check=True)
        ended = start(runs, output=tmp_path).wait()
        assert_one_line(ended, f"{runs}/run: Read-only file system")
        assert os.listdir(runs) == ["kept"]


def test_folders_without_permission(tmp_path: Path) -> None:
    runs, closed = tmp_path / "runs", tmp_path / "closed"
    for folder in (runs, closed):
        folder.mkdir(mode=0o555)
        folder.chmod(0o555)
    ended = start(runs, prepare=without_privileges, output=tmp_path).wait()
    assert_one_line(ended, f"{runs}/run: Permission denied")
    assert not list(runs.iterdir())

    runs.chmod(0o777)
    closed.chmod(0o000)
    data = ["--dataset", "fashion-mnist", "--data-dir", str(closed)]
    ended = start(runs, *data, prepare=without_privileges, output=tmp_path).wait()
    assert ended.code in (1, 2)
    assert str(closed) in ended.err
    assert ended.err.count("\n") == 1
