"""Kills processes that share a sweep, and compares what is left, bit for bit, with an undisturbed sweep:

    python tests/robustness/kill_sweeps.py [--kills 60] [--seed 0] [--processes 2]

Several processes work on a sweep. Random ones are killed at random moments and started again with --resume; after some
kills they may finish. New sweeps follow until there were enough kills.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from fault_runs import OPTIONS, Process, Run
from run_files import differences, ending, unfinished_files

from kddp_ext.workflow import runs as workflow_runs

SWEEP = [*OPTIONS, "--seeds", "0", "1", "--widths", "8", "--l1-weights", "0.01", "--ablations", "no-teacher"]
SWEEP += ["--name", "sweep"]
_FEWEST_KILLS, _MOST_KILLS = 4, 12  # of one sweep


def wait_briefly() -> None:
    """Look for work more often than every two seconds."""
    workflow_runs._WAIT = 0.02


def start(runs: Path, number: int, *more: str) -> Process:
    """Start the process with this number on the sweep in `runs`."""
    output = runs / f"output {number}"
    output.mkdir(parents=True, exist_ok=True)
    return Process(Run(("--runs-dir", str(runs), *SWEEP, *more), wait_briefly, "sweep"), output)


def kill_some(runs: Path, kills: int, processes: int, longest: float, draw: random.Random) -> int:
    """Start a sweep, kill its processes and start them again; returns how many were killed while they worked."""
    working = [start(runs, 0)]
    while not (runs / "sweep" / "config.json").exists() and working[0].running():
        time.sleep(0.001)
    working += [start(runs, number, "--resume") for number in range(1, processes)]
    killed = 0
    for _ in range(kills):
        time.sleep(draw.uniform(0, longest))
        number = draw.randrange(processes)
        working[number].signal(signal.SIGKILL)
        ended = working[number].wait()
        assert ended.code in (0, -signal.SIGKILL), ended
        killed += ended.code != 0
        working[number] = start(runs, number, "--resume")
    for process in working:
        ended = process.wait()
        assert ended.code == 0, ended
    return killed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.monotonic()
        ended = start(folder / "alone", 0).wait()
        assert ended.code == 0, ended
        longest = (time.monotonic() - started) / 12
        expected = ending(folder / "alone")
        killed = sweeps_killed = same = 0
        while killed < options.kills:
            runs = folder / f"sweep-{sweeps_killed}"
            now = kill_some(runs, draw.randint(_FEWEST_KILLS, _MOST_KILLS), options.processes, longest, draw)
            different = [*differences(ending(runs), expected), *map(str, unfinished_files(runs))]
            print(f"{now} kills: {', '.join(different) or 'identical ending'}", flush=True)
            killed, sweeps_killed, same = killed + now, sweeps_killed + 1, same + (not different)
    print(f"{killed} kills in {sweeps_killed} sweeps; {same} endings identical to the undisturbed sweep")
    return 0 if same == sweeps_killed else 1


if __name__ == "__main__":
    sys.exit(main())
