"""A student is rebuilt exactly from its file and its constructor; other files are refused by path."""

import pytest
import safetensors.torch
import torch
from pruner_cases import observed_pruner
from torch import nn

from kddp_ext.pruning.history import PruningHistory
from kddp_ext.pruning.pruner import DynamicPruner
from kddp_ext.saving.student_file import load_student, read_student_header, save_student

EXAMPLE = (torch.zeros(2, 5),)


def make_model(width=8, classes=3, dtype=torch.float32):
    return nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, classes)).to(dtype)


@pytest.fixture
def student():
    torch.manual_seed(0)
    model = make_model()
    pruner = observed_pruner(model, torch.randn(30, 5), threshold=0.9)
    assert pruner.prune().neurons_pruned > 0
    return model, pruner.history


@pytest.fixture
def path(student, tmp_path):
    path = tmp_path / "student.safetensors"
    save_student(path, *student, {"dataset": "digits", "note": 'a "quoted" ü'})
    return path


def test_round_trip(student, path):
    model, _ = student
    loaded = load_student(path, make_model, EXAMPLE)
    x = torch.randn(7, 5)
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded[0].out_features == model[0].out_features


def test_header(student, path):
    model, history = student
    header = read_student_header(str(path))
    assert header["metadata"] == {"dataset": "digits", "note": 'a "quoted" ü'}
    assert PruningHistory.from_json(header["history"]) == history
    assert header["version"] == "1"
    assert header["tensors"]["0.weight"] == ("F32", (model[0].out_features, 5))
    assert header["tensors"].keys() == model.state_dict().keys()


def test_a_student_that_was_never_pruned(tmp_path):
    model = make_model()
    save_student(tmp_path / "s", model, PruningHistory({}))
    loaded = load_student(tmp_path / "s", make_model, EXAMPLE)
    assert torch.equal(loaded[3].weight, model[3].weight)
    assert read_student_header(tmp_path / "s")["metadata"] == {}


def test_tied_tensors_and_other_layouts(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    model = Tied()
    model.a.weight.data = model.a.weight.data.t()
    save_student(tmp_path / "s", model, PruningHistory({}))
    loaded = load_student(tmp_path / "s", Tied, (torch.zeros(2, 4),))
    assert torch.equal(loaded.a.weight, model.a.weight)
    assert loaded.b.weight is loaded.a.weight


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads, self.qkv, self.output = 4, nn.Linear(6, 3 * 4 * 2), nn.Linear(4 * 2, 3)

    def forward(self, *, tokens):
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, 2)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.output(mixed.transpose(1, 2).flatten(2))


def test_a_student_with_fewer_heads_and_inputs_by_keyword(tmp_path):
    model, tokens = Attention(), torch.randn(2, 5, 6)
    options = {"threshold": 1.0, "maximum_share": 0.5, "patience": 1}
    pruner = DynamicPruner(model, example_inputs=(), example_kwargs={"tokens": tokens}, **options)
    expected = pruner.history.original_widths
    model(tokens=tokens)
    pruner.activations.observe()
    pruner.prune()
    assert (expected, pruner.widths, model.heads) == ({"qkv": 4}, {"qkv": 2}, 2)
    save_student(tmp_path / "s", model, pruner.history)
    loaded = load_student(tmp_path / "s", Attention, (), {"tokens": tokens})
    assert loaded.heads == 2
    assert torch.equal(loaded(tokens=tokens), model(tokens=tokens))


