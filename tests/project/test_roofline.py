"""The modelled costs on a GPU: bytes from shapes, the model's arithmetic, PyTorch's operations, and the emulator."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import backends
import pytest
import torch
import torch.nn.functional as F
from emulator import compiler

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def roofline():
    """The package's modules; it lies in the source folder and is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        from benchmarks import cases
        from benchmarks.roofline import __main__ as command
        from benchmarks.roofline import emulated, gpus, model, passes, tables, torch_operations

        yield SimpleNamespace(
            cases=cases,
            command=command,
            emulated=emulated,
            gpus=gpus,
            model=model,
            passes=passes,
            tables=tables,
            torch_operations=torch_operations,
        )


@pytest.fixture
def counter(roofline, request):
    """Counts on the emulated module of the other tests; whole shapes."""
    return roofline.emulated.Counter(backends.emulated(request.config), None)


def test_needed_bytes_of_a_shape(roofline):
    shape = roofline.cases.Shape(6, 10, 4, torch.bfloat16)
    logits, activations, labels = 2 * 6 * 10, 2 * 6 * 4, 8 * 6
    assert roofline.passes.forward_bytes(shape) == 3 * logits + 2 * activations + labels
    assert roofline.passes.backward_bytes(shape) == 2 * (logits + activations)
    layer = roofline.passes.Layer(8, 6, tensors=4)
    assert roofline.passes.compaction_bytes(layer) == 4 * (4 * 3 * 4 * 2) + 8 * (4 + 3)


def test_arithmetic_of_the_model(roofline):
    gpu = roofline.gpus.Gpu("made up", bandwidth=1e9, multiprocessors=10, clock=1e6, source="")
    assert gpu.exponentials == 16e7
    traffic = roofline.model.Traffic(launches=3, needed_bytes=1e6, moved_bytes=2e6, exponentials=1.6e5)
    by_memory = roofline.model.modelled(traffic, gpu, 1e-6)
    assert by_memory == pytest.approx((3e-6, 2e-3, 1e-3, 3e-6 + 2e-3, 1e-3))
    assert by_memory.bound == "memory"
    by_exponentials = roofline.model.modelled(traffic._replace(exponentials=8e5), gpu, 1e-6)
    assert by_exponentials == pytest.approx((3e-6, 2e-3, 5e-3, 3e-6 + 5e-3, 1e-3))
    assert by_exponentials.bound == "exponentials"
    assert roofline.model.modelled(traffic, gpu, 1e-2).bound == "launches"
    assert traffic.times(2) == (3, 2e6, 4e6, 3.2e5)
    assert traffic.plus(traffic) == (6, 2e6, 4e6, 3.2e5)


def count(roofline, run):
    with roofline.torch_operations.OperationCounter() as operations:
        run()
    return operations


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bytes_of_single_operations(roofline, device):
    x = torch.zeros(8, 10, device=device)
    labels = torch.zeros(8, dtype=torch.int64, device=device)
    index = torch.zeros(3, dtype=torch.int64, device=device)
    matrix = 4 * 80

    def bytes_of(run):
        return [(operation.read_bytes, operation.written_bytes) for operation in count(roofline, run).operations]

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


def test_bytes_of_the_eager_loss(roofline):
    """Against a sum by hand over the operations of the formula and of its derivative."""
    shape = roofline.cases.Shape(64, 100, 32)
    forward, backward, usual = roofline.command.eager_loss(shape)
    logits, activations = 4 * 64 * 100, 4 * 64 * 32
    # Two divisions, three softmaxes, xlogy, product, difference, sum; abs and sum.
    of_forward = (2 * 2 + 3 * 2 + 3 * 3 + 1) * logits + (2 + 1) * activations
    # nll_loss and the logarithm's, neg, product, the logarithm's, division, sum of both; sgn and product.
    of_backward = (1 + 3 + 1 + 3 + 3 + 2 + 3) * logits + (2 + 2) * activations
    small = 64 * (32 + 8) + 20 * 3 * 4  # the labels' logarithms, and numbers
    assert 0 <= forward.moved_bytes - of_forward <= small
    assert 0 <= backward.moved_bytes - of_backward <= small
    assert backward == usual
    assert forward.launches == 19
    assert backward.launches == 16


