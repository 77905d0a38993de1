"""One thread compared with several."""

from __future__ import annotations

from typing import Any

from benchmarks.cases import Shape, contenders, make_inputs
from benchmarks.settings import Settings
from benchmarks.table import Table, microseconds, times
from benchmarks.timing import Quartiles, in_turns

SHAPE = Shape(4096, 1000, 1024)


def measure(settings: Settings) -> dict[str, Any]:
    """Time with one thread and with `settings.threads` (at least two), for this package and eager PyTorch.

    torch.compile is left out, because its code is generated for a number of threads.
    """
    shape, several = SHAPE.at(settings), max(2, settings.threads)
    results = {}
    for name, step in contenders(make_inputs(shape), settings._replace(compile=False)).items():
        counts = {str(count): count for count in (1, several)}
        rounds = in_turns(dict.fromkeys(counts, step), settings, threads=counts)
        results[name] = rounds.to_json(base=str(several))
    return {"shape": str(shape), "threads": several, "implementations": results}


def tables(by_heap: dict[str, dict[str, Any]]) -> list[Table]:
    result = by_heap["default"]
    several = str(result["threads"])
    columns = ["implementation", "1 thread (µs)", f"{several} threads (µs)", "times as fast"]
    rows = [
        [
            name,
            *[microseconds(timed["seconds"][count]) for count in ("1", several)],
            times(Quartiles(**timed[f"times_{several}"]["1"])),
        ]
        for name, timed in result["implementations"].items()
    ]
    return [Table("threads", f"Threads, at {result['shape']}", columns, rows)]
