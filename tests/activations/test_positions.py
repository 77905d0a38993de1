"""Activations with positions: channels of convolutions, layers along sequences, flattened channels; kept samples."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import DTYPES

import kddp_ext
from kddp_ext.activations.layout import as_matrix
from kddp_ext.activations.statistics import NeuronStatistics, SampleRing, TrackedActivations, _Updates

SHAPES = {
    "channels": ((6, 5, 4, 3), 1),
    "one position": ((6, 5, 1, 1), 1),
    "one channel": ((6, 1, 4, 3), 1),
    "signals": ((6, 5, 7), 1),
    "volumes": ((6, 5, 2, 3, 2), 1),
    "tokens": ((6, 4, 5), 2),
    "tokens first": ((4, 6, 5), 2),
    "flattened": ((6, 3, 5, 2), 2),
}
each_shape = pytest.mark.parametrize(("shape", "axis"), SHAPES.values(), ids=list(SHAPES))


def draw(shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).relu().to(dtype)


def loss_of(values, axis, statistics, rows=6, **options):
    student, teacher = torch.randn(2, rows, 7, generator=torch.Generator().manual_seed(2)).to(values.dtype)
    values = values if values.requires_grad else values.detach().requires_grad_()
    tracked = TrackedActivations([values], [statistics], [axis])
    options = {"l1_weight": 0.5, "return_terms": True} | options
    return kddp_ext.fused_kd_l1_loss(student.requires_grad_(), teacher, torch.arange(rows) % 7, tracked, **options)


def strided_copies(values):
    """The same values in other memory layouts."""
    yield values
    yield torch.cat([values, values], 0)[::2].copy_(values)
    if values.dim() == 4:
        yield values.contiguous(memory_format=torch.channels_last)
        yield F.pad(values, (1, 2))[..., 1:-2]


def check(values, axis, backend, rows=6):
    """Hold penalty, gradient and statistics of one activation to their definitions in float64."""
    leaf = values.detach().requires_grad_()
    by_loss, by_observe = NeuronStatistics(values.shape[axis]), NeuronStatistics(values.shape[axis])
    loss, terms = loss_of(leaf, axis, by_loss, rows, backend=backend)
    loss.backward()
    by_observe.observe(values, axis - values.dim())  # the same axis, counted from the last
    columns = values.double().movedim(axis, -1).flatten(0, -2)
    count = len(columns)
    double = values.dtype == torch.float64
    close = {"rtol": 1e-12, "atol": 1e-12} if double else {"rtol": 2e-6, "atol": 1e-7}
    torch.testing.assert_close(terms.l1.double(), columns.abs().sum(0).sum() / max(count, 1), **close)
    gradient = 0.5 / max(count, 1) * values.double().sign()
    torch.testing.assert_close(leaf.grad.double(), gradient, rtol=2 * torch.finfo(values.dtype).eps, atol=1e-12)
    sums = [columns.abs().sum(0), columns.sum(0), columns.square().sum(0), (columns != 0).double().sum(0)]
    highest = columns.abs().amax(0) if count else torch.zeros_like(sums[0])
    close = {"rtol": 1e-12, "atol": 1e-12} if double else {"rtol": 1e-6, "atol": 1e-6}
    for statistics in (by_loss, by_observe):
        torch.testing.assert_close(statistics.values, torch.stack([*sums, highest]), **close)
        assert statistics.rows == count


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float64], ids=str)
@each_shape
def test_penalty_gradient_and_statistics_equal_their_definitions(shape, axis, dtype, backend):
    for values in strided_copies(draw(shape, dtype)):
        check(values, axis, backend)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 70), st.integers(1, 40), st.integers(1, 40), st.booleans(), st.integers(0, 1000))
def test_any_sizes(rows, channels, positions, last, seed):
    values = draw((rows, channels, positions, 1), seed=seed)
    check(values.contiguous(memory_format=torch.channels_last) if last else values, 1, "native", rows)


def test_a_plain_sequence_of_activations_needs_no_pruner():
    logits, labels = torch.zeros(2, 6, 7), torch.arange(6)
    channels, neurons = draw((6, 5, 4, 3)), draw((6, 9))
    _, terms = kddp_ext.fused_kd_l1_loss(*logits, labels, [channels, neurons], l1_weight=0.1, return_terms=True)
    torch.testing.assert_close(terms.l1, channels.mean((0, 2, 3)).sum() + neurons.mean(0).sum())


def test_matrices_are_views_if_possible():
    channels, tokens = draw((6, 5, 4, 3)), draw((6, 4, 5))
    last = channels.contiguous(memory_format=torch.channels_last)
    cases = [(channels, 1, (6, 60)), (last, 1, (72, 5)), (tokens, 2, (24, 5)), (tokens[0], 1, (4, 5))]
    for tensor, axis, shape in cases:
        matrix = as_matrix(tensor, axis).values
        assert matrix.shape == shape
        assert matrix.data_ptr() == tensor.data_ptr()


def test_sums_of_positions():
    values = draw((6, 3, 5, 2), torch.float64)
    statistics = NeuronStatistics(5, positions=6)
    batches = [batch.repeat(2, 1, 1, 1)[:6] for batch in (values[:4], values[4:])]
    for batch in batches:
        loss_of(batch, 2, statistics)
    mean = torch.cat(batches).mean(0).transpose(0, 1).flatten(1)
    torch.testing.assert_close(statistics.position_mean, mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(statistics.position_mean.mean(1), statistics.mean, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match=r"state: expected position_sums of shape None, got \(5, 6\)"):
        NeuronStatistics(5).load_state_dict(statistics.state_dict())


def add(ring, matrix):
    updates = _Updates()
    ring.add(matrix, updates)
    updates.make()


def test_a_ring_keeps_the_latest():
    ring = SampleRing(16, 3)
    for batch in range(20):
        add(ring, as_matrix(torch.full((10, 3), float(batch))))
    assert ring.filled == 16
    assert sorted(set(ring.samples[:, 0].tolist())) == [float(batch) for batch in range(12, 20)]
    other = SampleRing(16, 3)
    other.load_state_dict(ring.state_dict())
    add(ring, as_matrix(torch.ones(10, 3)))
    add(other, as_matrix(torch.ones(10, 3)))
    assert torch.equal(ring.values, other.values)
    with pytest.raises(ValueError, match="at most 16 samples of 4 neurons, got a tensor of shape"):
        SampleRing(16, 4).load_state_dict(ring.state_dict())


def test_layers_of_a_pass_share_the_places_of_samples():
    layers = [as_matrix(torch.randn(10, width, generator=torch.Generator().manual_seed(width))) for width in (3, 5)]
    shared, alone = ([SampleRing(16, 3), SampleRing(16, 5)] for _ in range(2))
    for _ in range(3):
        updates = _Updates()
        for layer, together, apart in zip(layers, shared, alone, strict=True):
            together.add(layer, updates)
            add(apart, layer)
        assert len(updates._places) == 1
        updates.make()
    for together, apart in zip(shared, alone, strict=True):
        assert torch.equal(together.values, apart.values)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_ring_takes_whole_samples(memory_format):
    """Each row has the channels of one position of one image."""
    images = torch.arange(5 * 4 * 3 * 3.0).view(5, 4, 3, 3).contiguous(memory_format=memory_format)
    ring = SampleRing(64, 4)
    for _ in range(30):
        add(ring, as_matrix(images))
    positions = {tuple(row) for row in images.movedim(1, -1).flatten(0, -2).tolist()}
    assert {tuple(row) for row in ring.samples.tolist()} <= positions
    assert len({tuple(row) for row in ring.samples.tolist()}) > 20  # and not always the same ones