def test_meta_tensors_count_as_real_ones(roofline):
    shape = roofline.cases.Shape(8, 10, 4, torch.bfloat16)
    counted = []
    for device in ("cpu", "meta"):
        passes = roofline.passes.eager_passes(roofline.cases.make_inputs(shape, device))
        counted.append([count(roofline, run).operations for run in passes])
    assert counted[0] == counted[1]


@pytest.mark.parametrize(
    ("rows", "classes", "neurons", "exponentials"),
    [(16, 100, 64, 2), (2, 20000, 0, 4)],  # rows that are kept, and rows that are read again
)
def test_the_emulated_loss_moves_little_more_than_it_needs(roofline, counter, rows, classes, neurons, exponentials):
    shape = roofline.cases.Shape(rows, classes, neurons)
    forward, backward, usual = counter.loss(shape, 4)
    # Reading both sides again is 5 arrays instead of 3.
    least = forward.needed_bytes * (1 if exponentials == 2 else 5 / 3)
    assert least - 8 * rows <= forward.moved_bytes <= 1.3 * least
    assert forward.exponentials == exponentials * rows * classes
    assert backward.needed_bytes <= backward.moved_bytes <= 1.1 * backward.needed_bytes
    assert forward.launches == 1
    assert backward.launches == usual.launches == 2  # the incoming gradient, and the scaling
    assert usual.moved_bytes < backward.moved_bytes / 20  # which is by 1: each block reads that


def test_fewer_rows_on_a_smaller_gpu_count_the_same(roofline, counter, request):
    shape = roofline.cases.Shape(256, 300, 0)
    whole = counter.loss(shape, 8)
    shrinking = roofline.emulated.Counter(backends.emulated(request.config), 20000)
    scaled = shrinking.loss(shape, 8)
    assert shrinking.scaled == {str(shape): 4}
    assert counter.scaled == {}
    for a, b in zip(scaled[:2], whole[:2], strict=True):
        assert a.moved_bytes == pytest.approx(b.moved_bytes, rel=0.02)
        assert a._replace(moved_bytes=0) == b._replace(moved_bytes=0)


def test_the_size_of_the_gpu_reaches_the_kernels(roofline, request):
    """Four rows of many classes are split among as many blocks as there are: the more, the more they exchange."""
    emulated = backends.emulated(request.config)
    reports = {}
    for multiprocessors in (2, 8):
        counter = roofline.emulated.Counter(emulated, None)
        forward, *_ = roofline.passes.loss_passes(roofline.cases.make_inputs(roofline.cases.Shape(4, 33000, 0)))
        _, (reports[multiprocessors],) = counter._count(forward, multiprocessors)
    assert reports[2]["grid"] == 4
    assert reports[8]["grid"] == 16


def test_a_compaction(roofline, counter):
    layer = roofline.passes.Layer(32, 64)
    counted = counter.compaction(layer, 4)
    eager = roofline.command.eager_compaction(layer)
    assert counted.needed_bytes == roofline.passes.compaction_bytes(layer)
    assert counted.needed_bytes < counted.moved_bytes < 2.5 * counted.needed_bytes
    # Of each of four tensors: 16 rows, and of those 32 columns, read and written, and the indices.
    assert eager == (8, 0, 4 * (4 * 2 * (16 * 64 + 16 * 32) + 8 * (16 + 32)), 0)


