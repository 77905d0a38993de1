"""The benchmarks run, compare implementations that agree, and write what they promise. No time is asserted."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def benchmarks():
    """The package's modules; it lies in the source folder and is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        from benchmarks import cases, disturbance, moved_bytes, timing
        from benchmarks.comparisons import COMPARISONS, memory
        from benchmarks.settings import Settings

        yield SimpleNamespace(
            cases=cases,
            comparisons=COMPARISONS,
            disturbance=disturbance,
            memory=memory,
            moved_bytes=moved_bytes,
            settings=Settings(threads=1, seconds=0.001, rounds=2, compile=False, smoke=True),
            timing=timing,
        )


@pytest.mark.parametrize(
    "name",
    ["loss", "class-counts", "threads", "memory", "statistics", "divergences", "compaction", "pruning"],
)
def test_each_comparison_gives_tables_and_json(benchmarks, name):
    comparison = benchmarks.comparisons[name]
    by_heap = dict.fromkeys(comparison.heaps, comparison.measure(benchmarks.settings))
    by_heap = json.loads(json.dumps(by_heap))
    for table in comparison.tables(by_heap):
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.columns)}


def test_every_comparison_is_tested(benchmarks):
    marks = test_each_comparison_gives_tables_and_json.pytestmark
    assert list(benchmarks.comparisons) == marks[0].args[1]


def test_the_command_writes_json_markdown_and_a_picture(tmp_path):
    options = ["--smoke", "--no-compile", "--only", "loss", "--threads", "1", "--rounds", "1", "--seconds", "0.001"]
    files = [tmp_path / name for name in ("figures.json", "picture.png", "tables.md")]
    files[2].write_text("Before.\n\n<!-- table loss-warm -->\nold\n<!-- end -->\n\nAfter.\n")
    options += ["--json", str(files[0]), "--plot", str(files[1]), "--markdown", str(files[2])]
    subprocess.run([sys.executable, "-m", "benchmarks", *options], cwd=ROOT, check=True)
    content = json.loads(files[0].read_text())
    assert content["version"] == 1
    assert {"torch", "cpu", "threads", "instruction_set", "date", "compiler"} <= content["machine"].keys()
    assert content["comparisons"]["loss"].keys() == {"default", "warm"}
    assert files[1].read_bytes().startswith(b"\x89PNG")
    text = files[2].read_text()
    assert text.startswith("Before.\n\n<!-- table loss-warm -->\n**Loss")
    assert text.endswith("<!-- end -->\n\nAfter.\n")
    assert "old" not in text


def test_a_comparison_of_different_formulas_is_refused(benchmarks):
    cases = benchmarks.cases
    inputs = cases.make_inputs(cases.Shape(8, 10, 4))
    losses = {"eager": cases.fused, "wrong": lambda i: cases.fused(i, label_smoothing=0.1)}
    with pytest.raises(RuntimeError, match="wrong and eager PyTorch do not compute the same"):
        cases.require_agreement(losses, inputs)


def test_bytes_of_a_shape(benchmarks):
    shape = benchmarks.cases.Shape(2, 3, 5, torch.bfloat16)
    assert benchmarks.moved_bytes.needed_bytes(shape) == 2 * (3 * 2 * 3 + 2 * 2 * 5)
    assert benchmarks.moved_bytes.gradient_bytes(shape) == 2 * (2 * 3 + 2 * 5)


def test_the_peak_of_a_steps_memory(benchmarks):
    inputs = benchmarks.cases.make_inputs(benchmarks.cases.Shape(64, 64, 0))

    def step():
        kept = torch.empty(1000, dtype=torch.uint8)
        for _ in range(3):
            torch.empty(5000, dtype=torch.uint8)
        return kept

    assert benchmarks.memory._peak_bytes(step, inputs) == 6000


def test_a_ratio_is_made_within_a_round(benchmarks):
    # The machine got slower by ten in the last round; the ratio of each round is 2.
    rounds = benchmarks.timing.Rounds({"a": [2.0, 4.0, 20.0], "b": [1.0, 2.0, 10.0]})
    assert rounds.ratio("a", base="b") == (2.0, 2.0, 2.0)


@pytest.fixture
def patient(benchmarks, monkeypatch):
    """Settings of a run that repeats disturbed rounds, without waiting between them."""
    monkeypatch.setattr(benchmarks.timing, "PAUSE", 0)
    monkeypatch.setattr(benchmarks.disturbance, "LIMIT", math.inf)
    return benchmarks.settings._replace(smoke=False)


def test_contenders_rotate(benchmarks, patient):
    seen = []
    benchmarks.timing._rounds(seen.append, list("abc"), patient._replace(rounds=4))
    assert "".join(seen) == "abcbcacababc"


def test_disturbed_rounds_are_repeated_while_patience_lasts(benchmarks, patient, monkeypatch):
    counts = iter([0, 10**9, 0, 0, 0, 10**9, 0, 0])  # before and after: rounds 0 and 2 are disturbed
    monkeypatch.setattr(benchmarks.disturbance, "LIMIT", 50)
    monkeypatch.setattr(benchmarks.disturbance, "_involuntary_switches", lambda: next(counts))
    values = iter(range(10))
    rounds = benchmarks.timing._rounds(lambda name: next(values), ["a"], patient)
    assert rounds == ({"a": [1, 3]}, 0)
    counts = iter([0, 10**9] * 5 + [0, 0])
    values = iter(range(10))
    rounds = benchmarks.timing._rounds(lambda name: next(values), ["a"], patient)
    assert rounds == ({"a": [5, 0]}, 1)
    results = {"loss": {"warm": {"shapes": [rounds.to_json("a")]}}}
    assert benchmarks.disturbance.summary(results) == "Rounds disturbed by other processes: loss 1 of 2."
