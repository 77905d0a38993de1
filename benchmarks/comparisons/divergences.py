"""Each distillation term: this package, eager PyTorch, torch.compile."""

from __future__ import annotations

from typing import Any

from benchmarks import formulas
from benchmarks.cases import Shape, contenders, make_inputs
from benchmarks.settings import Settings
from benchmarks.table import Table, microseconds, times
from benchmarks.timing import Quartiles, in_turns

SHAPE = Shape(4096, 1000, 0)

# The eager formula, and the arguments of this package's loss for the same term.
DIVERGENCES: dict[str, tuple[formulas.Divergence, dict[str, Any]]] = {
    "forward_kl": (formulas.forward_kl, {"divergence": "forward_kl"}),
    "reverse_kl": (formulas.reverse_kl, {"divergence": "reverse_kl"}),
    "jsd": (formulas.jsd, {"divergence": "jsd", "jsd_beta": formulas.JSD_BETA}),
    "skew_kl": (formulas.skew_kl, {"divergence": "skew_kl", "skew": formulas.SKEW}),
    "symmetric_kl": (formulas.symmetric_kl, {"divergence": "symmetric_kl"}),
    "dkd": (
        formulas.dkd,
        {
            "divergence": "dkd",
            "dkd_target_weight": formulas.DKD_TARGET_WEIGHT,
            "dkd_non_target_weight": formulas.DKD_NON_TARGET_WEIGHT,
        },
    ),
    "forward_kl, standardized logits": (formulas.standardized_forward_kl, {"standardize_logits": True}),
}


def measure(settings: Settings) -> dict[str, Any]:
    """Forward and backward of the loss with each divergence."""
    shape = SHAPE.at(settings)
    results = {}
    for name, (formula, keywords) in DIVERGENCES.items():
        steps = contenders(make_inputs(shape), settings, formula, **keywords)
        results[name] = in_turns(steps, settings).to_json(base="kddp_ext")
    return {"shape": str(shape), "divergences": results}


def tables(by_heap: dict[str, dict[str, Any]]) -> list[Table]:
    result = by_heap["default"]
    timings = result["divergences"]
    names = list(timings["forward_kl"]["seconds"])
    columns = ["term", *[f"{name} (µs)" for name in names], *[f"times {name}" for name in names[1:]]]
    rows = [
        [
            name,
            *[microseconds(timed["seconds"][other]) for other in names],
            *[times(Quartiles(**timed["times_kddp_ext"][other])) for other in names[1:]],
        ]
        for name, timed in timings.items()
    ]
    return [Table("divergences", f"Distillation terms, forward + backward, at {result['shape']}", columns, rows)]
