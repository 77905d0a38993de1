"""Kills runs, resumes them, and compares how they end, bit for bit, with an undisturbed run:

    python tests/robustness/kill_and_resume.py [--kills 100] [--seed 0] [--signal KILL]      at random moments
    … --at-every-call kill [--from 1] [--to N]  at each call that changes a file
    … --at-every-call full-disk [--from 1] [--to N] and all calls after it fail

The random moments cover all phases of a run equally: a kill waits until the run's folder shows that the phase has
begun, and then for a part of its length. Every second run is killed several times, each time after a resume.
Afterwards the folder tells into which phase the kill fell.
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
from fault_runs import PHASES, Process, nothing, phase_of, shorten, start
from run_files import differences, ending, unfinished_files

_MOST_KILLS = 5  # of one run
AT_CALL = {"kill": killed_at, "full-disk": full_disk_from}


def follow(process: Process, runs: Path) -> dict[str, float]:
    """When each phase of an undisturbed run began, and under "end" when the run ended, in seconds."""
    began, started = {}, time.monotonic()
    while process.running():
        began.setdefault(phase_of(runs), time.monotonic() - started)
        time.sleep(0.001)
    return {**began, "end": time.monotonic() - started}


def seconds(began: dict[str, float]) -> dict[str, float]:
    """How long each phase took. The logits are computed between the epochs of kd."""
    order = [phase for phase in PHASES if phase != "logits"] + ["end"]
    took = {phase: began[after] - began[phase] for phase, after in itertools.pairwise(order)}
    return {**took, "logits": 0.01}


def kill_in(process: Process, runs: Path, phase: str, after: float, number: signal.Signals) -> bool:
    """Send the signal `after` seconds into `phase` or a later one; returns whether the run was still running."""
    while process.running() and PHASES.index(phase_of(runs)) < PHASES.index(phase):
        time.sleep(0.0005)
    end = time.monotonic() + after
    while process.running() and time.monotonic() < end:
        time.sleep(0.0005)
    while number != signal.SIGKILL and process.running() and not process.has_printed():
        time.sleep(0.0005)  # before that the handlers may not be set
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


class Moments:
    """Draws where to kill: every phase once before any comes again.

    Args:
        seed: seed of the draws.
        took: the seconds that each phase takes.
    """

    def __init__(self, seed: int, took: dict[str, float]) -> None:
        self._draw, self._took, self._left = random.Random(seed), took, list[str]()

    def kills(self, run: int) -> int:
        """How often to kill the run with this number."""
        return self._draw.randint(2, _MOST_KILLS) if run % 2 else 1

    def after(self, now: str) -> tuple[str, float] | None:
        """A phase, `now` or later, and how many seconds to wait in it; None if every such phase has been drawn."""
        if not self._left:
            self._left = self._draw.sample(PHASES, len(PHASES))
        later = [phase for phase in self._left if PHASES.index(phase) >= PHASES.index(now)]
        if not later:
            return None
        self._left.remove(later[0])
        return later[0], self._draw.uniform(0, self._took[later[0]])


def kill_once_or_more(runs: Path, kills: int, moments: Moments, number: signal.Signals) -> tuple[list[str], int]:
    """Start a run and kill it; returns the phases of the kills, and how many fell into the middle of a write."""
    fell: list[str] = []
    in_a_write = 0
    while len(fell) < kills and (moment := moments.after(phase_of(runs))) is not None:
        process = start(runs, *(["--resume"] if fell else []))
        if not kill_in(process, runs, *moment, number):
            break
        check_goodbye(process, number)
        fell.append(phase_of(runs))
        in_a_write += bool(unfinished_files(runs))
    return fell, in_a_write


def kill_at_random(folder: Path, options: argparse.Namespace) -> int:
    """Kill runs at random moments until there are enough kills; returns the exit code."""
    alone = folder / "alone"
    alone.mkdir()
    moments = Moments(options.seed, seconds(follow(start(alone), alone)))
    expected = ending(alone)
    killed: Counter[str] = Counter()
    same = run = again = in_writes = 0
    while killed.total() < options.kills:
        runs = folder / f"run-{run}"
        runs.mkdir()
        fell, in_a_write = kill_once_or_more(runs, moments.kills(run), moments, signal.Signals[f"SIG{options.signal}"])
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
    for number in range(options.first, options.last + 1):
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--signal", choices=("KILL", "INT", "TERM"), default="KILL")
    parser.add_argument("--at-every-call", choices=AT_CALL)
    parser.add_argument("--from", type=int, default=1, dest="first", help="the first of the calls")
    parser.add_argument("--to", type=int, default=10**6, dest="last", help="the last")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return (fault_at_calls if options.at_every_call else kill_at_random)(Path(folder), options)


if __name__ == "__main__":
    sys.exit(main())
