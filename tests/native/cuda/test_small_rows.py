"""Contiguous rows that begin anywhere in a sector, beside ignored and invalid rows."""

import backends
import pytest
import torch
from emulated_calls import aligned, expected_gradient, filled, loss_launch

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


@pytest.fixture(scope="module")
def emulated(request):
    return backends.emulated(request.config)


def at_offset(matrix, offset):
    """A contiguous copy that starts `offset` elements behind a multiple of 256 bytes."""
    return aligned((matrix.numel() + offset,), matrix.dtype)[offset:].view(matrix.shape).copy_(matrix)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F32, BF16), (BF16, F32), (F64, F32)], ids=str)
@pytest.mark.parametrize(("rows", "classes"), [(3, 10), (9, 1), (70, 11), (34, 37), (6, 53)])
def test_every_row_has_its_own_gradient(emulated, rows, classes, dtypes, offset, seed):
    emulated.emulator.seed = seed
    generator = torch.Generator().manual_seed(rows + seed)
    logits = [torch.randn(rows, classes, generator=generator) for _ in range(2)]
    student, teacher = (at_offset(x.to(dtype), offset) for x, dtype in zip(logits, dtypes, strict=True))
    labels = filled(torch.randint(0, classes, (rows,), generator=generator))
    kinds = torch.rand(rows, generator=generator)
    labels[kinds < 0.2] = -100  # ignored: the gradient is 0
    labels[kinds > 0.9] = classes  # invalid: the gradient is NaN
    launch = loss_launch(student, teacher, labels, [])
    computed = (labels >= 0) & (labels < classes)
    for side, matrix in (("student", student), ("teacher", teacher)):
        launch.parts[side] = [row for row, used in zip(matrix, computed, strict=True) if used]
    report = launch.run(emulated)
    assert f", {32 if F64 in dtypes else 8}, true, " in report["kernel"]
    rtol = 2e-2 if BF16 in dtypes else 1e-4
    torch.testing.assert_close(
        launch.outputs["logits gradient"].double(), expected_gradient(student, teacher, labels), rtol=rtol, atol=1e-6,
        equal_nan=True,
    )  # fmt: skip
