"""A ring keeps the latest samples of a layer."""

import pytest
import torch

from kddp_ext.activations.layout import as_matrix
from kddp_ext.activations.statistics import SampleRing


def test_a_ring_keeps_the_latest():
    ring = SampleRing(16, 3)
    for batch in range(20):
        ring.add(as_matrix(torch.full((10, 3), float(batch))))
    assert ring.filled == 16
    assert sorted(set(ring.samples[:, 0].tolist())) == [float(batch) for batch in range(12, 20)]
    other = SampleRing(16, 3)
    other.load_state_dict(ring.state_dict())
    ring.add(as_matrix(torch.ones(10, 3)))
    other.add(as_matrix(torch.ones(10, 3)))
    assert torch.equal(ring.values, other.values)
    with pytest.raises(ValueError, match="at most 16 samples of 4 neurons, got a tensor of shape"):
        SampleRing(16, 4).load_state_dict(ring.state_dict())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_ring_takes_whole_samples(memory_format):
    """Each row has the channels of one position of one image."""
    images = torch.arange(5 * 4 * 3 * 3.0).view(5, 4, 3, 3).contiguous(memory_format=memory_format)
    ring = SampleRing(64, 4)
    for _ in range(30):
        ring.add(as_matrix(images))
    positions = {tuple(row) for row in images.movedim(1, -1).flatten(0, -2).tolist()}
    assert {tuple(row) for row in ring.samples.tolist()} <= positions
    assert len({tuple(row) for row in ring.samples.tolist()}) > 20  # and not always the same ones