def test_tables_and_json(roofline, counter):
    gpus = [roofline.gpus.GPUS[name] for name in ("H100", "L4")]
    shapes = [roofline.cases.Shape(8, 10, 4), roofline.cases.Shape(4, 20, 0, torch.bfloat16)]
    by_gpu = [(gpu, roofline.command.all_cases(counter, gpu, shapes, roofline.passes.Layer(8, 8))) for gpu in gpus]
    cases = by_gpu[0][1]
    assert [case.name.rpartition(" ")[2] for case in cases] == [*["forward", "scale", "step"] * 2, "tensors"]
    forward, backward, step = (case.kernels for case in cases[:3])
    assert forward.moved_bytes < step.moved_bytes < forward.moved_bytes + backward.moved_bytes
    assert step.needed_bytes < forward.needed_bytes < forward.needed_bytes + backward.needed_bytes
    for table in (roofline.tables.counts(cases, gpus[0], {"a": 2, "b": 8}), roofline.tables.times(by_gpu, 4e-6)):
        assert {len(row) for row in table.rows} == {len(table.columns)}
        assert len(table.rows) == len(cases)
    assert "a with a half of the rows; b with 1/8" in roofline.tables.counts(cases, gpus[0], {"a": 2, "b": 8}).note
    content = json.loads(json.dumps(roofline.command._json(by_gpu, counter, 4e-6)))
    assert content["measured"] is False
    first = content["gpus"][1]["cases"][0]["kddp_ext"]
    assert first["modelled_seconds"]["memory"] == pytest.approx(first["counted"]["moved_bytes"] / 0.3e12)


def test_without_a_compiler_the_command_says_so(roofline, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["roofline"])
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert roofline.command.main() == 2
    assert "no-such-compiler" in capsys.readouterr().out


EXPONENTIALS = """
#include <dlfcn.h>
static unsigned long count;
unsigned long exponentials() { return count; }
float exp2f(float x) {
    static float (*real)(float);
    if (!real) real = (float (*)(float))dlsym(RTLD_NEXT, "exp2f");
    ++count;
    return real(x);
}
"""
COUNTED_RUN = """
import ctypes, sys
from pathlib import Path
sys.path += [{root!r}, {tests!r}]  # behind the installed package
import backends
from benchmarks.cases import Shape, make_inputs
from benchmarks.roofline import passes
emulated, counted = backends.Emulated(Path({folder!r})), ctypes.CDLL({library!r}).exponentials
for shape in {shapes!r}:
    before = counted()
    with emulated.serves():
        for run in passes.loss_passes(make_inputs(Shape(*shape))):
            run()
    print(counted() - before)
"""


def test_exponentials_of_a_class(roofline, request, tmp_path):
    """What the model takes, against the calls that the kernels make; lanes without a class make a few for nothing."""
    if sys.platform != "linux" or request.config.getoption("sanitized"):
        pytest.skip("calls are counted by preloading a library")
    backends.emulated(request.config)  # compiled, and in the folder
    source, library = tmp_path / "exponentials.c", tmp_path / "exponentials.so"
    source.write_text(EXPONENTIALS)
    command = [compiler(), "-D_GNU_SOURCE", "-x", "c", "-O1", "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run([*command, "-ldl"], check=True)
    shapes = [(16, 1000, 64), (2, 40000, 0)]
    paths = {
        "root": ROOT,
        "tests": ROOT / "tests" / "helpers",
        "folder": backends.build_folder(request.config),
        "library": library,
    }
    program = COUNTED_RUN.format(**{name: str(path) for name, path in paths.items()}, shapes=shapes)
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    command = [sys.executable, "-c", program]  # in a folder that hides no installed package
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    kept, read_again = (
        int(n) / (rows * classes) for n, (rows, classes, _) in zip(ended.stdout.split(), shapes, strict=True)
    )
    assert 0 <= kept - roofline.emulated.EXPONENTIALS_OF_KEPT_CLASS < 0.1
    assert 0 <= read_again - roofline.emulated.EXPONENTIALS_OF_CLASS_READ_AGAIN < 0.1
