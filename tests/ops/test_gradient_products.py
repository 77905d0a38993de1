"""The native gradient products agree with PyTorch for random shapes, dtypes and strides, and are about as accurate."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck

from kddp_ext import ops
from kddp_ext.ops import reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NAN, INFINITY = math.nan, math.inf


def inputs(shape, axis, dtype=torch.float32, *, mean=True, seed=0):
    """An activation far from 0, its gradient, and a mean."""
    generator = torch.Generator().manual_seed(seed)
    activation, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
    means = torch.randn(shape[axis], dtype=torch.float64, generator=generator) + 2 if mean else None
    return (activation + 2).to(dtype), gradient.to(dtype), means


def assert_accurate(activation, gradient, mean, axis, samples):
    """The error is at most twice that of PyTorch's formula in the same dtype, and what the last rounding adds."""
    keywords = {"axis": axis, "samples": samples}
    ours = ops.gradient_products(activation, gradient, mean, **keywords)
    plain = reference.gradient_products(activation, gradient, mean, **keywords)
    double = activation.double(), gradient.double()
    # float64 is compared with itself, so the bound is that of a sum of its terms.
    truth = reference.gradient_products(*double, mean, **keywords)
    assert ours.is_contiguous()
    assert ours.shape == truth.shape
    assert ours.dtype == plain.dtype
    if ours.numel() == 0:
        return
    terms = activation.numel() // ours.numel()
    size = reference.gradient_products(
        double[0].abs(), double[1].abs(), None if mean is None else -mean.abs(), **keywords
    )
    epsilon = torch.finfo(ours.dtype).eps
    assert ((ours - truth).abs() <= size * epsilon * (2 + terms / 2)).all()
    if ours.dtype == torch.float32:
        error, allowed = (ours - truth).norm(), 2 * (plain - truth).norm() + epsilon * size.norm()
        assert error <= allowed


@st.composite
def layouts(draw):
    """A shape, the axis of the entries, and the number of samples."""
    samples, repeats = draw(st.integers(1, 5)), draw(st.sampled_from([1, 1, 2, 3]))
    before = draw(st.lists(st.integers(1, 20), max_size=2))
    after = draw(st.sampled_from([[], [], [2], [3, 3], [4, 4], [7, 7], [1, 67], [300], [1300]]))
    entries = draw(st.sampled_from([1, 3, 16, 33, 64, 700]))
    shape = (samples * repeats, *before, entries, *after)
    assume(math.prod(shape) < 100_000)
    return shape, 1 + len(before), samples


def stored(data, tensor):
    """The same values, in another order in memory or with gaps."""
    order = data.draw(st.sampled_from(["contiguous", "contiguous", "transposed", "gaps", "channels_last"]))
    if order == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if order == "gaps":
        return torch.stack([tensor, tensor], -1)[..., 1]
    if order == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


@settings(max_examples=150, deadline=None)
@given(data=st.data(), layout=layouts(), dtype=st.sampled_from(DTYPES), mean=st.booleans(), seed=st.integers(0, 99))
def test_products_are_those_of_pytorch(data, layout, dtype, mean, seed):
    shape, axis, samples = layout
    activation, gradient, means = inputs(shape, axis, dtype, mean=mean, seed=seed)
    assert_accurate(stored(data, activation), stored(data, gradient), means, axis, samples)


@pytest.mark.slow_on_the_emulator
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_large_images_are_summed_accurately(channels_last, dtype):
    activation, gradient, mean = inputs((4, 24, 70, 71), 1, dtype)
    if channels_last:
        activation = activation.contiguous(memory_format=torch.channels_last)
    assert_accurate(activation, gradient, mean, 1, 4)
    assert_accurate(activation, gradient, mean, 1, 2)


def test_channels_last_is_read_without_a_copy(monkeypatch):
    activation, gradient, mean = inputs((2, 5, 3, 3), 1)
    both = [x.contiguous(memory_format=torch.channels_last) for x in (activation, gradient)]
    truth = ops.gradient_products(activation, gradient, mean, axis=1, samples=2)
    copied = []
    contiguous = torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: copied.append(not x.is_contiguous()) or contiguous(x))
    products = ops.gradient_products(*both, mean, axis=1, samples=2)
    assert not any(copied)
    torch.testing.assert_close(products, truth)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (4, 5, 0), (4, 0, 3), (0, 0, 0)])
