"""Kills runs, resumes them, and compares how they end, bit for bit, with an undisturbed run:

    python tests/robustness/kill_and_resume.py [--kills 100] [--seed 0] [--signal KILL]      at random moments
    … --at-every-call kill                      at each call that changes a file
    … --at-every-call full-disk                 the same, and all calls after it fail
    … --sweep-processes 2                       random ones of several processes that share a sweep, again and again

Random moments are spread evenly over the length of an undisturbed run. Every second run is killed several times, each
time after a resume. Afterwards the folder tells into which phase the kill fell.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from fault_preparations import full_disk_from, killed_at
from fault_runs import OPTIONS, PHASES, Process, Run, nothing, phase_of, shorten, start
from run_files import differences, ending, unfinished_files

from kddp_ext.workflow import runs as workflow_runs

_MOST_KILLS = 5  # of one run
_MOST_SWEEP_KILLS = 12  # of one sweep
SWEEP = [*OPTIONS, "--seeds", "0", "1", "--widths", "8", "--l1-weights", "0.01", "--ablations", "no-teacher"]
SWEEP += ["--name", "sweep"]
AT_CALL = {"kill": killed_at, "full-disk": full_disk_from}


def kill_after(process: Process, seconds: float, number: signal.Signals) -> bool:
    """Send the signal after this time; returns whether the run was still running."""
    end = time.monotonic() + seconds
    while process.running() and (time.monotonic() < end or (number != signal.SIGKILL and not process.has_printed())):
        time.sleep(0.0005)  # before it has printed its handlers may not be set
    process.signal(number)
    return process.wait().code != 0


def check_goodbye(process: Process, number: signal.Signals) -> None:
    """Check that an interrupted run prints one line that says how to continue."""
    ended = process.wait()
    if number == signal.SIGKILL:
        assert ended.code == -signal.SIGKILL
        return
    assert ended.code == 128 + number, ended
    assert ended.err.count("\n") == 1, ended.err
    assert "continue with: kddp run" in ended.err, ended.err


def kill_once_or_more(runs: Path, moments: list[float], number: signal.Signals) -> tuple[list[str], int]:
    """Start a run and kill it; returns the phases of the kills, and how many fell into the middle of a write."""
    fell: list[str] = []
    in_a_write = 0
    for moment in moments:
        process = start(runs, *(["--resume"] if fell else []))
        if not kill_after(process, moment, number):
            break
        check_goodbye(process, number)
        fell.append(phase_of(runs))
        in_a_write += bool(unfinished_files(runs))
    return fell, in_a_write


def kill_at_random(folder: Path, options: argparse.Namespace) -> int:
    """Kill runs at random moments until there are enough kills; returns the exit code."""
    for name in ("first", "alone"):  # the first run also waits until the process that forks runs has started
        started = time.monotonic()
        (folder / name).mkdir()
        assert start(folder / name).wait().code == 0
    length = time.monotonic() - started
    expected = ending(folder / "alone")
    draw = random.Random(options.seed)
    killed: Counter[str] = Counter()
    same = run = again = in_writes = 0
    while killed.total() < options.kills:
        runs = folder / f"run-{run}"
        runs.mkdir()
        moments = [draw.uniform(0, length) for _ in range(draw.randint(2, _MOST_KILLS) if run % 2 else 1)]
        fell, in_a_write = kill_once_or_more(runs, moments, signal.Signals[f"SIG{options.signal}"])
        different = finish(runs, expected)
        print(f"{', '.join(fell) or 'it had ended'}: {', '.join(different) or 'identical ending'}", flush=True)
        killed.update(fell)
        run, same, again, in_writes = run + 1, same + (not different), again + (len(fell) > 1), in_writes + in_a_write
    print(f"kills by phase: {', '.join(f'{phase} {killed[phase]}' for phase in PHASES)}")
    print(f"{killed.total()} kills, {in_writes} of them in the middle of a write")
    print(f"{run} runs, {again} of them killed again while resumed; {same} endings identical to the undisturbed run")
    return 0 if same == run else 1


def finish(runs: Path, expected: dict[str, Any], prepare: Callable[[], None] = nothing) -> list[str]:
    """Resume the run in `runs`; returns the names of the files that differ in the end."""
    ended = start(runs, "--resume", prepare=prepare).wait()
    if ended.code:
        return [f"it ended with {ended.code}: {ended.err}"]
    return [*differences(ending(runs), expected), *map(str, unfinished_files(runs))]


def check_end(process: Process, fault: str) -> bool:
    """Whether the run met the fault. If the disk was full, one line must name a file."""
    ended = process.wait()
    if ended.code == 0:
        return False
    if fault == "kill":
        assert ended.code == -signal.SIGKILL, ended
        return True
    assert ended.code == 1, ended
    assert ended.err.startswith("kddp run: "), ended
    assert ended.err.endswith("No space left on device\n"), ended
    assert ended.err.count("\n") == 1, ended
    assert "/" in ended.err, f"no file is named: {ended.err}"
    return True


def fault_at_calls(folder: Path, options: argparse.Namespace) -> int:
    """Have a run meet a fault at each of its calls that change a file; returns the exit code."""
    alone = folder / "alone"
    alone.mkdir()
    finish(alone, {}, shorten)
    expected = ending(alone)
    same = met = 0
    phases: Counter[str] = Counter()
    for number in itertools.count(1):
        runs = folder / "run"
        runs.mkdir()
        if not check_end(start(runs, prepare=partial(AT_CALL[options.at_every_call], number)), options.at_every_call):
            break  # there are no more calls
        met += 1
        phases[phase_of(runs)] += 1
        left = unfinished_files(runs) if options.at_every_call == "full-disk" else []
        different = [*map(str, left), *finish(runs, expected, shorten)]
        same += not different
        if different:
            print(f"call {number}: {', '.join(different)}", flush=True)
        shutil.rmtree(runs)
    print(f"{options.at_every_call} by phase: {', '.join(f'{phase} {phases[phase]}' for phase in PHASES)}")
    print(f"{met} runs, one for each call; {same} endings identical to the undisturbed run")
    return 0 if same == met else 1


def wait_briefly() -> None:
    """Look for work more often than every two seconds."""
    workflow_runs._WAIT = 0.02


def start_sweep(runs: Path, number: int, *more: str) -> Process:
    """Start the process with this number on the sweep in `runs`."""
    output = runs / f"output {number}"
    output.mkdir(parents=True, exist_ok=True)
    return Process(Run(("--runs-dir", str(runs), *SWEEP, *more), wait_briefly, "sweep"), output)


def kill_some(runs: Path, kills: int, processes: int, longest: float, draw: random.Random) -> int:
    """Start a sweep, kill its processes and start them again; returns how many were killed while they worked."""
    working = [start_sweep(runs, 0)]
    while not (runs / "sweep" / "config.json").exists() and working[0].running():
        time.sleep(0.001)
    working += [start_sweep(runs, number, "--resume") for number in range(1, processes)]
    killed = 0
    for _ in range(kills):
        time.sleep(draw.uniform(0, longest))
        number = draw.randrange(processes)
        working[number].signal(signal.SIGKILL)
        ended = working[number].wait()
        assert ended.code in (0, -signal.SIGKILL), ended
        killed += ended.code != 0
        working[number] = start_sweep(runs, number, "--resume")
    assert [process.wait().code for process in working] == [0] * processes
    return killed


def kill_sweeps(folder: Path, options: argparse.Namespace) -> int:
    """Kill processes of sweeps at random moments until there are enough kills; returns the exit code."""
    draw, started = random.Random(options.seed), time.monotonic()
    assert start_sweep(folder / "alone", 0).wait().code == 0
    longest = (time.monotonic() - started) / 12
    expected = ending(folder / "alone")
    killed = sweeps = same = 0
    while killed < options.kills:
        runs = folder / f"sweep-{sweeps}"
        now = kill_some(runs, draw.randint(4, _MOST_SWEEP_KILLS), options.sweep_processes, longest, draw)
        different = [*differences(ending(runs), expected), *map(str, unfinished_files(runs))]
        print(f"{now} kills: {', '.join(different) or 'identical ending'}", flush=True)
        killed, sweeps, same = killed + now, sweeps + 1, same + (not different)
    print(f"{killed} kills in {sweeps} sweeps; {same} endings identical to the undisturbed sweep")
    return 0 if same == sweeps else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--signal", choices=("KILL", "INT", "TERM"), default="KILL")
    parser.add_argument("--at-every-call", choices=AT_CALL)
    parser.add_argument("--sweep-processes", type=int, default=0, help="kill as many processes that share a sweep")
    options = parser.parse_args()
    kill = kill_sweeps if options.sweep_processes else fault_at_calls if options.at_every_call else kill_at_random
    with tempfile.TemporaryDirectory() as folder:
        return kill(Path(folder), options)


if __name__ == "__main__":
    sys.exit(main())
