"""What follows from a trace works for every structure: optimizer steps, compensation, copies, and students' files."""

import copy
import importlib.util

import pytest
import torch
from pruner_cases import halves, make_pruner, silence
from pruning.zoo import STRUCTURES
from pruning.zoo.groups import GROUPS, WITH_NORMS
from pruning.zoo.traces import as_traced, build, cast, traced, without_dropout
from pruning.zoo.vision_transformers import SeparateAttention
from torch import nn
from torch.optim.swa_utils import AveragedModel

import kddp_ext
from kddp_ext.pruning.compaction import Removal, plan_compaction
from kddp_ext.pruning.history import PruningHistory
from kddp_ext.pruning.tracing.find import find_neurons
from kddp_ext.saving.student_file import load_student, save_student

# --- Optimizers

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.001),
}


def step(model, optimizer, inputs):
    optimizer.zero_grad()
    model(*inputs).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", [name for name in STRUCTURES if name != "one neuron"])
def test_the_next_step_is_that_of_the_entries_that_stay(name, optimizer, monkeypatch):
    """Narrowing and a step give the same as a step and narrowing, where nothing reads the neurons that go.

    The weights of RMSNorms are excepted, because they become larger.
    """
    whole = without_dropout(build(name, torch.float64), monkeypatch).train()
    inputs, neurons = cast(STRUCTURES[name].inputs(), torch.float64), traced(name).neurons
    make, removal = OPTIMIZERS[optimizer], Removal(neurons, halves(neurons))
    wide = make(whole.parameters())
    step(whole, wide, inputs)
    silence(whole, neurons, removal.keep)
    narrow = as_traced(copy.deepcopy(whole))
    slim = make(narrow.parameters())
    slim.load_state_dict(copy.deepcopy(wide.state_dict()))

    plan_compaction(narrow, removal, [slim]).apply()
    before = copy.deepcopy(narrow.state_dict())
    step(narrow, slim, inputs)
    step(whole, wide, inputs)
    plan_compaction(whole, removal, [wide]).apply()

    expected, rescaled = whole.state_dict(), {norm.weight.name for norm in neurons.norms}
    for key, tensor in narrow.state_dict().items():
        if key not in rescaled:
            torch.testing.assert_close(
                tensor, expected[key], rtol=1e-9, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}"
            )
    assert sum(not torch.equal(tensor, before[key]) for key, tensor in narrow.state_dict().items()) > len(before) / 2
    for (parameter, one), other in zip(narrow.named_parameters(), whole.parameters(), strict=True):
        for key, state in slim.state.get(one, {}).items() if parameter not in rescaled else ():
            torch.testing.assert_close(state, wide.state[other][key], rtol=1e-9, atol=1e-11)


# --- Compensation, reconstruction and copies


class Stream(nn.Module):
    """Four writers, and five readers, of a stream of 8 neurons."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.other = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)
        self.down = nn.ModuleList(nn.Linear(8, 5) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(5, 8) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        for down, up in zip(self.down, self.up, strict=True):
            x = x + up(down(x).relu())
        return torch.cat([self.last(x), self.other(x.tanh())], -1)


# A constructor, the shape of inputs, the group's name and width, and the tensors that absorb what its neurons add.
READERS = {
    "a stream": (
        Stream, (200, 6), "first", 8, ["down.0.bias", "down.1.bias", "down.2.bias", "last.bias", "other.bias"],
    ),
    "heads": (
        lambda: nn.Sequential(nn.Linear(6, 20), SeparateAttention(20, 4, 6), nn.Linear(20, 3)), (40, 5, 6),
        "1.q_proj", 4, ["1.o_proj.bias"],
    ),
    "a grouped convolution": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Tanh(), nn.Conv2d(8, 12, 3, groups=2), nn.Conv2d(12, 3, 1)),
        (20, 3, 5, 5), "0", 4, ["2.bias"],
    ),
}  # fmt: skip


def make_case(name):
    torch.manual_seed(0)
    make, shape, layer, width, absorbing = READERS[name]
    model, x = make().double().eval(), torch.randn(shape, dtype=torch.float64)
    neurons = find_neurons(model, (x,)).neurons
    neurons = neurons.only([group for group in neurons.groups if group.name == layer])
    assert [group.width for group in neurons.groups] == [width]
    return model, x, neurons, layer, absorbing


def written(model, neurons):
    """The tensors of the layers that write neurons, with the dimension and the numbers of its entries' neurons."""
    read = {(reader.weight, reader.axis) for reader in neurons.readers}
    for stored, by_axis in neurons.slices.items():
        for axis, numbers in by_axis.items():
            if (stored, axis) not in read:
                yield stored.of(model), axis, numbers


def odd_ones_go(statistics, outgoing):
    return 1.0 - torch.arange(len(outgoing), dtype=torch.float64) % 2


