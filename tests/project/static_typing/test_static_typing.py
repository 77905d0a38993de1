"""The types of the public names, as `mypy --strict` shows them to a user: right programs pass, mistakes are found."""

import os
import re
from pathlib import Path

import pytest

import kddp_ext

HERE = Path(__file__).parent
PROGRAMS = ("user_program.py", "user_mistakes.py")


@pytest.fixture(scope="module")
def errors(request):
    """What mypy finds in all programs, as (program, line, code). PyTorch is read once for all; that takes seconds."""
    api = pytest.importorskip("mypy.api")
    cache = request.config.cache.mkdir("mypy") if hasattr(request.config, "cache") else os.devnull
    package = Path(kddp_ext.__file__).parent.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(HERE)
        if package.name != "site-packages":  # mypy finds an installed package by itself, and wants no path to it
            patch.setenv("MYPYPATH", str(package))
        output, problems, code = api.run(["--config-file", "mypy.ini", "--cache-dir", str(cache), *PROGRAMS])
    assert code == 1, output + problems  # user_mistakes.py has errors
    found = re.findall(r"^(\w+\.py):(\d+): error: .*\[([\w-]+)\]$", output, re.MULTILINE)
    assert f"Found {len(found)} errors" in output, output
    return {(program, int(line), code) for program, line, code in found}


def test_mypy_finds_all_mistakes_and_no_others(errors):
    lines = (HERE / "user_mistakes.py").read_text().splitlines()
    expected = {
        ("user_mistakes.py", number, line.rpartition("# error: ")[2])
        for number, line in enumerate(lines, start=1)
        if "# error: " in line
    }
    assert errors == expected


def test_the_package_says_that_it_is_typed():
    assert (Path(kddp_ext.__file__).parent / "py.typed").exists()
