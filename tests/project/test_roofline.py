"""The model of costs on a GPU: bytes from shapes, arithmetic, PyTorch's operations, and counts on the emulator."""

import json

import backends
import pytest
import torch
import torch.nn.functional as F

from benchmarks.cases import Shape
from benchmarks.roofline import __main__ as command
from benchmarks.roofline import emulated, gpus, model, passes, tables
from benchmarks.roofline.torch_operations import OperationCounter


@pytest.fixture
def counter(request):
    """Counts whole shapes on the emulated module of the other tests."""
    return emulated.Counter(backends.emulated(request.config), None)


def test_needed_bytes_of_a_shape():
    shape = Shape(6, 10, 4, torch.bfloat16)
    logits, activations, labels = 2 * 6 * 10, 2 * 6 * 4, 8 * 6
    assert passes.forward_bytes(shape) == 3 * logits + 2 * activations + labels
    assert passes.backward_bytes(shape) == 2 * (logits + activations)
    layer = passes.Layer(8, 6, tensors=4)
    assert passes.compaction_bytes(layer) == 4 * (4 * 3 * 4 * 2) + 8 * (4 + 3)


def test_arithmetic_of_the_model():
    gpu = gpus.Gpu("made up", bandwidth=1e9, multiprocessors=10, clock=1e6, source="")
    assert gpu.exponentials == 16e7
    assert gpu.instructions == 128e7
    traffic = model.Traffic(launches=3, needed_bytes=1e6, moved_bytes=2e6, exponentials=1.6e5)
    by_memory = model.modelled(traffic, gpu, 1e-6)
    assert by_memory == pytest.approx((3e-6, 2e-3, 1e-3, 0, 3e-6 + 2e-3, 1e-3))
    assert by_memory.bound == "memory"
    by_exponentials = model.modelled(traffic._replace(exponentials=8e5), gpu, 1e-6)
    assert by_exponentials == pytest.approx((3e-6, 2e-3, 5e-3, 0, 3e-6 + 5e-3, 1e-3))
    assert by_exponentials.bound == "exponentials"
    by_instructions = model.modelled(traffic._replace(instructions=1.28e7), gpu, 1e-6)
    assert by_instructions == pytest.approx((3e-6, 2e-3, 1e-3, 1e-2, 3e-6 + 1e-2, 1e-3))
    assert by_instructions.bound == "instructions"
    assert model.modelled(traffic, gpu, 1e-2).bound == "launches"
    assert traffic.times(2) == (3, 2e6, 4e6, 3.2e5, 0)
    assert traffic.plus(traffic) == (6, 2e6, 4e6, 3.2e5, 0)


def count(run):
    with OperationCounter() as operations:
        run()
    return operations


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bytes_of_single_operations(device):
    x = torch.zeros(8, 10, device=device)
    labels = torch.zeros(8, dtype=torch.int64, device=device)
    index = torch.zeros(3, dtype=torch.int64, device=device)
    matrix = 4 * 80

    def bytes_of(run):
        return [(operation.read_bytes, operation.written_bytes) for operation in count(run).operations]

    assert bytes_of(lambda: x * x) == [(2 * matrix, matrix)]
    assert bytes_of(lambda: x.t()[:2].detach()) == []
    assert bytes_of(lambda: torch.empty_like(x)) == []
    assert bytes_of(lambda: torch.zeros_like(x)) == [(0, matrix)]
    assert bytes_of(lambda: x.sum()) == [(matrix, 4)]
    assert bytes_of(lambda: x.add_(1)) == [(matrix, matrix)]
    assert bytes_of(lambda: F.log_softmax(x, 1)) == [(matrix, matrix)]
    assert bytes_of(lambda: -x[:1].expand(8, 10)) == [(4 * 10, matrix)]
    assert bytes_of(lambda: F.nll_loss(x, labels)) == [(8 * 32 + 8 * 8, 4 + 4)]
    assert bytes_of(lambda: x.index_select(0, index)) == [(4 * 30 + 8 * 3, 4 * 30)]


def test_bytes_of_the_eager_loss_equal_a_sum_by_hand():
    shape = Shape(64, 100, 32)
    forward, backward, usual = command.eager_loss(shape)
    logits, activations = 4 * 64 * 100, 4 * 64 * 32
    # Two divisions, three softmaxes, xlogy, product, difference, sum; abs and sum.
    forward_bytes = (2 * 2 + 3 * 2 + 3 * 3 + 1) * logits + (2 + 1) * activations
    # nll_loss and the logarithm's, neg, product, the logarithm's, division, sum of both; sgn and product.
    backward_bytes = (1 + 3 + 1 + 3 + 3 + 2 + 3) * logits + (2 + 2) * activations
    small = 64 * (32 + 8) + 20 * 3 * 4  # the labels' logarithms, and scalars
    assert 0 <= forward.moved_bytes - forward_bytes <= small
    assert 0 <= backward.moved_bytes - backward_bytes <= small
    assert backward == usual
    assert (forward.launches, backward.launches) == (19, 16)


