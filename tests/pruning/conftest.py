import pytest

from kddp_ext.pruning import pruner
from kddp_ext.pruning.tracing.find import find_neurons

_traces = {}


@pytest.fixture
def one_trace_each(monkeypatch):
    """Trace each architecture once: models of the same repr have the same trace."""

    def remembered(model, example_inputs):
        if repr(model) not in _traces:
            _traces[repr(model)] = find_neurons(model, example_inputs)
        return _traces[repr(model)]

    monkeypatch.setattr(pruner, "find_neurons", remembered)
