"""Rows of few classes, which a warp reads and writes as one where they lie side by side: on the emulator, whatever is
next to what. Ignored rows have a gradient of 0, those with a label that is no class one that is not a number."""

import backends
import pytest
import torch
from emulated_calls import aligned, filled, loss_launch

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


@pytest.fixture(scope="module")
def emulated(request):
    return backends.emulated(request.config)


def expected(student, teacher, labels):
    """The gradient with respect to the student's logits in float64: temperature 4, alpha 0.9, forward divergence."""
    classes = student.shape[1]
    ignored, valid = labels == -100, (labels >= 0) & (labels < classes)
    leaf = student.double().requires_grad_()
    rows = torch.nn.functional.kl_div((leaf / 4).log_softmax(1), (teacher.double() / 4).softmax(1), reduction="none")
    kd = 16 * rows.sum(1)[valid].sum()
    ce = torch.nn.functional.cross_entropy(leaf[valid], labels[valid], reduction="sum")
    ((0.9 * kd + 0.1 * ce) / max(1, int((~ignored).sum()))).backward()
    leaf.grad[~ignored & ~valid] = torch.nan
    return leaf.grad


def beside(matrix, offset):
    """The same numbers, `offset` elements behind a multiple of 256 bytes."""
    rows, columns = matrix.shape
    return aligned((rows * columns + offset,), matrix.dtype)[offset:].view(rows, columns).copy_(matrix)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F32, BF16), (BF16, F32), (F64, F32)], ids=str)
@pytest.mark.parametrize(("rows", "classes"), [(1, 11), (3, 10), (5, 3), (9, 1), (70, 11), (34, 37), (6, 61)])
def test_every_row_has_its_own_gradient(emulated, rows, classes, dtypes, offset, seed):
    emulated.emulator.seed = seed
    generator = torch.Generator().manual_seed(rows + seed)
    student, teacher = (beside(torch.randn(rows, classes, generator=generator).to(dtype), offset) for dtype in dtypes)
    labels = filled(torch.randint(0, classes, (rows,), generator=generator))
    kinds = torch.rand(rows, generator=generator)
    labels[kinds < 0.2] = -100
    labels[kinds > 0.9] = classes
    launch = loss_launch(student, teacher, labels, [])
    computed = (labels >= 0) & (labels < classes)
    for side, matrix in (("student", student), ("teacher", teacher)):
        launch.parts[side] = [row for row, used in zip(matrix, computed, strict=True) if used]
    report = launch.run(emulated)
    lanes = 32 if F64 in dtypes else 8
    assert f", {lanes}, true, " in report["kernel"]
    assert not emulated.counters.any()
    gradient = launch.outputs["logits gradient"]
    torch.testing.assert_close(
        gradient.double(), expected(student, teacher, labels), rtol=2e-2 if BF16 in dtypes else 1e-4, atol=1e-6,
        equal_nan=True,
    )  # fmt: skip
