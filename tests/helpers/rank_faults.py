"""Faults of one rank of rank_cases.py: each spoils a prepared student and returns a function that repairs it."""

from dataclasses import replace
from functools import partial

import torch

from kddp_ext.pruning import compaction
from kddp_ext.pruning import pruner as pruner_module


def other_weights(prepared):
    weight = prepared.student[0].weight
    before = weight.detach().clone()
    weight.data[2, 1] += 1e-12
    return partial(weight.data.copy_, before)


def other_threshold(prepared):
    before = prepared.pruner.settings
    prepared.pruner.settings = replace(before, threshold=0.25)
    return partial(setattr, prepared.pruner, "settings", before)


def of_the_state(change):
    """A fault that `change(pruner)` makes, and that the previous state repairs."""

    def spoil(prepared):
        repair = partial(prepared.pruner.load_state_dict, prepared.pruner.state_dict())
        change(prepared.pruner)
        return repair

    return spoil


def change_counters(pruner):
    state = pruner.state_dict()
    state["inactive_checks"]["2"][4] = 1
    pruner.load_state_dict(state)


def poison_statistics(pruner):
    pruner.statistics["2"].values[1, 3] = torch.nan


def unknown_optimizer_state(prepared):
    state = prepared.optimizer.state[prepared.student[2].weight]
    state["history"] = [1.0]
    return partial(state.pop, "history")


def frozen_model(prepared):
    prepared.student.requires_grad_(False)
    return partial(prepared.student.requires_grad_, True)


def failing(owner, name, call):
    """A fault where a function raises after its k-th call."""

    def spoil(prepared):
        function, left = getattr(owner, name), call

        def fail_once(*arguments, **options):
            nonlocal left
            result = function(*arguments, **options)
            left -= 1
            if left == 0:
                raise ValueError(f"injected into {name}")
            return result

        setattr(owner, name, fail_once)
        return partial(setattr, owner, name, function)

    return spoil


SPOILS = {
    "other_weights": other_weights,
    "other_threshold": other_threshold,
    "other_steps": of_the_state(lambda pruner: pruner.step()),
    "other_counters": of_the_state(change_counters),
    "nan_statistics": of_the_state(poison_statistics),
    "no_samples": of_the_state(lambda pruner: pruner.reset()),
    "unknown_optimizer_state": unknown_optimizer_state,
    "frozen_model": frozen_model,
    "failing_swap": failing(compaction, "set_data", call=5),
    "failing_rewrap": failing(pruner_module, "rewrap", call=1),
}
