"""How many bytes the CUDA kernels move per byte needed, as the emulator counts them.

Moved are 32 bytes for each sector that an access of a warp touches, in the whole launch, including its workspace and
the labels that it counts. Needed is each input and each output once; the emulator fails a launch that does not access
every needed byte. The counts are modelled: a GPU's caches absorb sectors that neighbouring warps share.

`python -m pytest tests/native/cuda/test_traffic.py -s` prints the ratios.
"""

import re
from pathlib import Path

import backends
import pytest
import torch
from emulated_calls import compaction_launch, filled, loss_launch, products_launch, scale_launch

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
ROOT = Path(__file__).parents[3]
NAMES = {F32: "float32", BF16: "bfloat16", F64: "float64"}


@pytest.fixture(scope="module")
def emulated(request):
    emulated = backends.emulated(request.config)
    emulated.emulator.seed = 0
    emulated.emulator.set_devices()
    return emulated


@pytest.fixture
def measure(emulated):
    """Runs a launch, prints the bytes moved per byte needed, and returns that and the report."""

    def measure(what, launch, needed=None):
        needed = launch.needed_bytes if needed is None else needed
        report = launch.run(emulated)
        moved = 32 * (report["sectors_read"] + report["sectors_written"])
        print(f"\n{what:44} {needed:10} bytes needed, {moved / needed:6.3f} times as many moved", end="")
        return moved / needed, report

    return measure


def logits_launch(rows, classes, dtype, layers=(), soft=False, peak=0, **settings):
    """`peak`: a logit near the end of each row, if not 0."""
    generator = torch.Generator().manual_seed(classes)
    student, teacher = (filled(torch.randn(rows, classes, generator=generator).to(dtype)) for _ in range(2))
    if peak:
        student[:, -9], teacher[:, -9] = peak, peak
    labels = filled(torch.randint(0, classes, (rows,), generator=generator))
    if soft:
        labels = filled(torch.randn(rows, classes, generator=generator).softmax(1).to(dtype))
    return loss_launch(student, teacher, labels, [*layers], **settings)


def layer(rows, neurons, dtype):
    return filled(torch.randn(rows, neurons, generator=torch.Generator().manual_seed(neurons)).relu().to(dtype))


VARIANTS = {
    "8 lanes per row": "kd_l1_loss_by_rows<.*, 8, true, ",
    "a warp per row": "kd_l1_loss_by_rows<.*, 32, true, ",
    "a block per row": "kd_l1_loss_by_rows<.*, 1024, true, ",
    "long rows": "kd_l1_loss_by_rows<.*, 1024, false, ",
}


@pytest.mark.parametrize(
    ("rows", "classes", "variant"),
    [
        (64, 11, "8 lanes per row"),
        (64, 64, "8 lanes per row"),
        (64, 257, "a warp per row"),
        (16, 1000, "a block per row"),
        (4, 16384, "a block per row"),
        (16, 20000, "long rows"),
        (2, 32001, "long rows"),
    ],
)
def test_the_kernel_depends_on_the_classes(measure, rows, classes, variant):
    _, report = measure(f"{variant}, {rows} rows of {classes}", logits_launch(rows, classes, F32))
    assert re.search(VARIANTS[variant], report["kernel"])
    assert report["cooperative"] == (rows == 2)
    if rows == 2:
        assert report["grid"] > rows, "several blocks share a row"
    if variant == "long rows" and rows > 2:
        assert report["grid"] <= rows


# Rows, classes, dtype, and the limit of moved over needed bytes.
ALIGNED = [
    *((512, classes, F32, 1.05) for classes in (16, 32, 64, 100, 128)),
    *((64, classes, F32, 1.05) for classes in (1000, 1024, 4096)),
    (16, 16384, F32, 1.05),
    *((512, classes, BF16, 1.05) for classes in (16, 32, 64, 128)),
    *((64, classes, BF16, 1.05) for classes in (1000, 1024, 4096)),
    (16, 16384, BF16, 1.05),
]
"""Rows that begin at multiples of 16 bytes."""
ODD = [
    (512, 101, F32, 1.12),
    (512, 257, F32, 1.05),
    *((64, classes, F32, 1.03) for classes in (1001, 4097)),
    (512, 257, BF16, 1.12),
    *((64, classes, BF16, 1.05) for classes in (1001, 4097)),
]
"""Rows that begin anywhere in a sector, and share their first and last sector with others."""
SHORT = [
    (512, 10, F32, 1.16),
    (512, 11, F32, 1.40),
    (512, 37, F32, 1.29),
    (512, 10, BF16, 1.59),
    (512, 11, BF16, 1.94),
    (512, 37, BF16, 1.40),
    (512, 101, BF16, 1.27),  # a warp per row, 202 bytes: 7.25 sectors instead of 6.3
]
"""Short rows: the ends of a gradient take several stores, and the stores of two rows to one sector count twice."""


