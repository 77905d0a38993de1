"""Batches and views depend on seed, epoch and index alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kddp_ext.workflow.data import ImageData, random_bits, shift_and_flip
from kddp_ext.workflow.errors import WorkflowError

MakeData = Callable[..., ImageData]


def test_the_splits_share_no_image_and_lose_none(image_data: MakeData) -> None:
    data = image_data()
    assert (len(data.train), len(data.validation), len(data.test)) == (50, 10, 7)
    images = torch.cat([data.train.images, data.validation.images]).flatten(1)
    assert len(images.unique(dim=0)) == 60


def test_a_validation_split_that_leaves_no_training_image_is_refused(image_data: MakeData) -> None:
    with pytest.raises(WorkflowError, match="--validation: expected fewer than the 60 images, got 60"):
        image_data(validation=60)


def test_batches_are_a_new_shuffle_each_epoch_and_repeat_exactly(image_data: MakeData) -> None:
    data = image_data()
    epochs = [torch.cat(list(data.batches(epoch, 25, seed=0))) for epoch in (0, 1, 0)]
    assert [sorted(epoch.tolist()) == list(range(50)) for epoch in epochs] == [True] * 3
    assert epochs[0].tolist() == epochs[2].tolist() != epochs[1].tolist()
    assert epochs[0].tolist() != torch.cat(list(data.batches(0, 25, seed=1))).tolist()


@pytest.mark.parametrize(("batch_size", "sizes"), [(25, [25, 25]), (20, [20, 20]), (50, [50]), (999, [50])])
def test_batches_are_full(image_data: MakeData, batch_size: int, sizes: list[int]) -> None:
    assert [len(batch) for batch in image_data().batches(0, batch_size, seed=0)] == sizes


def test_a_view_does_not_depend_on_the_batch_it_is_in(image_data: MakeData) -> None:
    data = image_data()
    together = data.training_images(torch.arange(50), view=3, shift=2)
    for index in (0, 17, 49):
        alone = data.training_images(torch.tensor([index]), view=3, shift=2)
        assert torch.equal(alone[0], together[index])


def test_views_move_by_an_eighth_and_flip_in_every_other_view() -> None:
    # An image whose pixels are their own positions shows where each pixel of a view comes from.
    size, count = 16, 400
    positions = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij"), dim=-1)
    images = positions.to(torch.uint8).expand(count, size, size, 2)
    moves, flips = set(), []
    for view in (0, 1):
        views = shift_and_flip(images, torch.arange(count), seed=5, view=view, shift=2, flips=True).int()
        middle = views[:, 8, 4:12]
        flips.append(middle[:, 1, 1] < middle[:, 0, 1])
        rows = middle[:, 0, 0] - 8
        columns = torch.where(flips[-1], middle[:, 0, 1] - 11, middle[:, 0, 1] - 4)
        moves |= set(zip(rows.tolist(), columns.tolist(), strict=True))
        mirrored = views[:, 0, 8, 0]
        assert torch.equal(mirrored, rows.abs())
    assert moves == {(down, right) for down in range(-2, 3) for right in range(-2, 3)}
    assert torch.equal(flips[0], ~flips[1])
    assert 0.4 < flips[0].float().mean() < 0.6
    unflipped = shift_and_flip(images, torch.arange(count), seed=5, view=0, shift=2, flips=False).int()[:, 8, 4:6, 1]
    assert (unflipped[:, 1] > unflipped[:, 0]).all()


def test_without_augmentation_a_view_is_the_normalised_image(image_data: MakeData) -> None:
    data = image_data(augment=False)
    view = data.training_images(torch.tensor([4]), view=9, shift=2)
    expected = (data.train.images[4].float() - torch.tensor(data.info.mean)) / torch.tensor(data.info.std)
    torch.testing.assert_close(view[0], expected.permute(2, 0, 1))
    assert view.is_contiguous(memory_format=torch.channels_last)


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), purpose=st.integers(0, 9), epoch=st.integers(0, 999))
def test_random_bits_are_even_and_independent(seed: int, purpose: int, epoch: int) -> None:
    indices = torch.arange(4000)
    bits = random_bits(seed, purpose, epoch, indices)
    assert int(bits.min()) >= 0
    assert len(bits.unique()) == len(indices)
    for shift in (0, 20, 40, 61):
        share = (bits >> shift & 1).double().mean()
        assert abs(share - 0.5) < 0.06  # 7 standard deviations
    others = random_bits(seed, purpose, epoch + 1, indices)
    assert abs(((bits ^ others) & 1).double().mean() - 0.5) < 0.06
