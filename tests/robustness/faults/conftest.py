"""What a run that nothing happened to leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fault_runs import ending, shorten, start


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs with a finished one; to be read only."""
    runs = tmp_path_factory.mktemp("whole")
    ended = start(runs, prepare=shorten).wait()
    assert ended.code == 0, ended.err
    return runs


@pytest.fixture(scope="session")
def expected(whole: Path) -> dict[str, Any]:
    """All that a run leaves."""
    return ending(whole)
