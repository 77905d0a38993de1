"""The time of a prune that removes half of the hidden neurons during training, compared with a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import kddp_ext
from benchmarks.comparisons.compaction import perceptron, sizes
from benchmarks.settings import Settings
from benchmarks.table import Table, milliseconds, times
from benchmarks.timing import Quartiles, Stopwatch, stages_in_turns

BATCH, STEPS_BEFORE, DIMENSIONS = 128, 2, 24
STEP = "training step"


def measure(settings: Settings) -> dict[str, Any]:
    """Seconds of a step (forward, loss, backward, Adam) and of a prune with and without reconstruction."""
    training = _Training(sizes(settings))

    def prune(samples: int) -> Callable[[Stopwatch], None]:
        def run(stopwatch: Stopwatch) -> None:
            pruner = training.start(samples)
            with stopwatch("time"):
                report = pruner.prune()
            if samples and not settings.smoke and any(x.reconstruction_error is None for x in report.layers):
                raise RuntimeError(f"expected every layer to be reconstructed, got {report.layers}")

        return run

    def step(stopwatch: Stopwatch) -> None:
        pruner = training.start(256)
        with stopwatch("time"):
            training.step(pruner)

    runs = {STEP: step, "prune": prune(256), "prune, average alone": prune(0)}
    return {"sizes": sizes(settings), "time": stages_in_turns(runs, settings)["time"].to_json(base=STEP)}


class _Training:
    def __init__(self, widths: tuple[int, ...]) -> None:
        self.widths = widths
        generator = torch.Generator().manual_seed(0)
        # Inputs have few dimensions, as images do. Noise cannot be reconstructed, so nothing would be timed.
        hidden = torch.randn(BATCH, DIMENSIONS, generator=generator) / DIMENSIONS**0.5
        self.inputs = hidden @ torch.randn(DIMENSIONS, widths[0], generator=generator)
        self.teacher = torch.randn(BATCH, widths[-1], generator=generator)
        self.labels = torch.randint(widths[-1], (BATCH,), generator=generator)

    def start(self, samples: int) -> kddp_ext.DynamicPruner:
        """A pruner of a fresh network after a few steps."""
        torch.manual_seed(0)
        model = perceptron(self.widths)
        pruner = kddp_ext.DynamicPruner(
            model, torch.optim.Adam(model.parameters()), example_inputs=(self.inputs[:2],), patience=1, threshold=1.0,
            maximum_share=0.5, reconstruction_samples=samples,
        )  # fmt: skip
        for _ in range(STEPS_BEFORE):
            self.step(pruner)
        return pruner

    def step(self, pruner: kddp_ext.DynamicPruner) -> None:
        assert isinstance(pruner.optimizer, torch.optim.Optimizer)
        logits = pruner.model(self.inputs)
        loss = kddp_ext.fused_kd_l1_loss(logits, self.teacher, self.labels, pruner.activations, l1_weight=1e-4)
        pruner.optimizer.zero_grad()
        loss.backward()
        pruner.optimizer.step()


def tables(by_heap: dict[str, dict[str, Any]]) -> list[Table]:
    rows = []
    for heap, result in by_heap.items():
        timed = result["time"]
        for name, seconds in timed["seconds"].items():
            share = "" if name == STEP else times(Quartiles(**timed[f"times_{STEP}"][name]))
            rows.append([f"{heap}, {name}", milliseconds(seconds), share])
    sizes_text = "-".join(map(str, by_heap["default"]["sizes"]))
    title = f"Pruning half the neurons of {sizes_text} beside a training step at batch {BATCH}"
    return [Table("prune-step", title, ["heap", "ms", "steps in a prune"], rows)]
