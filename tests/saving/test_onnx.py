"""An exported student computes the same as in PyTorch, and exporting changes nothing."""

import copy
import importlib.util
import sys

import pytest
import torch
from torch import nn

import kddp_ext
from kddp_ext.saving import onnx as export

ON_ONNX = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript or onnxruntime is not installed",
)
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")


def perceptron():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 3)
    )
    return model, (12,)


def convolutional():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 3),
    )  # fmt: skip
    return model, (2, 8, 8)


def prune(model, shape):
    """Train one step and prune; the pruner stays open."""
    nn.init.uniform_(model[1].weight)  # so that channels differ
    optimizer = torch.optim.Adam(model.parameters())
    example = (torch.zeros(2, *shape),)
    pruner = kddp_ext.DynamicPruner(model, optimizer, example_inputs=example, threshold=0.6, patience=1)
    logits = model(torch.randn(32, *shape))
    kddp_ext.fused_kd_l1_loss(logits, None, torch.arange(32) % 3, pruner.activations, alpha=0.0).backward()
    optimizer.step()
    assert all(layer.pruned for layer in pruner.prune().layers)
    return pruner


def run(path, *inputs):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return torch.from_numpy(session.run(None, {n: i.numpy() for n, i in zip(names, inputs, strict=True)})[0])


def evaluated(model, *inputs):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(*inputs)


@ON_ONNX
@pytest.mark.parametrize("make", [perceptron, convolutional])
def test_onnx_gives_the_same_outputs_and_exporting_changes_nothing(make, tmp_path):
    model, shape = make()
    pruner = prune(model, shape)
    model[0].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, random = str(pruner.state_dict()), torch.get_rng_state()
    kddp_ext.export_onnx(model, tmp_path / "student.onnx", (torch.zeros(2, *shape),))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert str(pruner.state_dict()) == state
    assert torch.equal(torch.get_rng_state(), random)
    for rows in (1, 7):
        inputs = torch.randn(rows, *shape)
        expected = evaluated(model, inputs)
        torch.testing.assert_close(run(tmp_path / "student.onnx", inputs), expected, atol=1e-5, rtol=1e-5)
    model(torch.randn(4, *shape))
    assert len(pruner.activations[0]) % 4 == 0  # it still observes


@ON_ONNX
def test_onnx_has_the_pruned_widths_and_nothing_of_the_pruner(tmp_path):
    import onnx

    model, shape = perceptron()
    pruner = prune(model, shape)
    kddp_ext.export_onnx(model, tmp_path / "observed.onnx", (torch.zeros(2, *shape),))
    pruner.close()
    kddp_ext.export_onnx(model, tmp_path / "closed.onnx", (torch.zeros(2, *shape),))
    observed, closed = (onnx.load(tmp_path / f"{name}.onnx").graph for name in ("observed", "closed"))
    assert [node.op_type for node in observed.node] == [node.op_type for node in closed.node]
    assert "Dropout" not in {node.op_type for node in observed.node}
    sizes = {tuple(tensor.dims) for tensor in observed.initializer}
    assert all(tuple(module.weight.shape) in sizes for module in model if isinstance(module, nn.Linear))


@ON_ONNX
def test_a_batch_of_one_as_the_example_and_a_fixed_batch(tmp_path):
    model, shape = perceptron()
    kddp_ext.export_onnx(model, tmp_path / "student.onnx", (torch.zeros(1, *shape),))
    assert run(tmp_path / "student.onnx", torch.zeros(5, *shape)).shape == (5, 3)
    kddp_ext.export_onnx(model, tmp_path / "fixed.onnx", (torch.zeros(1, *shape),), dynamic_batch=False)
    assert run(tmp_path / "fixed.onnx", torch.zeros(1, *shape)).shape == (1, 3)
    with pytest.raises(Exception, match="Got: 5 Expected: 1"):
        run(tmp_path / "fixed.onnx", torch.zeros(5, *shape))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3)

    def forward(self, values, factor, mask):
        return self.body(values) * factor * mask


@ON_ONNX
@pytest.mark.filterwarnings("ignore:# ONNX model has different number of inputs than the flatten dynamic_shapes")
def test_inputs_that_are_no_tensors_keep_their_value(tmp_path):
    model, values, mask = TwoInputs(), torch.randn(2, 4), torch.ones(2, 1)
    kddp_ext.export_onnx(model, tmp_path / "student.onnx", (values, 3.0, mask))
    values, mask = torch.randn(6, 4), torch.arange(6.0)[:, None]
    torch.testing.assert_close(run(tmp_path / "student.onnx", values, mask), evaluated(model, values, 3.0, mask))


@ON_ONNX
def test_a_failure_leaves_the_old_file_and_the_mode(tmp_path):
    class Fails(nn.Module):
        def forward(self, values):
            return values if values.sum() > 0 else -values  # depends on the data, so it cannot be exported

    path = tmp_path / "student.onnx"
    path.write_bytes(b"old")
    model = Fails()
    with pytest.raises(torch.onnx.OnnxExporterError):
        kddp_ext.export_onnx(model, path, (torch.zeros(2, 3),))
    assert path.read_bytes() == b"old"
    assert model.training
    with pytest.raises(OSError, match="cannot write"):
        kddp_ext.export_onnx(perceptron()[0], tmp_path / "no" / "student.onnx", (torch.zeros(2, 12),))
    assert sorted(tmp_path.iterdir()) == [path]


@ON_ONNX
def test_arguments(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        kddp_ext.export_onnx("student", tmp_path / "student.onnx", (torch.zeros(2, 3),))
    with pytest.raises(TypeError, match=r"example_inputs: expected a tuple .*, got Tensor"):
        kddp_ext.export_onnx(perceptron()[0], tmp_path / "student.onnx", torch.zeros(2, 12))
    monkeypatch.setattr(export, "LARGEST_FILE", 100)
    with pytest.raises(ValueError, match=r"model: its tensors take .* bytes, but an ONNX file holds at most 100"):
        kddp_ext.export_onnx(perceptron()[0], tmp_path / "student.onnx", (torch.zeros(2, 12),))


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else sys)
    with pytest.raises(ModuleNotFoundError, match=r"export_onnx: onnxscript missing; .* 'kddp_ext\[onnx\]'"):
        kddp_ext.export_onnx(perceptron()[0], tmp_path / "student.onnx", (torch.zeros(2, 12),))
    assert not list(tmp_path.iterdir())