@pytest.mark.parametrize(
    ("rows", "classes", "neurons", "exponentials"),
    [(16, 100, 64, 2), (2, 20000, 0, 4)],  # rows in shared memory, and rows that are read twice
)
def test_the_emulated_loss_moves_little_more_than_needed(counter, rows, classes, neurons, exponentials):
    shape = Shape(rows, classes, neurons)
    forward, backward, usual = counter.loss(shape, 4)
    # Reading both sides twice moves 5 arrays instead of 3.
    least = forward.needed_bytes * (1 if exponentials == 2 else 5 / 3)
    counters = 4 * 4096  # which a small kernel sets to 0
    assert least - 8 * rows <= forward.moved_bytes - counters <= 1.3 * least
    assert forward.exponentials == exponentials * rows * classes
    assert backward.needed_bytes <= backward.moved_bytes <= 1.1 * backward.needed_bytes
    assert forward.launches == 2  # the labels' count, and the loss
    assert backward.launches == usual.launches == 2  # the incoming gradient, and the scaling
    assert usual.moved_bytes < backward.moved_bytes / 20  # scaling by 1 only reads the scalar


def test_fewer_rows_on_a_smaller_gpu_count_the_same(counter, request):
    shape = Shape(256, 300, 0)
    whole = counter.loss(shape, 8)
    shrinking = emulated.Counter(backends.emulated(request.config), 20000)
    scaled = shrinking.loss(shape, 8)
    assert shrinking.scaled == {str(shape): 4}
    assert counter.scaled == {}
    for a, b in zip(scaled[:2], whole[:2], strict=True):
        assert a.moved_bytes == pytest.approx(b.moved_bytes, rel=0.02)
        assert a._replace(moved_bytes=0) == b._replace(moved_bytes=0)


def test_counts_of_a_compaction(counter):
    layer = passes.Layer(32, 64)
    counted = counter.compaction(layer, 4)
    eager = command.eager_compaction(layer)
    assert counted.launches == 2, "the gather, and its sums set to 0"
    assert counted.needed_bytes == passes.compaction_bytes(layer)
    assert counted.needed_bytes < counted.moved_bytes < 2.5 * counted.needed_bytes
    # For each of four tensors: 16 rows, then 32 of their columns, read and written, and the indices.
    assert eager == (8, 0, 4 * (4 * 2 * (16 * 64 + 16 * 32) + 8 * (16 + 32)), 0, 0)


def test_tables_and_json(counter):
    chosen = [gpus.GPUS[name] for name in ("H100", "L4")]
    shapes = [Shape(8, 10, 4), Shape(4, 20, 0, torch.bfloat16)]
    by_gpu = [(gpu, command.all_cases(counter, gpu, shapes, passes.Layer(8, 8))) for gpu in chosen]
    cases = by_gpu[0][1]
    assert [case.name.rpartition(" ")[2] for case in cases] == [*["forward", "scale", "step"] * 2, "tensors"]
    forward, backward, step = (case.kernels for case in cases[:3])
    assert forward.moved_bytes < step.moved_bytes < forward.moved_bytes + backward.moved_bytes
    assert step.needed_bytes < forward.needed_bytes < forward.needed_bytes + backward.needed_bytes
    for table in (tables.counts(cases, chosen[0], {"a": 2, "b": 8}), tables.times(by_gpu, 4e-6)):
        assert {len(row) for row in table.rows} == {len(table.columns)}
        assert len(table.rows) == len(cases)
    assert "a with 1/2 of the rows; b with 1/8" in tables.counts(cases, chosen[0], {"a": 2, "b": 8}).note
    content = json.loads(json.dumps(command._json(by_gpu, counter, 4e-6)))
    assert content["measured"] is False
    first = content["gpus"][1]["cases"][0]["kddp_ext"]
    assert first["modelled_seconds"]["memory"] == pytest.approx(first["counted"]["moved_bytes"] / 0.3e12)


def test_a_missing_compiler_is_reported(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["roofline"])
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert command.main() == 2
    assert "no-such-compiler" in capsys.readouterr().out
