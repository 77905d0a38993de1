"""Activations with positions: channels of convolutions, layers along sequences, flattened channels."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import kddp_ext
from kddp_ext.activations.layout import as_matrix
from kddp_ext.activations.statistics import NeuronStatistics, TrackedActivations

SHAPES = {
    "channels": ((6, 5, 4, 3), 1),
    "one position": ((6, 5, 1, 1), 1),
    "one channel": ((6, 1, 4, 3), 1),
    "a signal": ((6, 5, 7), 1),
    "volumes": ((6, 5, 2, 3, 2), 1),
    "tokens": ((6, 4, 5), 2),
    "tokens first": ((4, 6, 5), 2),
    "flattened": ((6, 3, 5, 2), 2),
}


def activation(shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).relu().to(dtype)


def logits(rows, dtype=torch.float32):
    student, teacher = torch.randn(2, rows, 7, generator=torch.Generator().manual_seed(2)).to(dtype)
    return student.requires_grad_(), teacher, torch.arange(rows) % 7


def loss_of(values, axis, statistics=None, **options):
    student, teacher, labels = logits(6, values.dtype)
    axes = [axis]
    tracked = TrackedActivations([values], [statistics or NeuronStatistics(values.shape[axis])], axes)
    return kddp_ext.fused_kd_l1_loss(student, teacher, labels, tracked, l1_weight=0.5, return_terms=True, **options)


def penalty(values, axis):
    """Σ over neurons of the mean of |a| over samples and positions, in float64."""
    return values.double().abs().movedim(axis, -1).flatten(0, -2).mean(0).sum()


def layouts(values):
    """The same numbers in other memory."""
    yield "contiguous", values
    yield "strided", torch.cat([values, values], 0)[::2].copy_(values) if values.dim() else values
    if values.dim() == 4:
        yield "channels_last", values.contiguous(memory_format=torch.channels_last)
        yield "sliced", F.pad(values, (1, 2))[..., 1:-2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "axis"), SHAPES.values(), ids=list(SHAPES))
def test_penalty_gradient_and_statistics(kernels, shape, axis, dtype):
    values = activation(shape, dtype)
    for name, laid_out in layouts(values):
        leaf = laid_out.detach().requires_grad_()
        statistics = NeuronStatistics(shape[axis])
        loss, terms = loss_of(leaf, axis, statistics)
        loss.backward()
        expected = penalty(values, axis)
        assert float(terms.l1) == pytest.approx(float(expected), rel=2e-6), name
        count = values.numel() // shape[axis]
        gradient = 0.5 / count * values.double().sign()
        torch.testing.assert_close(leaf.grad.double(), gradient, rtol=2 * torch.finfo(dtype).eps, atol=1e-12)
        columns = values.double().movedim(axis, -1).flatten(0, -2)
        whole = [columns.abs().sum(0), columns.sum(0), columns.square().sum(0), (columns != 0).double().sum(0)]
        torch.testing.assert_close(
            statistics.values, torch.stack([*whole, columns.abs().amax(0)]), rtol=1e-6, atol=1e-6
        )
        assert statistics.rows == count


@pytest.mark.parametrize(("shape", "axis"), SHAPES.values(), ids=list(SHAPES))
def test_backends_agree_and_observing_counts_alike(shape, axis):
    values = activation(shape, torch.float64)
    counted = [NeuronStatistics(shape[axis]) for _ in range(3)]
    native, reference = loss_of(values, axis, counted[0]), loss_of(values, axis, counted[1], backend="reference")
    counted[2].observe(values, axis)
    torch.testing.assert_close(native[0], reference[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(native[1].l1, reference[1].l1, rtol=1e-12, atol=0)
    for other in counted[1:]:
        torch.testing.assert_close(counted[0].values, other.values, rtol=1e-12, atol=1e-12)
        assert counted[0].rows == other.rows


def test_a_plain_sequence_of_channels_needs_no_pruner():
    student, teacher, labels = logits(6)
    channels = activation((6, 5, 4, 3)).requires_grad_()
    loss, terms = kddp_ext.fused_kd_l1_loss(
        student, teacher, labels, [channels, activation((6, 9))], l1_weight=0.1, return_terms=True
    )
    loss.backward()
    expected = penalty(channels.detach(), 1) + penalty(activation((6, 9)), 1)
    assert float(terms.l1) == pytest.approx(float(expected), rel=1e-6)
    assert channels.grad.shape == channels.shape


def test_matrices_are_views_where_they_can_be():
    channels = activation((6, 5, 4, 3))
    last = channels.contiguous(memory_format=torch.channels_last)
    assert as_matrix(channels).values.shape == (6, 60)
    assert as_matrix(last).values.shape == (72, 5)
    assert as_matrix(activation((6, 4, 5)), 2).values.shape == (24, 5)
    for tensor, axis in ((channels, 1), (last, 1), (activation((6, 4, 5)), 2), (activation((6, 9)), 1)):
        assert as_matrix(tensor, axis).values.data_ptr() == tensor.data_ptr()


def test_sums_of_positions():
    values = activation((6, 3, 5, 2), torch.float64)
    statistics = NeuronStatistics(5, positions=6)
    for batch in (values[:4], values[4:]):
        loss_of(batch.repeat(2, 1, 1, 1)[:6], 2, statistics)
    seen = torch.cat([values[:4].repeat(2, 1, 1, 1)[:6], values[4:].repeat(2, 1, 1, 1)[:6]])
    torch.testing.assert_close(statistics.position_mean, seen.mean(0).transpose(0, 1).flatten(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(statistics.position_mean.mean(1), statistics.mean, rtol=1e-12, atol=0)
    restored = NeuronStatistics(5, positions=6)
    restored.load_state_dict(statistics.state_dict())
    assert torch.equal(restored.position_sums, statistics.position_sums)
    kept = statistics.select(torch.tensor([1, 4]))
    assert torch.equal(kept.position_mean, statistics.position_mean[[1, 4]])
    statistics.reset()
    assert not statistics.position_sums.any()
    with pytest.raises(ValueError, match=r"state: expected position_sums of shape None, got \(5, 6\)"):
        NeuronStatistics(5).load_state_dict(restored.state_dict())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 70),
    channels=st.integers(1, 40),
    positions=st.integers(1, 40),
    last=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_sizes(rows, channels, positions, last, seed):
    values = activation((rows, channels, positions, 1), seed=seed)
    values = values.contiguous(memory_format=torch.channels_last) if last else values
    student, teacher = torch.randn(2, rows, 3)
    statistics = NeuronStatistics(channels)
    leaf = values.detach().requires_grad_()
    loss, terms = kddp_ext.fused_kd_l1_loss(
        student, teacher, torch.zeros(rows, dtype=torch.int64), TrackedActivations([leaf], [statistics]),
        l1_weight=1.0, return_terms=True,
    )  # fmt: skip
    loss.backward()
    expected = penalty(values, 1) if rows else torch.zeros(())
    assert float(terms.l1) == pytest.approx(float(expected), rel=1e-5, abs=1e-7)
    torch.testing.assert_close(leaf.grad, values.sign() / max(rows * positions, 1))
    assert statistics.rows == rows * positions


def test_compiles_without_a_graph_break():
    student, teacher, labels = logits(6)
    channels = activation((6, 5, 4, 3)).requires_grad_()

    def run(values):
        return kddp_ext.fused_kd_l1_loss(student, teacher, labels, [values], l1_weight=0.1)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(channels), run(channels))
    (ours,) = torch.autograd.grad(compiled(channels), channels)
    torch.testing.assert_close(ours, torch.autograd.grad(run(channels), channels)[0])


@pytest.mark.parametrize("shape", [(6,), (5, 6, 2)])
def test_other_shapes_are_refused(shape):
    student, teacher, labels = logits(6)
    with pytest.raises(ValueError, match=r"activations\[0\]: expected .*got shape"):
        kddp_ext.fused_kd_l1_loss(student, teacher, labels, [torch.ones(shape)])