@pytest.mark.parametrize(("rows", "classes", "dtype", "most"), [*ALIGNED, *ODD, *SHORT], ids=str)
def test_rows_in_shared_memory_are_moved_once(measure, rows, classes, dtype, most):
    ratio, _ = measure(f"loss, {rows} rows of {classes} {NAMES[dtype]}", logits_launch(rows, classes, dtype))
    assert ratio <= most


@pytest.mark.parametrize(
    ("rows", "classes", "dtype", "most"),
    [(512, 64, F32, 1.05), (512, 257, F32, 1.05), (64, 1000, F32, 1.05), (64, 1000, BF16, 1.05), (8, 20000, F32, 1.05)],
)
def test_probabilities_are_read_twice(measure, rows, classes, dtype, most):
    launch = logits_launch(rows, classes, dtype, soft=True)
    logits = launch.inputs["student"]
    again = logits.numel() * logits.element_size()
    long_row = 3 * again if classes > 16384 else 0
    what = f"loss, {rows} rows of {classes} {NAMES[dtype]}, probabilities"
    assert measure(what, launch, launch.needed_bytes + again + long_row)[0] <= most


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("rows", "classes"), [(8, 20000), (8, 32000), (8, 32001), (2, 32000), (2, 32001)])
def test_long_rows_are_read_twice(measure, rows, classes, dtype):
    """The sums and the gradient both need the logits."""
    launch = logits_launch(rows, classes, dtype)
    once = launch.needed_bytes
    twice = once + sum(launch.inputs[side].nbytes for side in ("student", "teacher"))
    name = f"{rows} rows of {classes} {NAMES[dtype]}"
    ratio, report = measure(f"long rows read twice, {name}", launch, twice)
    assert ratio <= 1.03
    print(f"; {ratio * twice / once:6.3f} times as many as reading once", end="")
    assert re.search(VARIANTS["long rows"], report["kernel"])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_a_confident_row_is_read_as_often_as_others(measure, dtype, divergence):
    """A language model's row has one logit far above those that a thread has read before."""
    launches = [logits_launch(2, 20000, dtype, divergence=divergence, peak=peak) for peak in (0, 15)]
    moved = [measure(f"{divergence}, 2 rows of 20000 {NAMES[dtype]}", launch)[0] for launch in launches]
    assert moved[0] == moved[1]


# With statistics, every part of 64 or more rows writes 5 doubles per neuron, which the last part reads: 80 bytes per 64
# or more elements. Rows of odd widths are read one element per lane, in runs of 128 or 64 bytes.
LAYERS = [(1024, F32, 1.16), (512, F32, 1.16), (100, F32, 1.24), (101, F32, 1.46),
          (1024, BF16, 1.31), (512, BF16, 1.31), (100, BF16, 1.54), (101, BF16, 1.93)]  # fmt: skip


@pytest.mark.parametrize(("neurons", "dtype", "most"), LAYERS, ids=str)
@pytest.mark.parametrize("statistics", [False, True])
def test_activations_are_moved_once(measure, neurons, dtype, most, statistics):
    launch = loss_launch(None, None, None, [layer(256, neurons, dtype)], statistics=statistics)
    name = f"{256} rows of {neurons} {NAMES[dtype]}" + (" with statistics" if statistics else "")
    ratio, _ = measure(f"activations, {name}", launch)
    assert ratio <= (most if statistics else 1.01)


@pytest.mark.parametrize(("neurons", "dtype", "most"), [(512, F32, 1.05), (101, F32, 1.29), (101, BF16, 1.61)], ids=str)
def test_activations_that_are_columns_of_a_wider_matrix(measure, neurons, dtype, most):
    wide = layer(256, neurons + 8, dtype)
    start = 4 if neurons % 4 == 0 else 3
    launch = loss_launch(None, None, None, [wide[:, start : start + neurons]])
    ratio, _ = measure(f"activations, {neurons} columns of {neurons + 8} {NAMES[dtype]}", launch)
    assert ratio <= most


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("statistics", [False, True])
def test_the_launch_of_a_training_step(measure, dtype, statistics):
    launch = logits_launch(256, 100, dtype, [layer(256, 512, dtype)], statistics=statistics)
    ratio, _ = measure(f"loss and 512 neurons, {NAMES[dtype]}" + (" with statistics" if statistics else ""), launch)
    assert ratio <= (1.28 if statistics else 1.05)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("elements", "other"), [(32768, 256 * 512), (100001, 37)])
def test_the_backward_moves_gradients_once(measure, elements, other, dtype):
    gradients = [
        filled(torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)) for n in (elements, other)
    ]
    ratio, report = measure(f"backward, {elements} and {other} {NAMES[dtype]}", scale_launch(gradients, 3.0))
    assert report["kernel"] == "scale_gradients"
    assert ratio <= 1.02


