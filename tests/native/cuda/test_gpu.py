"""On a GPU, what only a GPU shows: streams, graphs, devices. The numeric suite runs there too (tests/conftest.py)."""

import pytest
import torch

import kddp_ext

pytestmark = pytest.mark.cuda


def loss_of(student, teacher, labels, activation):
    return kddp_ext.fused_kd_l1_loss(student, teacher, labels, [activation], l1_weight=0.1, backend="native")


def batch():
    return torch.randn(64, 100), torch.randn(64, 100), torch.randint(0, 100, (64,)), torch.randn(64, 33)


def test_the_numeric_suite_has_a_gpu_to_run_on():
    assert kddp_ext.build_info()["cuda"], "there is a GPU, and kddp_ext was built without CUDA"
    on_cpu = batch()
    torch.testing.assert_close(loss_of(*(x.cuda() for x in on_cpu)).cpu(), loss_of(*on_cpu))


def test_a_side_stream():
    inputs = [x.cuda() for x in batch()]
    expected = loss_of(*inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = loss_of(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(on_stream, expected)


def test_a_graph_of_forward_and_backward():
    inputs = [x.cuda() for x in batch()]
    student = inputs[0].requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        (expected,) = torch.autograd.grad(loss_of(*inputs), student)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (captured,) = torch.autograd.grad(loss_of(*inputs), student)
    for _ in range(3):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)


def test_launches_repeat_bit_for_bit():
    inputs = [x.cuda() for x in batch()]
    assert len({loss_of(*inputs).item() for _ in range(20)}) == 1


def test_a_device_other_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device alone")
    inputs = [x.to("cuda:1") for x in batch()]
    with torch.cuda.device(0):
        loss = loss_of(*inputs)
        assert torch.cuda.current_device() == 0
    torch.testing.assert_close(loss.cpu(), loss_of(*(x.cpu() for x in inputs)))
