"""Pruning half the neurons of a perceptron during training: DynamicPruner and Torch-Pruning.

Torch-Pruning slices weights and gradients; this package also slices the optimizer's state.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

import kddp_ext
from benchmarks.comparisons.compaction import perceptron, sizes
from benchmarks.settings import Settings
from benchmarks.table import Table, milliseconds, times
from benchmarks.timing import Quartiles, Stopwatch, stages_in_turns

STAGES = ("build", "prune")
SAMPLES = 32
TRACED_SAMPLES = 2
# For the default criterion; only neurons that do not vary at all are below it.
THRESHOLD = 1e-9


def measure(settings: Settings) -> dict[str, Any]:
    """Seconds of building the dependencies and of the prune. Creating models and optimizers is not timed."""
    model, dead = _half_dead(sizes(settings))
    samples = torch.randn(SAMPLES, sizes(settings)[0], generator=torch.Generator().manual_seed(1))
    expected = model(samples).detach()

    def timed_on_a_copy(prune: Callable[..., None]) -> Callable[[Stopwatch], None]:
        def run(stopwatch: Stopwatch) -> None:
            trained, optimizer = _trained_copy(model, samples)
            prune(trained, optimizer, samples, dead, stopwatch)
            _require_pruned(trained, samples, dead, expected)

        return run

    runs = {"kddp_ext": timed_on_a_copy(_dynamic_pruner)}
    if importlib.util.find_spec("torch_pruning"):
        runs["Torch-Pruning"] = timed_on_a_copy(_torch_pruning)
    stages = stages_in_turns(runs, settings)
    return {"sizes": sizes(settings), "stages": {name: stages[name].to_json(base="kddp_ext") for name in STAGES}}


def _dynamic_pruner(
    model: nn.Sequential, optimizer: Optimizer, samples: Tensor, _dead: list[list[int]], stopwatch: Stopwatch
) -> None:
    with stopwatch("build"):
        pruner = kddp_ext.DynamicPruner(
            model, optimizer, example_inputs=(samples[:TRACED_SAMPLES],), threshold=THRESHOLD, patience=1
        )
    model(samples)
    pruner.activations.observe()  # the loss does this in training
    with stopwatch("prune"):
        pruner.prune()


def _torch_pruning(
    model: nn.Sequential, _optimizer: Optimizer, samples: Tensor, dead: list[list[int]], stopwatch: Stopwatch
) -> None:
    torch_pruning = importlib.import_module("torch_pruning")
    with stopwatch("build"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=samples[:TRACED_SAMPLES])
    with stopwatch("prune"):
        for layer, neurons in zip(_hidden(model), dead, strict=True):
            graph.get_pruning_group(layer, torch_pruning.prune_linear_out_channels, idxs=neurons).prune()


def _half_dead(widths: tuple[int, ...]) -> tuple[nn.Sequential, list[list[int]]]:
    """A perceptron in which half of each hidden layer's neurons are always zero, the others never; and the dead ones.

    Removing them changes no output, and both tools can be made to remove exactly them.
    """
    generator = torch.Generator().manual_seed(0)
    model = perceptron(widths)
    dead = []
    for layer in _hidden(model):
        neurons = torch.randperm(layer.out_features, generator=generator)[: layer.out_features // 2].sort().values
        with torch.no_grad():
            layer.weight.mul_(0.1)
            layer.bias.fill_(1.0)  # more than the small weights can subtract
            layer.weight[neurons] = 0
            layer.bias[neurons] = 0
        dead.append(neurons.tolist())
    return model, dead


def _hidden(model: nn.Sequential) -> list[nn.Linear]:
    return [module for module in model if isinstance(module, nn.Linear)][:-1]


def _trained_copy(model: nn.Sequential, samples: Tensor) -> tuple[nn.Sequential, Optimizer]:
    """A copy with gradients and Adam's moments, its weights unchanged."""
    trained = copy.deepcopy(model)
    optimizer = Adam(trained.parameters(), lr=0.0)
    trained(samples).square().sum().backward()
    optimizer.step()
    return trained, optimizer


def _require_pruned(model: nn.Sequential, samples: Tensor, dead: list[list[int]], expected: Tensor) -> None:
    for layer, neurons in zip(_hidden(model), dead, strict=True):
        if layer.weight.shape[0] != len(neurons):  # half was removed, so as many remain
            raise RuntimeError(f"expected {len(neurons)} neurons to remain, got {layer.weight.shape[0]}")
    torch.testing.assert_close(model(samples), expected, rtol=1e-4, atol=1e-5)


def tables(by_heap: dict[str, dict[str, Any]]) -> list[Table]:
    names = list(by_heap["default"]["stages"]["prune"]["seconds"])
    columns = ["heap, stage", *[f"{name} (ms)" for name in names], *[f"times {name}" for name in names[1:]]]
    rows = []
    for heap, result in by_heap.items():
        for stage, timed in result["stages"].items():
            ratios = [times(Quartiles(**timed["times_kddp_ext"][name])) for name in names[1:]]
            rows.append([f"{heap}, {stage}", *[milliseconds(timed["seconds"][name]) for name in names], *ratios])
    sizes_text = "-".join(map(str, by_heap["default"]["sizes"]))
    note = "kddp_ext slices weights, gradients and Adam's moments; Torch-Pruning weights and gradients."
    return [Table("pruning", f"Pruning half the neurons of {sizes_text}", columns, rows, note)]
