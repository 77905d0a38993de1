"""Faults planted in the package's own CUDA kernels: each is found on the emulator, under every seed.

Each fault is a twin of one source with one change. It runs like the unchanged source, which passes. It is found by an
error of the emulator that names the line, by the bytes that the launch had to access, or by what the launch left.
"""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from backends import CUDA, ROOT, build_folder, require_emulator
from emulated_calls import aligned, expected_gradient, filled
from emulator import Emulator, build, twin

PLANTED = Path(__file__).parent / "planted"
SOURCES = {
    "loss": (PLANTED / "loss.cu", CUDA / "kd_l1_loss.cu", CUDA / "occupancy.cu"),
    "moves": (
        PLANTED / "moves.cu",
        CUDA / "gather.cu",
        CUDA / "scale.cu",
        CUDA / "gradient_products.cu",
        CUDA / "occupancy.cu",
    ),
}
SEEDS = (0, 1, 2)


class Fault(NamedTuple):
    """A change of a source, the run that shows it, and how it is found."""

    source: str
    replace: str
    by: str
    run: str  # of RUNS
    error: str  # a pattern
    line: str | None = None  # text of the source line that the error names


NEEDED = r"never (read|wrote) \d+ of \d+ needed bytes"
FAULTS = {
    # The block's first warp adds up sums that the other warps have not stored yet.
    "missing barrier": Fault(
        "reductions.cuh",
        "        __syncthreads();\n        if (warp != 0 && !broadcast) return;",
        "        if (warp != 0 && !broadcast) return;",
        "a block per row",
        "reads shared memory that no thread of the block has written|race in shared memory: ",
        "scratch.sums.",
    ),
    # The last vector of the last row is written in full.
    "store behind the end": Fault(
        "row_vectors.cuh",
        "    } else if (first <= 0 && end >= n) {\n        store_run",
        "    } else if (first <= 0 && end > 0) {\n        store_run",
        "a block per row",
        r"out of bounds: writes (8|16) bytes at 0x\w+, across the end of the 12012 bytes of logits_gradient|"
        "race in global memory: writes what",
        "store_words<",
    ),
    # Lanes add up what warps that do not exist would have stored.
    "unwritten shared memory": Fault(
        "reductions.cuh",
        "value = lane < static_cast<int>(blockDim.x / 32) ? scratch.load(lane) : 0;",
        "value = scratch.load(lane);",
        "8 lanes per row",
        "reads shared memory that no thread of the block has written",
        "scratch.load(lane)",
    ),
    # The last, incomplete vector of a row is not read.
    "missing tail of a row": Fault(
        "row_part.cuh",
        "vectors_ = count > 0 ? (head_ + count + n - 1) / n : 0;",
        "vectors_ = count > 0 ? (head_ + count) / n : 0;",
        "a warp per row",
        NEEDED,
    ),
    "too few items for the rows": Fault(
        "gather.cu",
        "((job.kept_rows + rows_per_item - 1) / rows_per_item)",
        "(job.kept_rows / rows_per_item)",
        "gather",
        NEEDED,
    ),
    "too few runs for the gradient": Fault(
        "scale.cu",
        "(launch.tensors[i].count + elements - 1) / elements",
        "launch.tensors[i].count / elements",
        "scale",
        NEEDED,
    ),
    # The first warp adds up sums of warps that have not finished.
    "missing barrier before the sum of warps": Fault(
        "gradient_products.cu",
        "            __syncthreads();\n            for (int i = 1; warp == 0",
        "            for (int i = 1; warp == 0",
        "products",
        "reads shared memory that no thread of the block has written|race in shared memory: ",
        "of_warps.",
    ),
    # The last block reads sums that the other blocks may not have made visible.
    "missing fence before the ticket": Fault(
        "loss_launch.cuh",
        "    __threadfence();\n    __syncthreads();\n    if (threadIdx.x == 0) ticket",
        "    __syncthreads();\n    if (threadIdx.x == 0) ticket",
        "8 lanes per row",
        "race in global memory: reads what thread .* wrote at loss_launch.cuh:.*, with no __threadfence behind it",
        "load_workspace(",
    ),
    # Counters start at what the memory held: no block is the last one, and nobody writes loss and statistics.
    "counters that are not 0": Fault(
        "kd_l1_loss.cu",
        "    for (int64_t i = first; i < counter_count; i += step) store_global(call.counters + i, 0u);\n",
        "",
        "8 lanes per row",
        NEEDED,
    ),
    # The kernel of usual calls computes e^s as the power of e^(s/T) that is right for them.
    "a usual kernel for another call": Fault(
        "kd_l1_loss.cu",
        "traits_of(row_params(job)) == usual_call;",
        "job.teacher.data && job.labels;",
        "not a usual call",
        "the logits' gradient is wrong",
    ),
    # No check can know that the gradient belongs one class further.
    "gradient next to the label": Fault(
        "row_part.cuh",
        "if (first_of(v) + i == label_) values[i] = label_gradient",
        "if (first_of(v) + i == label_ + 1) values[i] = label_gradient",
        "a warp per row",
        "the logits' gradient is wrong",
    ),
}


def call(emulator, name, arguments, writable):
    """Runs a C function whose tensors are all declared as needed. Returns the error's text, or None."""
    emulator.clear()
    emulator.allow_everything()
    for key, value in arguments.items():
        if isinstance(value, torch.Tensor):
            emulator.allow(value, writable=key in writable, name=key)
            kernel = "kd_l1_loss_by_rows" if name == "run_loss" else ""  # another one runs before
            emulator.needs(value, is_store=key in writable, kernel=kernel)
    text = emulator.run(name, *arguments.values())
    emulator.allow_everything()
    return text


