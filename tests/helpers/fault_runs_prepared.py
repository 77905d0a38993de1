"""Imported once by the process that forks the runs of fault_runs.py."""

import fault_calls  # noqa: F401
import pytest  # noqa: F401  # the process of the tests has imported it too
from fault_runs import quicken

quicken()
