"""The pool reuses the memory of a gradient when nothing refers to it any more, and never earlier."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from loss_cases import loss_and_gradient

import kddp_ext
from kddp_ext.ops import GradientPool

SHAPE, BYTES = torch.Size((64, 1024)), 64 * 1024 * 4


@pytest.fixture
def pool():
    return GradientPool(limit=4 * BYTES)


@pytest.mark.parametrize(
    "hold",
    [
        lambda tensor: tensor,
        lambda tensor: tensor[3:5],
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor.untyped_storage(),
        lambda tensor: memoryview(tensor.numpy()),
        lambda tensor: torch.utils.dlpack.to_dlpack(tensor),
        lambda tensor: torch.nn.Parameter(tensor),
        lambda tensor: (torch.ones(1, requires_grad=True) * tensor).sum(),  # a graph that saves it
    ],
)
def test_memory_is_reused_only_after_the_last_reference_is_gone(pool, hold):
    tensor = pool.empty(SHAPE, torch.float32)
    address = tensor.data_ptr()
    reference = hold(tensor)
    del tensor
    assert pool.empty(SHAPE, torch.float32).data_ptr() != address
    del reference
    assert pool.empty(SHAPE, torch.float32).data_ptr() == address


def test_another_shape_or_dtype_has_memory_of_its_own():
    pool = GradientPool(limit=16 * BYTES)
    kinds = [(SHAPE, torch.float32), (SHAPE, torch.float64), (torch.Size((65, 1024)), torch.float32)]
    assert len({pool.empty(*kind).data_ptr() for kind in kinds}) == 3


def test_the_limit_holds_and_unused_memory_is_freed_for_other_shapes(pool):
    tensors = [pool.empty(SHAPE, torch.float32) for _ in range(6)]
    assert pool.bytes == pool.limit
    assert len({tensor.data_ptr() for tensor in tensors}) == 6
    tensors.clear()
    pool.empty(torch.Size((128, 1024)), torch.float32)
    assert pool.bytes <= pool.limit
    pool.release()
    assert pool.bytes == 0


def test_lowering_the_limit_frees_unused_memory_at_once(pool):
    used, unused = pool.empty(SHAPE, torch.float32), pool.empty(SHAPE, torch.float32)
    del unused
    pool.limit = 0
    assert pool.bytes == BYTES
    del used
    pool.limit = 0
    assert pool.bytes == 0
    pool.empty(SHAPE, torch.float32)
    assert pool.bytes == 0


@pytest.mark.parametrize(
    ("limit", "error", "message"),
    [("1 GiB", TypeError, "limit: expected a number of bytes, got '1 GiB'"), (-1, ValueError, "limit: .* got -1")],
)
def test_an_invalid_limit_raises(pool, limit, error, message):
    with pytest.raises(error, match=message):
        pool.limit = limit
    assert pool.limit == 4 * BYTES


def test_tensors_are_on_the_cpu_whatever_the_default_device(pool):
    with torch.device("meta"):
        assert all(pool.empty(shape, torch.float32).is_cpu for shape in (SHAPE, torch.Size((3,))))


def test_threads_never_share_memory(pool):
    def stays_its_own(number):
        for _ in range(300):
            tensor = pool.empty(SHAPE, torch.float32)
            tensor[0, :8] = number
            if not bool((tensor[0, :8] == number).all()):
                return False
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(stays_its_own, range(4)))


def test_later_losses_do_not_overwrite_gradients_in_use():
    student = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(64, dtype=torch.int64)
    gradients = []
    for temperature in (1.0, 2.0, 3.0):
        _, gradient = loss_and_gradient(student, student * 0.5, labels, temperature=temperature)
        gradients.append((gradient, gradient.clone()))
    assert all(torch.equal(gradient, copy) for gradient, copy in gradients)
    before = kddp_ext.gradient_pool.bytes
    gradients.clear()
    del gradient
    kddp_ext.gradient_pool.release()
    assert kddp_ext.gradient_pool.bytes < before
