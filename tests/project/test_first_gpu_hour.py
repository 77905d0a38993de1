"""tools/first_gpu_hour.sh, with a device, a compiler and a Python that only record what they are asked."""

import os
import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "first_gpu_hour.sh"


@pytest.fixture
def run(tmp_path):
    def run(failing="nothing"):
        programs, calls = tmp_path / "bin", tmp_path / "calls"
        programs.mkdir()
        for name, output in (("nvidia-smi", "9.0"), ("nvcc", "release 13.0"), ("python", "a line")):
            (programs / name).write_text(
                f'#!/bin/sh\necho {name} "$*" >> {calls}\necho {output}\ncase "$*" in *"{failing}"*) exit 1; esac\n'
            )
            (programs / name).chmod(0o755)
        path = os.pathsep.join([str(programs), os.environ["PATH"]])
        done = subprocess.run(
            [SCRIPT, tmp_path / "report"], env={**os.environ, "PATH": path}, capture_output=True, text=True
        )
        return done, calls.read_text()

    return run


def test_all_steps_in_order(run, tmp_path):
    done, calls = run()
    assert done.returncode == 0, done.stdout + done.stderr
    steps = ["nvcc --version", "CMAKE_CUDA_ARCHITECTURES=90", "build_info()", "pytest -m cuda", "tests/loss", "--smoke",
             f"--json {tmp_path}/report/gpu.json"]  # fmt: skip
    places = [calls.index(step) for step in steps]
    assert places == sorted(places)
    assert f"Please send the folder {tmp_path}/report" in done.stdout
    assert len(list((tmp_path / "report").iterdir())) == len(steps)


def test_it_stops_at_what_fails(run, tmp_path):
    done, calls = run(failing="-m pytest -m cuda")
    assert done.returncode == 1
    assert "Stopped: streams graphs devices failed (the name of the test" in done.stdout
    assert f"Please send the folder {tmp_path}/report" in done.stdout
    assert "tests/loss" not in calls
    assert (tmp_path / "report" / "4-streams-graphs-devices.log").read_text() == "a line\n"


def test_the_limits_are_12_minutes_together():
    assert sum(map(int, re.findall(r"^step (\d+) ", SCRIPT.read_text(), re.MULTILINE))) <= 12 * 60
