"""Two processes that a library launches prune alike, inside DistributedDataParallel; see processes.py."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kddp_ext

SCRIPT = Path(__file__).with_name("processes.py")
LAUNCHER = {
    "lightning": [],  # it starts the other process itself
    "transformers": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
}


@pytest.mark.parametrize("library", LAUNCHER)
def test_both_processes_end_with_the_same_smaller_student(library, tmp_path):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    command = [sys.executable, *LAUNCHER[library], str(SCRIPT), library]
    environment = {**os.environ, "PYTHONPATH": str(Path(kddp_ext.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    results = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert len(results) == 2, done.stdout + done.stderr
    assert results[0] == results[1]
    width, steps, same = results[0]
    assert int(width) < 16
    assert steps == "2"
    assert same == "True"
