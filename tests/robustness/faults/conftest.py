"""What an undisturbed run leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fault_runs import shorten, start
from run_files import ending


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run. Tests only read it."""
    runs = tmp_path_factory.mktemp("whole")
    ended = start(runs, prepare=shorten).wait()
    assert ended.code == 0, ended.err
    return runs


@pytest.fixture(scope="session")
def expected(whole: Path) -> dict[str, Any]:
    """The content of its files."""
    return ending(whole)