def prune(model, x, layer, **options):
    pruner = make_pruner(model, example_inputs=(x,), layers=[layer], **options)
    with torch.no_grad():
        model(x)
    pruner.activations.observe()
    preview = pruner.preview()
    (report,) = pruner.prune().layers
    (expected,) = preview.layers
    assert (report.name, report.width_after) == (expected.name, expected.width_after) == (layer, pruner.widths[layer])
    assert report.width_after == expected.width // 2
    return report, expected


@pytest.mark.parametrize("name", READERS)
@torch.no_grad()
def test_constant_neurons_are_replaced_exactly_in_the_model_and_its_copies(name):
    model, x, neurons, layer, absorbing = make_case(name)
    gone = ~halves(neurons)
    for tensor, axis, numbers in written(model, neurons):
        if tensor.dim() > 1:
            tensor.index_fill_(axis, ((numbers >= 0) & gone[numbers.clamp(min=0)]).nonzero().flatten(), 0)
    average = AveragedModel(model)
    for reader in neurons.readers:  # it compensates with its own weights
        reader.weight.of(average.module).mul_(0.7)
    expected = model(x), average(x)
    report, preview = prune(model, x, layer, copies=[average])
    assert list(report.pruned) == list(range(1, len(gone), 2))
    assert sorted(report.compensated) == absorbing
    assert preview.output_change < 1e-9
    for got, wanted in zip((model(x), average(x)), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(expected[0], expected[1])


@pytest.mark.parametrize("name", ["a stream", "heads"])
@torch.no_grad()
def test_duplicated_neurons_are_replaced_by_those_that_they_duplicate(name):
    model, x, neurons, layer, _ = make_case(name)
    for tensor, axis, numbers in written(model, neurons):
        for neuron in range(1, neurons.number, 2):
            source, target = ((numbers == each).nonzero().flatten() for each in (neuron - 1, neuron))
            tensor.index_copy_(axis, target, tensor.index_select(axis, source))
    average, errors, expected = copy.deepcopy(model), [], model(x)
    for samples in (1024, 0):
        narrow, copied = copy.deepcopy(model), copy.deepcopy(average)
        options = {"criterion": odd_ones_go, "threshold": 0.5, "reconstruction_samples": samples}
        report, _ = prune(narrow, x, layer, copies=[copied], **options)
        assert torch.equal(narrow(x), copied(x))
        assert (report.reconstruction_error is None) == (samples == 0)
        errors.append(float((narrow(x) - expected).norm() / expected.norm()))
    assert errors[0] < 1e-6
    assert errors[1] > 1e-2


# --- Files

FILES = ["ViT, transformers", "GPT-2, classifier", "ResNet, basic blocks"]


@pytest.mark.parametrize("name", FILES)
def test_a_student_with_streams_and_heads_is_rebuilt_bit_for_bit(name, tmp_path):
    model, inputs, pruner = half_of(name)
    save_student(tmp_path / "student", model, pruner.history)
    loaded = load_student(tmp_path / "student", STRUCTURES[name].build, inputs)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    for arguments in (inputs, STRUCTURES[name].other_inputs()):
        assert torch.equal(loaded.eval()(*arguments), model.eval()(*arguments))
    replayed = build(name)
    PruningHistory.from_json(pruner.history.to_json()).replay(replayed, inputs)
    assert [each.shape for each in replayed.parameters()] == [each.shape for each in model.parameters()]


@pytest.mark.skipif(
    any(importlib.util.find_spec(each) is None for each in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript or onnxruntime is not installed",
)
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
@pytest.mark.parametrize("name", FILES)
def test_onnx_of_a_student_with_streams_and_heads(name, tmp_path):
    import onnxruntime

    model, inputs, _ = half_of(name)
    kddp_ext.export_onnx(model.eval(), tmp_path / "student.onnx", inputs)
    session = onnxruntime.InferenceSession(tmp_path / "student.onnx", providers=["CPUExecutionProvider"])
    (argument,) = session.get_inputs()
    outputs = session.run(None, {argument.name: inputs[0].numpy()})
    torch.testing.assert_close(torch.from_numpy(outputs[0]), model(*inputs).detach(), rtol=1e-5, atol=1e-5)


def half_of(name):
    """A network without half of the neurons of its stream, heads and hidden layers, its inputs, and its pruner."""
    model, inputs = build(name), STRUCTURES[name].inputs()
    options = {"criterion": odd_ones_go, "threshold": 0.5, "streams": "all", "compensate": False}
    pruner = make_pruner(model, example_inputs=inputs, **options)
    widths = pruner.widths
    assert len(widths) == len(WITH_NORMS.get(name, GROUPS[name]))
    model(*inputs)
    pruner.activations.observe()
    pruner.prune()
    assert all(pruner.widths[layer] < width for layer, width in widths.items())
    return model, inputs, pruner