def run_loss(emulator, rows, classes, temperature=4):
    generator = torch.Generator().manual_seed(classes)
    neurons = 37
    student, teacher = (filled(torch.randn(rows, classes, generator=generator)) for _ in range(2))
    activation = filled(torch.randn(rows, neurons, generator=generator))
    labels = filled(torch.randint(0, classes, (rows,), generator=generator))
    gradient = aligned((rows, classes), torch.float32)
    outputs = {
        "logits_gradient": gradient, "activation_gradient": aligned((rows, neurons), torch.float32),
        "statistics": aligned((5, neurons), torch.float64), "loss": aligned((), torch.float32),
        "terms": aligned((4,), torch.float32),
    }  # fmt: skip
    inputs = {
        "rows": rows, "classes": classes, "temperature": temperature, "student": student, "teacher": teacher,
        "labels": labels,
    }  # fmt: skip
    error = call(emulator, "run_loss", {**inputs, "neurons": neurons, "activation": activation, **outputs}, outputs)
    if error is None and not torch.allclose(
        gradient.double(), expected_gradient(student, teacher, labels, temperature), rtol=1e-4, atol=1e-8
    ):
        error = "the logits' gradient is wrong"
    return error


def run_gather(emulator):
    """Gathers all rows in another order, so that every byte is needed."""
    generator = torch.Generator().manual_seed(0)
    keep_rows, source = torch.randperm(45, generator=generator), torch.randn(45, 37, generator=generator)
    buffers = {
        "columns": 37, "keep_rows": filled(keep_rows), "kept_rows": 45, "keep_columns": 0, "kept_columns": 37,
        "source": filled(source), "target": aligned((45, 37), torch.float32),
    }  # fmt: skip
    error = call(emulator, "run_gather", buffers, ("target",))
    return error or (None if torch.equal(buffers["target"], source[keep_rows]) else "rows are wrong")


def run_scale(emulator):
    source = filled(torch.randn(5003, generator=torch.Generator().manual_seed(0)))
    target, scalar = aligned((5003,), torch.float32), aligned((), torch.float32, fill=1.5)
    buffers = {"count": 5003, "source": source, "target": target, "scalar": scalar}
    error = call(emulator, "run_scale", buffers, ("target",))
    return error or (None if torch.equal(target, source * 3) else "the product is wrong")


def run_products(emulator):
    generator = torch.Generator().manual_seed(0)
    activation, gradient = (torch.randn(3, 5, 1027, generator=generator) for _ in range(2))
    mean = torch.randn(5, dtype=torch.float64, generator=generator)
    buffers = {
        "samples": 3, "entries": 5, "after": 1027, "activation": filled(activation), "gradient": filled(gradient),
        "mean": filled(mean), "products": aligned((3, 5), torch.float32),
    }  # fmt: skip
    error = call(emulator, "run_products", buffers, ("products",))
    truth = ((activation.double() - mean[:, None]) * gradient).sum(2).float()
    return error or (None if torch.allclose(buffers["products"], truth, atol=1e-3) else "the sums are wrong")


# The sources, what runs them, and the kernel.
RUNS = {
    "8 lanes per row": ("loss", lambda emulator: run_loss(emulator, 140, 11), "kd_l1_loss_by_rows<.*, 8, true, "),
    "not a usual call": ("loss", lambda emulator: run_loss(emulator, 140, 11, 3), "RowTypes<.*, false>, 8, true, "),
    "a warp per row": ("loss", lambda emulator: run_loss(emulator, 20, 257), "kd_l1_loss_by_rows<.*, 32, true, "),
    "a block per row": ("loss", lambda emulator: run_loss(emulator, 3, 1001), "kd_l1_loss_by_rows<.*, 1024, true, "),
    "gather": ("moves", run_gather, "gather_layer"),
    "scale": ("moves", run_scale, "scale_gradients"),
    "products": ("moves", run_products, "sum_products"),
}


@pytest.fixture(scope="module")
def folder(request):
    require_emulator(request.config)
    return build_folder(request.config)


def built(folder, kind, changed=None):
    """The emulator of unchanged sources, or with `changed` in place of one of them."""
    include = [ROOT / "csrc", ROOT / "csrc" / "include"]
    sources = [changed if changed and path.name == changed.name else path for path in SOURCES[kind]]
    if changed is not None and changed not in sources:
        include.insert(0, changed.parent.parent)
    return Emulator(build(sources, folder, include=include, name=f"planted_{kind}"))


@pytest.fixture(scope="module")
def unchanged(folder):
    return {kind: built(folder, kind) for kind in SOURCES}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("run", RUNS)
def test_the_unchanged_source_passes(unchanged, run, seed):
    kind, execute, kernel = RUNS[run]
    emulator = unchanged[kind]
    emulator.seed = seed
    assert execute(emulator) is None
    *_, report = emulator.reports()
    assert re.search(kernel, report["kernel"])


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(folder, name):
    fault = FAULTS[name]
    kind, execute, kernel = RUNS[fault.run]
    source = folder / "planted" / name.replace(" ", "_") / "cuda" / fault.source
    twin(CUDA / fault.source, fault.replace, fault.by, source)
    emulator = built(folder, kind, source)
    for seed in SEEDS:
        emulator.seed = seed
        text = execute(emulator)
        assert text is not None, f"not found under seed {seed}"
        assert re.search(fault.error, text), text
        if fault.line is None:
            continue
        position = re.match(rf"kernel .*(?:{kernel}|prepare_loss).*, block \d+, thread \d+, (\w+\.cuh?):(\d+): ", text)
        assert position, text
        path = source if position[1] == fault.source else CUDA / position[1]
        assert fault.line in path.read_text().splitlines()[int(position[2]) - 1], text
