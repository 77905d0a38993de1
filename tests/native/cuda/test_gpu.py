"""What only a GPU can show: streams, graphs, devices. The tests of numbers run there too (tests/conftest.py)."""

import pytest
import torch

import kddp_ext

pytestmark = pytest.mark.cuda


def loss_of(student, teacher, labels, activation):
    return kddp_ext.fused_kd_l1_loss(student, teacher, labels, [activation], l1_weight=0.1, backend="native")


def batch(device="cuda"):
    tensors = torch.randn(64, 100), torch.randn(64, 100), torch.randint(0, 100, (64,)), torch.randn(64, 33)
    return [x.to(device) for x in tensors]


def on_side_stream(function):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = function()
    torch.cuda.current_stream().wait_stream(stream)
    return result


def test_the_gpu_computes_what_the_cpu_computes():
    assert kddp_ext.build_info()["cuda"], "there is a GPU, and kddp_ext was built without CUDA kernels"
    inputs = batch("cpu")
    torch.testing.assert_close(loss_of(*(x.cuda() for x in inputs)).cpu(), loss_of(*inputs))


def test_a_side_stream_gives_the_same_result():
    inputs = batch()
    expected = loss_of(*inputs)
    assert torch.equal(on_side_stream(lambda: loss_of(*inputs)), expected)


def test_a_graph_captures_forward_and_backward():
    inputs = batch()
    student = inputs[0].requires_grad_()
    (expected,) = on_side_stream(lambda: torch.autograd.grad(loss_of(*inputs), student))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (captured,) = torch.autograd.grad(loss_of(*inputs), student)
    for _ in range(3):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)


def test_launches_repeat_bit_for_bit():
    inputs = batch()
    assert len({loss_of(*inputs).item() for _ in range(20)}) == 1


def test_a_device_other_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is only one CUDA device")
    inputs = batch("cuda:1")
    with torch.cuda.device(0):
        loss = loss_of(*inputs)
        assert torch.cuda.current_device() == 0
    torch.testing.assert_close(loss.cpu(), loss_of(*(x.cpu() for x in inputs)))