@pytest.mark.parametrize("samples", [2, 4])
def test_tensors_without_elements_give_zeros(shape, samples):
    products = ops.gradient_products(*inputs(shape, 1), axis=1, samples=samples)
    assert torch.equal(products, torch.zeros(samples, shape[1]))
    if shape[0] == 0:
        assert ops.gradient_products(*inputs(shape, 1), axis=1, samples=0).shape == (0, shape[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("after", [1, 9, 49, 203])
def test_nan_and_infinity_stay_in_their_entry(after, dtype):
    activation, gradient, _ = inputs((2, 6, after), 1, dtype, mean=False)
    gradient[0] = 1
    activation[0, 0, -1] = NAN
    gradient[0, 1, 0] = NAN
    activation[0, 2, -1] = INFINITY
    activation[0, 3, -1], gradient[0, 3, -1] = INFINITY, 0
    activation[0, 4, -1] = -INFINITY
    products = ops.gradient_products(activation, gradient, axis=1, samples=2)
    expected = torch.tensor([NAN, NAN, INFINITY, NAN, -INFINITY], dtype=products.dtype)
    torch.testing.assert_close(products[0, :5], expected, equal_nan=True)
    assert products[0, 5:].isfinite().all()
    assert products[1].isfinite().all()


@pytest.mark.slow_on_the_emulator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "axis"), [((7, 30, 40, 40), 1), ((70, 130, 3, 3), 1), ((9, 300, 96), 2), ((3, 99999), 1)]
)
def test_any_number_of_threads_gives_the_same_bits(shape, axis, dtype):
    arguments = inputs(shape, axis, dtype)
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        results.append(ops.gradient_products(*arguments, axis=axis, samples=shape[0]))
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])


def test_opcheck():
    operator = torch.ops.kddp.gradient_products.default
    activation, gradient, mean = inputs((4, 5, 3), 1)
    opcheck(operator, (activation, gradient, mean, 1, 2))
    opcheck(operator, (activation.bfloat16(), gradient.bfloat16(), None, 2, 4))


def test_compiled_calls_with_another_batch_size_are_not_recompiled():
    counts = CompileCounter()

    @torch.compile(fullgraph=True, backend=counts, dynamic=True)
    def compiled(activation, gradient, mean):
        return ops.gradient_products(activation * 2, gradient, mean, axis=1, samples=activation.shape[0]) + 1

    for batch in (3, 6):
        activation, gradient, mean = inputs((batch, 5, 7), 1)
        expected = ops.gradient_products(activation * 2, gradient, mean, axis=1, samples=batch) + 1
        assert torch.equal(compiled(activation.requires_grad_(), gradient, mean), expected)
    assert counts.frame_count == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"activation": torch.zeros(4, 5, dtype=torch.int64)},
            "activation: expected one of torch.float32, .*torch.int64",
        ),
        ({"axis": 0}, r"axis: expected a dimension of the activation from 1 on, got 0 for .* shape \(4, 5\)"),
        ({"axis": 2}, "axis: expected a dimension of the activation from 1 on, got 2"),
        ({"axis": -1}, "axis: expected a dimension of the activation from 1 on, got -1"),
        ({"gradient": torch.zeros(4, 6)}, r"gradient: expected torch.float32 of shape \(4, 5\) on cpu .*\(4, 6\)"),
        ({"gradient": torch.zeros(4, 5).half()}, "gradient: expected torch.float32 .* got torch.float16"),
        ({"gradient": torch.zeros(4, 5, device="meta")}, "gradient: expected torch.float32 .* on meta"),
        ({"samples": 3}, "samples: expected a divisor of the 4 rows of the activation, got 3"),
        ({"samples": 0}, "samples: expected a divisor of the 4 rows of the activation, got 0"),
        ({"samples": -2}, "samples: expected a divisor of the 4 rows of the activation, got -2"),
        ({"mean": torch.zeros(5)}, "mean: expected a vector of 5 float64 on cpu, got torch.float32"),
        ({"mean": torch.zeros(4, dtype=torch.float64)}, r"mean: expected a vector of 5 float64 .* \(4,\)"),
    ],
)
def test_invalid_arguments_are_refused(changes, message):
    arguments = {"activation": torch.zeros(4, 5), "gradient": torch.zeros(4, 5), "mean": None, "axis": 1, "samples": 2}
    with pytest.raises(ValueError, match=message):
        ops.gradient_products(**arguments | changes)


def test_meta_tensors_run_the_reference():
    activation = torch.zeros(4, 5, 3, device="meta")
    assert ops.gradient_products(activation, activation, axis=1, samples=2).shape == (2, 5)
