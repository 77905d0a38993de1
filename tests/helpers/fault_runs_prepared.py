"""Imported once, by the process of which the runs of fault_runs.py are forks."""

import fault_calls  # noqa: F401
import pytest  # noqa: F401  # what the tests' own process began with is begun with in each fork
from fault_runs import quicken

quicken()