def kept(count, of, seed):
    return filled(torch.randperm(of, generator=torch.Generator().manual_seed(seed))[:count].sort().values)


@pytest.mark.parametrize(
    ("rows", "columns", "of", "dtype", "most"),
    [(256, 512, "rows", F32, 1.04), (256, 512, "rows", BF16, 1.04), (128, 101, "rows", F32, 1.43),
     (128, 101, "rows", BF16, 1.9), (48, 128, "columns", F32, 1.2), (48, 101, "columns", F32, 1.36),
     (48, 128, "both", F32, 1.3), (48, 101, "both", F32, 1.43), (48, 101, "both", BF16, 1.9)],
)  # fmt: skip
def test_the_gather_moves_whole_sectors(measure, rows, columns, of, dtype, most):
    """A weight and two moments. Whole sectors count as needed, because kept columns are spread over them. Rows of odd
    widths begin anywhere in a sector and are moved one element per lane, in runs of 128 or 64 bytes.
    """
    generator = torch.Generator().manual_seed(columns)
    tensors = [filled(torch.randn(rows, columns, generator=generator).to(dtype)) for _ in range(3)]
    keep_rows = kept(rows * 3 // 4, rows, 0) if of in ("rows", "both") else None
    keep_columns = kept(columns * 3 // 4, columns, 1) if of in ("columns", "both") else None
    launch = compaction_launch(tensors, keep_rows, keep_columns)
    ratio, report = measure(
        f"compaction, {of} of {rows} x {columns} {NAMES[dtype]}", launch, launch.needed_sector_bytes
    )
    assert report["kernel"] == "gather_layer"
    for i, tensor in enumerate(tensors):
        expected = tensor if keep_rows is None else tensor[keep_rows]
        expected = expected if keep_columns is None else expected[:, keep_columns]
        assert torch.equal(launch.outputs[f"gathered {i}"], expected)
    assert ratio <= most


@pytest.mark.parametrize(
    ("shape", "most"),
    [((4, 1, 8, 1024), 1.02), ((4, 1, 64, 16), 1.09), ((4, 100, 64, 1), 1.16), ((4, 1, 24, 49), 1.89)],
)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_gradient_products_move_whole_sectors(measure, shape, most, dtype):
    """Entries of 49 elements begin anywhere in a sector and are read one element per lane."""
    generator = torch.Generator().manual_seed(0)
    activation, gradient = (filled(torch.randn(shape, generator=generator).to(dtype)) for _ in range(2))
    mean = filled(torch.randn(shape[2], generator=generator, dtype=torch.float64))
    launch = products_launch(activation, gradient, mean)
    ratio, report = measure(f"products, {shape} {NAMES[dtype]}", launch)
    assert report["kernel"] == "sum_products"
    assert ratio <= most


def conflicts_by_line(report):
    """Bank conflicts by the text of the source line."""
    found = {}
    for site in report["sites"]:
        if not site["shared"] or not site["bank_conflicts"]:
            continue
        path = next(ROOT.glob(f"csrc/**/{Path(site['file']).name}"))
        text = path.read_text().splitlines()[site["line"] - 1].strip()
        found[text] = found.get(text, 0) + site["bank_conflicts"]
    return found


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "dkd", "symmetric_kl"])
@pytest.mark.parametrize(("rows", "classes"), [(8, 1000), (8, 1001), (4, 4097), (2, 20000)])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_block_per_row_has_no_bank_conflicts(measure, rows, classes, dtype, divergence):
    launch = logits_launch(rows, classes, dtype, divergence=divergence)
    _, report = measure(f"{divergence}, {rows} rows of {classes} {NAMES[dtype]}", launch)
    assert conflicts_by_line(report) == {}


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "dkd", "symmetric_kl"])
@pytest.mark.parametrize(("classes", "teams"), [(37, 4), (64, 4), (257, 1), (300, 1)])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_bank_conflicts_of_teams_in_a_warp(measure, classes, teams, dtype, divergence):
    """Four teams access the logits of four labels, which may lie in one bank: at most three more cycles per access.
    There is one such access per four rows, and four with dkd.
    """
    rows = 64
    launch = logits_launch(rows, classes, dtype, divergence=divergence)
    _, report = measure(f"{divergence}, {rows} rows of {classes} {NAMES[dtype]}", launch)
    conflicts = conflicts_by_line(report)
    of_labels = {
        "return label_ < 0 ? T(0) : numbers(row).load(label_index());",
        "numbers(student_cache_).store(label_index(), lowest_number<T>);",
        "numbers(teacher_cache_).store(label_index(), lowest_number<T>);",
    }
    assert set(conflicts) <= (of_labels if teams > 1 else set())
    assert sum(conflicts.values()) <= (teams - 1) * rows / teams * (4 if divergence == "dkd" else 1)
