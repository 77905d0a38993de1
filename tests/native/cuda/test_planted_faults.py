"""Faults planted in the CUDA kernels of the package itself, each found on the emulator, and by what.

A twin of one source differs in one place. It runs exactly as the unchanged source, which passes, and what finds the
fault is an error of the emulator that names the place (a race, a barrier, a mask, memory), the bytes that `needs`
missed, or what the launch left behind.
"""

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from backends import build_folder
from emulated_calls import aligned, filled
from emulator import Emulator, build, twin

ROOT = Path(__file__).parents[3]
CUDA = ROOT / "csrc" / "cuda"
PLANTED = Path(__file__).parent / "planted"
SOURCES = {
    "loss": (PLANTED / "loss.cu", CUDA / "kd_l1_loss.cu", CUDA / "occupancy.cu"),
    "moves": (PLANTED / "moves.cu", CUDA / "compaction.cu", CUDA / "scale.cu", CUDA / "occupancy.cu"),
}
SEEDS = (0, 1, 2)


@dataclass
class Fault:
    """One place of a source that is changed, the run that shows it, and what is said of it."""

    source: str
    replace: str
    by: str
    run: str  # of RUNS
    found: str  # in the error
    at: str | None = None  # in the line of the source that the error names; None: it names none


FAULTS = {
    # The block's first warp adds up what the others have not left yet. Found by the emulator's check of races.
    "a missing barrier": Fault(
        "reductions.cuh",
        "        __syncthreads();\n        if (warp != 0 && !broadcast) return;",
        "        if (warp != 0 && !broadcast) return;",
        "a block a row",
        "reads shared memory that no thread of the block has written|race in shared memory: ",
        "scratch.sums.",
    ),
    # The second warp and those behind it do not come. By the emulator's check of barriers.
    "a barrier that some do not reach": Fault(
        "loss_launch.cuh",
        "    __threadfence();\n    __syncthreads();\n    if (threadIdx.x == 0) ticket",
        "    __threadfence();\n    if (threadIdx.x < 32) __syncthreads();\n    if (threadIdx.x == 0) ticket",
        "8 lanes a row",
        "divergent barrier: thread .* waits at another",
        "__syncthreads();",
    ),
    # Half of the lanes are not in the mask that they name. By the emulator's check of masks.
    "a shuffle with half a mask": Fault(
        "reductions.cuh",
        "value += __shfl_xor_sync(all_lanes, value, distance);",
        "value += __shfl_xor_sync(0xffffu, value, distance);",
        "a warp a row",
        "__shfl_xor_sync: mask 0x0000ffff lacks the calling lane|reads lane .*, which is not in mask 0x0000ffff",
        "__shfl_xor_sync",
    ),
    # The last vector of the last row is written as a whole. By the bounds of what was allowed.
    "a store behind the end": Fault(
        "row_vectors.cuh",
        "    } else if (first <= 0 && end >= n) {\n        store_run",
        "    } else if (first <= 0 && end > 0) {\n        store_run",
        "a block a row",
        r"out of bounds: writes (8|16) bytes at 0x\w+, across the end of the 12012 bytes of logits_gradient|"
        "race in global memory: writes what",
        "store_words<",
    ),
    # Lanes of the last step add up what warps that do not exist would have left. By the emulator's check of writes.
    "shared memory that nobody wrote": Fault(
        "reductions.cuh",
        "value = lane < static_cast<int>(blockDim.x / 32) ? scratch.load(lane) : 0;",
        "value = scratch.load(lane);",
        "8 lanes a row",
        "reads shared memory that no thread of the block has written",
        "scratch.load(lane)",
    ),
    # The last vector of a row whose classes do not fill it is left out. By `needs`.
    "a tail that is left out": Fault(
        "row_part.cuh",
        "vectors_ = count > 0 ? (head_ + count + n - 1) / n : 0;",
        "vectors_ = count > 0 ? (head_ + count) / n : 0;",
        "a warp a row",
        r"never (read|wrote) \d+ of the \d+ bytes that it has to",
        None,
    ),
    # Pieces of the gradient's last vectors are left out. By `needs`.
    "a tail that is not written": Fault(
        "row_vectors.cuh",
        "        write_range<T, type, half>(to, first, end, from);\n",
        "",
        "a block a row",
        r"never wrote \d+ of the \d+ bytes that it has to",
        None,
    ),
    # 16 rows an item, rounded down. By `needs`.
    "too few items for the rows": Fault(
        "compaction.cu",
        "((job.kept_rows + rows_per_item - 1) / rows_per_item)",
        "(job.kept_rows / rows_per_item)",
        "gather",
        r"never (read|wrote) \d+ of the \d+ bytes that it has to",
        None,
    ),
    # The same of the backward's runs of vectors.
    "too few runs for the gradient": Fault(
        "scale.cu",
        "(launch.tensors[i].count + elements - 1) / elements",
        "launch.tensors[i].count / elements",
        "scale",
        r"never (read|wrote) \d+ of the \d+ bytes that it has to",
        None,
    ),
    # The last block reads sums that others may not have made visible. By the emulator's order between blocks.
    "a missing fence before the ticket": Fault(
        "loss_launch.cuh",
        "    __threadfence();\n    __syncthreads();\n    if (threadIdx.x == 0) ticket",
        "    __syncthreads();\n    if (threadIdx.x == 0) ticket",
        "8 lanes a row",
        "race in global memory: reads what thread .* wrote at loss_launch.cuh:.*, with no __threadfence behind it",
        "load_workspace(",
    ),
    # The same of the statistics' parts.
    "a missing fence behind a part": Fault(
        "activation_l1.cuh",
        "    __threadfence();\n    __syncwarp();\n    if (threadIdx.x % 32 == 0)",
        "    __syncwarp();\n    if (threadIdx.x % 32 == 0)",
        "8 lanes a row",
        "race in global memory: reads what thread .* wrote at .*, with no (__threadfence behind it|barrier between)",
        "load_workspace(",
    ),
    # The next launch on the stream would count its labels from there. By the test, which looks at the counters.
    "counters that are not taken back": Fault(
        "loss_launch.cuh",
        "    store_global(launch.label_counter, 0ull);\n",
        "",
        "8 lanes a row",
        "counters are not 0",
        None,
    ),
    # A label's sum of valid rows is right; the gradient at the label is not. By the numbers: no check can know.
    "the label's neighbour": Fault(
        "row_part.cuh",
        "if (first_of(v) + i == label_) values[i] = label_gradient",
        "if (first_of(v) + i == label_ + 1) values[i] = label_gradient",
        "a warp a row",
        "the logits' gradient is wrong",
        None,
    ),
}


