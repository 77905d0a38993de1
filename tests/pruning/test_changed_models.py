"""What people do to models and optimizers around a pruner: it follows, or says what is wrong first."""

import copy
import subprocess
import sys

import pytest
import torch
from pruner_cases import example, kill, make_model, make_pruner, observe, observed_pruner
from torch import nn
from torch.nn.utils import prune


def replace_layer(model):
    model[3] = nn.Linear(8, 3)


def add_low_rank(model):
    """As LoRA does: the layer stays inside of a new one."""
    model[3] = nn.Sequential(model[3], nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False))


CHANGES = {
    "mask": (lambda model: prune.random_unstructured(model[0], "weight", 0.5), r"0\.weight was"),
    "parametrization": (
        lambda model: nn.utils.parametrizations.weight_norm(model[0]),
        "0.parametrizations.weight.original0 was",
    ),
    "another layer": (replace_layer, "3 is another module"),
    "adapter": (add_low_rank, "3.0.bias was"),
    "another parameter": (lambda model: model[0].register_parameter("gain", nn.Parameter(torch.ones(1))), "0.gain was"),
}


@pytest.mark.parametrize(("change", "what"), CHANGES.values(), ids=list(CHANGES))
def test_changes_of_the_model_are_found_before_anything_is_touched(change, what):
    model = make_model()
    kill(model, [1])
    optimizer = torch.optim.Adam(model.parameters())
    pruner = observed_pruner(model, example(), optimizer)
    change(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"model: {what}.*make a new pruner"):
        pruner.prune()
    assert pruner.widths == {"0": 8}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Wrapper(torch.optim.Optimizer):
    """Shares the parameter groups of an optimizer and keeps slow weights in its own state, as Lookahead and SAM do."""

    def __init__(self, base):
        self.base = base
        self.defaults, self.param_groups, self.state = base.defaults, base.param_groups, {}
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {"slow": parameter.detach().clone()}

    def step(self):
        self.base.step()


def test_an_optimizer_inside_of_another_is_sliced_too():
    model = make_model()
    kill(model, [1])
    base = torch.optim.Adam(model.parameters())
    wrapper = Wrapper(base)
    model(example()).square().sum().backward()
    wrapper.step()
    kill(model, [1])
    observed_pruner(model, example(), wrapper, criterion="dead").prune()
    for state in (base.state[model[0].weight]["exp_avg"], wrapper.state[model[0].weight]["slow"]):
        assert state.shape == model[0].weight.shape == (7, 5)


def test_an_optimizer_with_tensors_outside_of_its_state_is_refused_by_name():
    model = make_model()
    wrapper = Wrapper(torch.optim.Adam(model.parameters()))
    wrapper.slow_weights = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match="optimizer: Wrapper keeps tensors in its attribute slow_weights"):
        make_pruner(model, wrapper)


class ModelEmaV3(nn.Module):
    """timm's name: the module is a copy of the model."""

    def __init__(self, model):
        super().__init__()
        self.module = copy.deepcopy(model)


class ModelEma:
    """timm's first moving average, which is no module."""

    def __init__(self, model):
        self.ema = copy.deepcopy(model)


@pytest.mark.parametrize(("kind", "attribute"), [(ModelEmaV3, "module"), (ModelEma, "ema")])
def test_moving_averages_of_timm_are_pruned_as_copies(kind, attribute):
    model = make_model()
    kill(model, [1])
    average = kind(model)
    pruner = make_pruner(model, copies=[average])
    observe(pruner)
    assert pruner.prune().neurons_pruned == 1
    assert getattr(average, attribute)[0].weight.shape == (7, 5)


def transformer():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
    return nn.Sequential(nn.Linear(5, 12), block, nn.Flatten(), nn.Linear(48, 3))


def test_a_saved_model_with_an_open_pruner_loads_without_the_package(tmp_path):
    model, x = transformer(), torch.randn(2, 4, 5)
    pruner = make_pruner(model, example_inputs=(x,))
    assert "1.self_attn.in_proj_weight" in pruner.widths
    torch.save(model, tmp_path / "model.pt")
    program = (
        "import sys; sys.modules['kddp_ext'] = None\nimport torch\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "assert type(model[1].self_attn) is torch.nn.MultiheadAttention\nmodel(torch.randn(2, 4, 5))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_model_that_cannot_be_traced_keeps_its_attention():
    model = nn.Sequential(transformer(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="could not be traced"):
        make_pruner(model, example_inputs=(torch.randn(2, 4, 5),))
    assert type(model[0][1].self_attn) is nn.MultiheadAttention