def test_every_truncation_is_refused(path, tmp_path):
    content, cut = path.read_bytes(), tmp_path / "cut"
    for length in range(0, len(content), max(1, len(content) // 50)):
        cut.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"^{cut}: expected a student's safetensors file"):
            load_student(cut, make_model, EXAMPLE)


def rewritten(path, **changes):
    header = {
        "format": "kddp_ext.student",
        "version": "1",
        "history": PruningHistory({}).to_json(),
        "metadata": "{}",
        **changes,
    }
    header = {key: value for key, value in header.items() if value is not None}
    path.write_bytes(safetensors.torch.save({"a": torch.zeros(2)}, header))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": None}, "expected a safetensors file of format 'kddp_ext.student', got None"),
        ({"format": "pt"}, "expected a safetensors file of format 'kddp_ext.student', got 'pt'"),
        ({"version": "2"}, "expected version 1 of the format, got '2'"),
        ({"history": None}, "its header is damaged"),
        ({"history": "{}"}, "its header is damaged: text: expected JSON with format"),
        ({"metadata": "{"}, "its header is damaged"),
        ({"metadata": "[1]"}, "its header is damaged: expected metadata as strings by name"),
    ],
)
def test_foreign_and_damaged_headers(tmp_path, changes, reason):
    path = tmp_path / "student"
    rewritten(path, **changes)
    with pytest.raises(ValueError, match=f"^{path}: {reason}"):
        read_student_header(path)


class Renamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = make_model()

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize(
    ("constructor", "reason"),
    [
        (lambda: make_model(width=9), "0 has 9 neurons but the history starts from 8"),
        (
            lambda: make_model(classes=4),
            r"3.weight is float32 \(4, \d\) in the constructor's model, but float32 \(3, \d\) in the file",
        ),
        (lambda: make_model(dtype=torch.float64), "could not be traced|is float64"),
        (Renamed, "the history has a layer '0' that cannot be pruned here: it has no such layer"),
        (
            lambda: nn.Sequential(*make_model()[:2], nn.PReLU(), make_model()[3]),
            r"2.weight is float32 \(1,\) in the constructor's model, but missing in the file",
        ),
        (
            lambda: nn.Sequential(make_model()[0], nn.Identity(), nn.ReLU(), make_model()[3]),
            r"1\.\w+ is missing in the constructor's model, but",
        ),
    ],
)
def test_another_architecture(path, constructor, reason):
    with pytest.raises(ValueError, match=f"^{path}: .*({reason})"):
        load_student(path, constructor, EXAMPLE)
    with pytest.raises(TypeError, match=r"constructor: expected it to return a torch.nn.Module, got dict"):
        load_student(path, dict, EXAMPLE)


def test_saving_checks_its_arguments(student, tmp_path):
    model, history = student
    path = tmp_path / "s"
    with pytest.raises(ValueError, match=r"history: it ends with 8 neurons in 0, but the model has \d neurons"):
        save_student(path, model, PruningHistory({"0": 8}))
    with pytest.raises(ValueError, match="history: it ends with 4 neurons in 9, but the model has no such layer"):
        save_student(path, model, PruningHistory({"9": 4}))
    with pytest.raises(TypeError, match=r"metadata: expected strings by name, got {'a': 1}"):
        save_student(path, model, history, {"a": 1})
    with pytest.raises(TypeError, match="history: expected a PruningHistory, got str"):
        save_student(path, model, history.to_json())
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got OrderedDict"):
        save_student(path, model.state_dict(), PruningHistory({}))
    with pytest.raises(OSError, match=r"cannot write .*nowhere"):
        save_student(tmp_path / "nowhere" / "s", model, history)
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        load_student(path, make_model, EXAMPLE)


def test_changed_tensors_folders_and_states_of_no_tensors_are_refused(path, tmp_path):
    with safetensors.safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = safetensors.torch.load_file(path)
    tensors["0.weight"] += 1
    path.write_bytes(safetensors.torch.save(tensors, header))
    with pytest.raises(ValueError, match="the file is damaged: its content does not match its sha256"):
        load_student(path, make_model, EXAMPLE)
    with pytest.raises(ValueError, match="but it is not a regular file"):
        read_student_header(tmp_path)
    model = make_model()
    model.register_module("quantizer", WithExtraState())
    with pytest.raises(TypeError, match=r"model: quantizer\._extra_state in its state_dict is a dict"):
        save_student(tmp_path / "s", model, PruningHistory({}))


class WithExtraState(nn.Module):
    def get_extra_state(self):
        return {"levels": 4}
