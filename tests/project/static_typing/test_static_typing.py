"""The types of the public names, as `mypy --strict` shows them to a user: right programs pass, mistakes are found."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import kddp_ext

HERE = Path(__file__).parent
PROGRAMS = ("user_program.py", "user_integrations.py", "user_mistakes.py")

needs_mypy = pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")


def environment():
    """Where mypy finds the package: by itself where it is installed, and there it wants no path."""
    folder = Path(kddp_ext.__file__).parent.parent
    return {**os.environ} if folder.name == "site-packages" else os.environ | {"MYPYPATH": str(folder)}


@pytest.fixture(scope="module")
def errors(request):
    """What mypy finds in all programs, as (program, line, code). PyTorch is read once for all; that takes seconds."""
    cache = request.config.cache.mkdir("mypy") if hasattr(request.config, "cache") else os.devnull
    ended = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", HERE / "mypy.ini", "--cache-dir", cache, *PROGRAMS],
        cwd=HERE,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr  # user_mistakes.py has errors
    found = re.findall(r"^(\w+\.py):(\d+): error: .*\[([\w-]+)\]$", ended.stdout, re.MULTILINE)
    assert f"Found {len(found)} errors" in ended.stdout, ended.stdout
    return {(program, int(line), code) for program, line, code in found}


@needs_mypy
def test_a_right_program_has_no_errors(errors):
    assert not [error for error in errors if error[0] != "user_mistakes.py"]


@needs_mypy
def test_mistakes_are_found(errors):
    lines = (HERE / "user_mistakes.py").read_text().splitlines()
    expected = {
        ("user_mistakes.py", number, line.rpartition("# error: ")[2])
        for number, line in enumerate(lines, start=1)
        if "# error: " in line
    }
    assert errors == expected


def test_the_package_says_that_it_is_typed():
    assert (Path(kddp_ext.__file__).parent / "py.typed").exists()


def test_the_right_program_runs():
    runpy.run_path(str(HERE / "user_program.py"), run_name="__main__")
