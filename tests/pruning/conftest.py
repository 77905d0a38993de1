import pytest

from kddp_ext.pruning import pruner
from kddp_ext.pruning.tracing.find import find_neurons

_traces = {}


@pytest.fixture
def one_trace_each(monkeypatch):
    """Trace each architecture once: models of the same repr have the same trace."""

    def remembered(model, example_inputs, example_kwargs=None, *, streams="exact"):
        key = repr(model), streams
        if key not in _traces:
            _traces[key] = find_neurons(model, example_inputs, example_kwargs, streams=streams)
        return _traces[key]

    monkeypatch.setattr(pruner, "find_neurons", remembered)
