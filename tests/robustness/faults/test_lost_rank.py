"""If one of two processes is killed, the other one ends and says so, and the run can be resumed."""

from __future__ import annotations

import signal
import socket
import time
from functools import partial
from pathlib import Path

from fault_preparations import as_rank
from fault_runs import OPTIONS, Process, Run, phase_of
from run_files import differences, ending


def start_two(runs: Path, *more: str, killed_at: int | None = None) -> list[Process]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        output = runs / f"output {rank}"
        output.mkdir(parents=True, exist_ok=True)
        action = Run(("--runs-dir", str(runs), *OPTIONS, *more), partial(as_rank, rank, port, killed_at))
        processes.append(Process(action, output))
    return processes


def assert_lost(process: Process, rank: int) -> None:
    ended = process.wait()
    assert ended.code == 1, ended
    line = ended.err.splitlines()[-1]  # torch prints warnings before it
    assert line.startswith(f"kddp run: rank {rank}: another process has ended or cannot be reached (")
    assert line.endswith("). Finished epochs are kept; start all processes again with --resume")
    assert "Traceback" not in ended.err


def test_a_process_that_is_killed_ends_the_other_and_the_run_can_be_resumed(tmp_path: Path) -> None:
    alone, runs = tmp_path / "alone", tmp_path / "runs"
    assert [process.wait().code for process in start_two(alone)] == [0, 0]

    # Rank 0, which writes, is killed in the middle of a checkpoint; then rank 1 while a student trains.
    first, second = start_two(runs, killed_at=33)
    assert_lost(second, 1)
    assert first.wait().code == -signal.SIGKILL

    first, second = start_two(runs, "--resume")
    while phase_of(runs) != "kddp" and first.running():
        time.sleep(0.002)
    second.signal(signal.SIGKILL)
    assert_lost(first, 0)

    assert [process.wait().code for process in start_two(runs, "--resume")] == [0, 0]
    assert not differences(ending(runs), ending(alone))
