"""Memory of gradients is used again once nobody holds it, and never before."""

import threading

import pytest
import torch

import kddp_ext
from kddp_ext.ops import GradientPool

SHAPE, LARGE = torch.Size((64, 1024)), 64 * 1024 * 4


@pytest.fixture
def pool():
    return GradientPool(limit=4 * LARGE)


def test_memory_comes_back_when_the_tensor_is_gone(pool):
    address = pool.empty(SHAPE, torch.float32).data_ptr()
    assert pool.empty(SHAPE, torch.float32).data_ptr() == address
    assert pool.bytes == LARGE


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
        lambda tensor: (torch.ones(1, requires_grad=True) * tensor).sum(),  # a graph that has saved it
    ],
)
def test_whoever_holds_it_keeps_it(pool, hold):
    tensor = pool.empty(SHAPE, torch.float32)
    address = tensor.data_ptr()
    held = hold(tensor)
    del tensor
    assert pool.empty(SHAPE, torch.float32).data_ptr() != address
    del held
    assert pool.empty(SHAPE, torch.float32).data_ptr() == address


def test_another_shape_or_dtype_has_memory_of_its_own():
    pool = GradientPool(limit=16 * LARGE)
    addresses = {
        pool.empty(shape, dtype).data_ptr()
        for shape, dtype in [(SHAPE, torch.float32), (SHAPE, torch.float64), (torch.Size((65, 1024)), torch.float32)]
    }
    assert len(addresses) == 3


def test_the_limit_holds_and_what_is_free_makes_room(pool):
    held = [pool.empty(SHAPE, torch.float32) for _ in range(6)]
    assert pool.bytes == pool.limit
    assert len({tensor.data_ptr() for tensor in held}) == 6
    held.clear()
    pool.empty(torch.Size((128, 1024)), torch.float32)
    assert pool.bytes <= pool.limit
    pool.release()
    assert pool.bytes == 0


def test_a_limit_of_zero_keeps_nothing():
    pool = GradientPool(limit=0)
    pool.empty(SHAPE, torch.float32)
    assert pool.bytes == 0


def test_a_lowered_limit_holds_at_once(pool):
    held, free = pool.empty(SHAPE, torch.float32), pool.empty(SHAPE, torch.float32)
    del free
    pool.limit = 0
    assert pool.bytes == LARGE  # nobody takes what is in use away
    del held
    pool.limit = 0
    assert pool.bytes == 0


@pytest.mark.parametrize(
    ("limit", "error", "message"),
    [("1 GiB", TypeError, "limit: expected a number of bytes, got '1 GiB'"), (-1, ValueError, "limit: .* got -1")],
)
def test_a_limit_that_is_none(pool, limit, error, message):
    with pytest.raises(error, match=message):
        pool.limit = limit
    assert pool.limit == 4 * LARGE


def test_it_lies_on_the_cpu_whatever_the_default_device(pool):
    with torch.device("meta"):
        kept, small = pool.empty(SHAPE, torch.float32), pool.empty(torch.Size((3,)), torch.float32)
    assert kept.is_cpu
    assert small.is_cpu


def test_threads_never_share(pool):
    mistakes = []

    def work(number):
        for _ in range(300):
            tensor = pool.empty(SHAPE, torch.float32)
            tensor[0, :8] = number
            if not bool((tensor[0, :8] == number).all()):
                mistakes.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not mistakes


def test_gradients_that_are_kept_are_never_written_over():
    student = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.zeros(64, dtype=torch.int64)
    kept = []
    for temperature in (1.0, 2.0, 3.0):
        student.grad = None
        loss = kddp_ext.fused_kd_l1_loss(student, student.detach() * 0.5, labels, temperature=temperature)
        loss.backward()
        kept.append((student.grad, student.grad.clone()))
    assert all(torch.equal(grad, copy) for grad, copy in kept)
    before = kddp_ext.gradient_pool.bytes
    kept.clear()
    student.grad = None
    del loss
    kddp_ext.gradient_pool.release()
    assert kddp_ext.gradient_pool.bytes < before