class Library:
    """The kernels of one build, and what runs them with every buffer allowed and needed."""

    def __init__(self, path: Path) -> None:
        self.emulator = Emulator(path)
        self.library = self.emulator.library

    def call(self, name, arguments, writable=()):
        """Tensors become addresses. Gives the error's text, or None."""
        emulator = self.emulator
        emulator.clear()
        emulator.allow_everything()
        for key, value in arguments.items():
            if not isinstance(value, torch.Tensor):
                continue
            emulator.allow(value, writable=key in writable, name=key)
            if key != "counters":
                emulator.needs(value, is_store=key in writable)
        function = self.library[name]
        function.restype = ctypes.c_char_p
        values = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments.values()]
        kinds = [ctypes.c_void_p if isinstance(x, torch.Tensor) else ctypes.c_int64 for x in arguments.values()]
        text = function(*(kind(value) for kind, value in zip(kinds, values, strict=True)))
        emulator.allow_everything()
        return text.decode() if text else None

    @property
    def kernel(self):
        (report,) = self.emulator.reports()
        return report["kernel"]


def run_loss(library, rows, classes):
    generator = torch.Generator().manual_seed(classes)
    neurons = 37
    student, teacher = (filled(torch.randn(rows, classes, generator=generator)) for _ in range(2))
    activation = filled(torch.randn(rows, neurons, generator=generator))
    labels = filled(torch.randint(0, classes, (rows,), generator=generator))
    buffers = {
        "rows": rows, "classes": classes, "student": student, "teacher": teacher, "labels": labels,
        "logits_gradient": aligned((rows, classes), torch.float32), "neurons": neurons, "activation": activation,
        "activation_gradient": aligned((rows, neurons), torch.float32),
        "statistics": aligned((5, neurons), torch.float64), "loss": aligned((), torch.float32),
        "terms": aligned((4,), torch.float32), "counters": aligned((16384,), torch.uint8, fill=0),
    }  # fmt: skip
    writable = ("logits_gradient", "activation_gradient", "statistics", "loss", "terms", "counters")
    error = library.call("run_loss", buffers, writable)
    if error is not None:
        return error
    if buffers["counters"].any():
        return "counters are not 0"
    return None if is_right(buffers) else "the logits' gradient is wrong"


