"""Faults that one rank of rank_cases.py may have: each spoils a prepared student and returns what mends it."""

from dataclasses import replace

import torch

from kddp_ext.pruning import compaction
from kddp_ext.pruning import pruner as pruner_module


def other_weights(prepared):
    before = prepared.student[0].weight.detach().clone()
    with torch.no_grad():
        prepared.student[0].weight[2, 1] += 1e-12

    def restore():
        with torch.no_grad():
            prepared.student[0].weight.copy_(before)

    return restore


def other_threshold(prepared):
    before = prepared.pruner.settings
    prepared.pruner.settings = replace(before, threshold=0.25)
    return lambda: setattr(prepared.pruner, "settings", before)


def other_steps(prepared):
    before = prepared.pruner.state_dict()
    prepared.pruner.step()
    return lambda: prepared.pruner.load_state_dict(before)


def other_counters(prepared):
    before, changed = prepared.pruner.state_dict(), prepared.pruner.state_dict()
    changed["inactive_checks"]["2"][4] = 1
    prepared.pruner.load_state_dict(changed)
    return lambda: prepared.pruner.load_state_dict(before)


def nan_statistics(prepared):
    before = prepared.pruner.state_dict()
    prepared.pruner.statistics["2"].values[1, 3] = torch.nan
    return lambda: prepared.pruner.load_state_dict(before)


def no_samples(prepared):
    before = prepared.pruner.state_dict()
    prepared.pruner.reset()
    return lambda: prepared.pruner.load_state_dict(before)


def unknown_optimizer_state(prepared):
    state = prepared.optimizer.state[prepared.student[2].weight]
    state["history"] = [1.0]
    return lambda: state.pop("history")


def frozen_model(prepared):
    prepared.student.requires_grad_(False)
    return lambda: prepared.student.requires_grad_(True)


class FailsOnce:
    """In place of a function: raises before or after its k-th call, and then works."""

    def __init__(self, owner, name, call):
        self.function, self.owner, self.name, self.left = getattr(owner, name), owner, name, call
        setattr(owner, name, self)

    def __call__(self, *arguments, **options):
        result = self.function(*arguments, **options)
        self.left -= 1
        if self.left == 0:
            raise ValueError(f"injected into {self.name}")
        return result

    def restore(self):
        setattr(self.owner, self.name, self.function)


def failing_swap(prepared):
    return FailsOnce(compaction, "set_data", call=5).restore


def failing_rewrap(prepared):
    return FailsOnce(pruner_module, "rewrap", call=1).restore


SPOILS = {each.__name__: each for each in (
    other_weights, other_threshold, other_steps, other_counters, nan_statistics, no_samples, unknown_optimizer_state,
    frozen_model, failing_swap, failing_rewrap,
)}  # fmt: skip
