"""The zoo's networks with random parameters, and their traces, which are made once."""

import functools

import torch
from torch import nn

from kddp_ext.pruning.attention import with_removable_heads
from kddp_ext.pruning.tracing.find import find_neurons

from . import STRUCTURES, randomise_


def build(name, dtype=torch.float32):
    """The same network at every call."""
    torch.manual_seed(0)
    model = STRUCTURES[name].build().to(dtype)
    randomise_(model, 1)
    return as_traced(model)


def as_traced(model):
    """The model with the classes that tracing gives its modules; copies of it lose them."""
    with with_removable_heads(model):
        return model


def cast(inputs, dtype):
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def traced(name, streams="exact"):
    return _traced(name, streams)


@functools.cache
def _traced(name, streams):
    return find_neurons(build(name), STRUCTURES[name].inputs(), streams=streams)


def without_dropout(model, monkeypatch):
    """The model, whose forward in training mode now draws no random numbers."""
    monkeypatch.setattr(nn.functional, "dropout", lambda x, *_, **__: x)
    attention = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional,
        "scaled_dot_product_attention",
        lambda *args, dropout_p=0.0, **options: attention(*args, **options),
    )
    for module in model.modules():
        for attribute in ("p", "dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    return model