def is_right(buffers):
    """Whether the gradient is that of PyTorch's own functions, in float64."""
    student, teacher = buffers["student"].double().requires_grad_(), buffers["teacher"].double()
    log_q, p = (student / 4).log_softmax(1), (teacher / 4).softmax(1)
    kd = 16 * torch.nn.functional.kl_div(log_q, p, reduction="batchmean")
    (0.9 * kd + 0.1 * torch.nn.functional.cross_entropy(student, buffers["labels"])).backward()
    return torch.allclose(buffers["logits_gradient"].double(), student.grad, rtol=1e-4, atol=1e-8)


def run_gather(library):
    """All rows in another order, so that every byte is needed."""
    generator = torch.Generator().manual_seed(0)
    keep_rows, source = torch.randperm(45, generator=generator), torch.randn(45, 37, generator=generator)
    buffers = {
        "columns": 37, "keep_rows": filled(keep_rows), "kept_rows": 45, "keep_columns": 0, "kept_columns": 37,
        "source": filled(source), "target": aligned((45, 37), torch.float32),
    }  # fmt: skip
    error = library.call("run_gather", buffers, ("target",))
    return error or (None if torch.equal(buffers["target"], source[keep_rows]) else "rows are wrong")


def run_scale(library):
    source = filled(torch.randn(5003, generator=torch.Generator().manual_seed(0)))
    target, scalar = aligned((5003,), torch.float32), aligned((), torch.float32, fill=1.5)
    buffers = {"count": 5003, "source": source, "target": target, "scalar": scalar}
    error = library.call("run_scale", buffers, ("target",))
    return error or (None if torch.equal(target, source * 3) else "the product is wrong")


# What is run, of which sources, and the kernel that it starts.
RUNS = {
    "8 lanes a row": ("loss", lambda library: run_loss(library, 140, 11), "kd_l1_loss_by_rows<.*, 8, true, "),
    "a warp a row": ("loss", lambda library: run_loss(library, 20, 257), "kd_l1_loss_by_rows<.*, 32, true, "),
    "a block a row": ("loss", lambda library: run_loss(library, 3, 1001), "kd_l1_loss_by_rows<.*, 1024, true, "),
    "gather": ("moves", run_gather, "compact_layer"),
    "scale": ("moves", run_scale, "scale_gradients"),
}


@pytest.fixture(scope="module")
def folder(request):
    return build_folder(request.config)


def built(folder, kind, *, changed=None):
    """The library of unchanged sources, or with `changed` in the place of one of them. What is kept of an earlier run
    is used again: a twin is always written at the same place."""
    sources, include = [*SOURCES[kind]], [ROOT / "csrc", ROOT / "csrc" / "include"]
    if changed is not None and changed.suffix == ".cu":
        sources = [changed if path.name == changed.name else path for path in sources]
        assert changed in sources
    elif changed is not None:
        include.insert(0, changed.parent.parent)
    return Library(build(sources, folder, include=include, name=f"planted_{kind}"))


@pytest.fixture(scope="module")
def unchanged(folder):
    return {kind: built(folder, kind) for kind in SOURCES}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("run", RUNS)
def test_the_unchanged_source_passes(unchanged, run, seed):
    kind, execute, kernel = RUNS[run]
    unchanged[kind].emulator.seed = seed
    assert execute(unchanged[kind]) is None
    assert re.search(kernel, unchanged[kind].kernel)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(folder, name):
    fault = FAULTS[name]
    kind, execute, kernel = RUNS[fault.run]
    source = folder / "planted" / name.replace(" ", "_").replace("'", "") / "cuda" / fault.source
    twin(CUDA / fault.source, fault.replace, fault.by, source)
    library = built(folder, kind, changed=source)
    for seed in SEEDS:
        library.emulator.seed = seed
        text = execute(library)
        assert text is not None, f"not found under seed {seed}"
        assert re.search(fault.found, text), text
        if fault.at is None:
            continue
        place = re.match(rf"kernel .*{kernel}.*, block \(\d+, 0, 0\), thread \(\d+, 0, 0\), (\w+\.cuh?):(\d+): ", text)
        assert place, text
        path = source if place[1] == fault.source else CUDA / place[1]
        assert fault.at in path.read_text().splitlines()[int(place[2]) - 1], text
