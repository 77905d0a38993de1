"""Kills runs at random moments, resumes them, and compares how they end with a run that was left alone:

    python tests/kill_and_resume.py [--kills 20] [--seed 0]

Each run is killed once (SIGKILL), at a moment drawn evenly from the time that a whole run takes.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

STAGES = ("teacher", "scratch", "kd", "kddp")
OPTIONS = ["--teacher.channels", "8", "--teacher.epochs", "3", "--student.channels", "4", "--student.epochs", "6"]
OPTIONS += ["--student.width", "48", "--pruning.l1-weight", "0.02", "--pruning.threshold", "0.1", "--threads", "1"]
OPTIONS += ["--device", "cpu", "--augment", "True"]


def command(runs: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "kddp_ext", "run", "--name", "run", "--runs-dir", str(runs), *OPTIONS, *more]


def ending(runs: Path) -> dict[str, Any]:
    """All that a run leaves, but for times: report and picture, results, history of every epoch, all tensors."""
    run = runs / "run"
    left: dict[str, Any] = {name: (run / name).read_bytes() for name in ("config.json", "report.md", "report.png")}
    for stage in STAGES:
        left[f"{stage} result"] = (run / stage / "result.json").read_bytes()
        lines = (run / stage / "metrics.jsonl").read_text().splitlines()
        left[f"{stage} metrics"] = [without_times(json.loads(line)) for line in lines]
        state = torch.load(run / stage / "checkpoint.pt", weights_only=True)
        state["epochs"] = [without_times(epoch) for epoch in state["epochs"]]
        left[f"{stage} checkpoint"] = comparable(state)
    for stage in STAGES[1:]:
        left[f"{stage} student"] = (run / stage / "student.safetensors").stat().st_size
    return left


def without_times(epoch: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in epoch.items() if key != "seconds"}


def comparable(value: Any) -> Any:
    """Tensors as their bytes, so that == compares all of them."""
    if isinstance(value, torch.Tensor):
        whole = value.detach().contiguous().reshape(-1).view(torch.uint8)
        return (str(value.dtype), tuple(value.shape), whole.numpy().tobytes())
    if isinstance(value, dict):
        return {key: comparable(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [comparable(each) for each in value]
    return value


def killed_and_resumed(runs: Path, after: float) -> tuple[bool, dict[str, Any]]:
    """Whether the kill came before the end, and the ending."""
    process = subprocess.Popen(command(runs), cwd=runs, stdout=subprocess.DEVNULL)
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    killed = process.wait() == -signal.SIGKILL
    subprocess.run(command(runs, "--resume"), cwd=runs, stdout=subprocess.DEVNULL, check=True)
    return killed, ending(runs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder) / "alone"
        alone.mkdir()
        started = time.monotonic()
        subprocess.run(command(alone), cwd=alone, stdout=subprocess.DEVNULL, check=True)
        whole, expected = time.monotonic() - started, ending(alone)
        same = kills = attempts = 0
        while kills < options.kills:
            attempts += 1
            runs = Path(folder) / f"killed-{attempts}"
            runs.mkdir()
            after = moments.uniform(0, whole)
            killed, left = killed_and_resumed(runs, after)
            if not killed:  # it had ended already: another moment
                continue
            kills += 1
            different = [name for name in expected if left[name] != expected[name]]
            same += not different
            print(
                f"killed after {after:5.2f} of {whole:.2f} s: {', '.join(different) or 'the same ending'}", flush=True
            )
    print(f"{kills} kills, {same} endings identical to the run that was left alone")
    return 0 if same == kills else 1


if __name__ == "__main__":
    sys.exit(main())
