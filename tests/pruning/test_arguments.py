"""Each wrong argument of the pruner is named, with what was expected and what came."""

import pytest
import torch
from torch import nn

from kddp_ext.pruning.pruner import DynamicPruner
from kddp_ext.pruning.tracing.find import UnsupportedModelError

INPUTS = 5


def make_model():
    return nn.Sequential(nn.Linear(INPUTS, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))


def make_pruner(model, optimizer=None, **options):
    return DynamicPruner(model, optimizer, **{"example_inputs": (torch.zeros(2, INPUTS),), **options})


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"example_inputs": torch.zeros(2, INPUTS)}, TypeError, r"example_inputs: expected a tuple .* got Tensor"),
        ({"criterion": "magic"}, ValueError, "criterion: expected one of contribution, .* got 'magic'"),
        ({"threshold": 0}, ValueError, "threshold: expected more than 0 and at most 1, got 0"),
        ({"threshold": float("nan")}, ValueError, "threshold: .* got nan"),
        ({"threshold": 1.5}, ValueError, "threshold: .* got 1.5"),
        ({"threshold": "0.1"}, TypeError, "threshold: expected a number, got '0.1'"),
        ({"patience": 0}, ValueError, "patience: expected at least 1, got 0"),
        ({"patience": 1.0}, TypeError, "patience: expected a whole number, got 1.0"),
        ({"patience": True}, TypeError, "patience: expected a whole number, got True"),
        ({"minimum_width": 0}, ValueError, "minimum_width: expected at least 1, got 0"),
        ({"round_to": -8}, ValueError, "round_to: expected at least 1, got -8"),
        ({"criterion": 3}, ValueError, "criterion: expected one of .* or a function of .* got 3"),
        ({"criterion": torch.ones_like, "threshold": 0.0}, ValueError, "threshold: .* finite number above 0, got 0.0"),
        ({"criterion": torch.ones_like, "threshold": float("inf")}, ValueError, "threshold: .* got inf"),
        ({"maximum_share": 0.0}, ValueError, "maximum_share: expected more than 0 and at most 1, got 0.0"),
        ({"maximum_share": "all"}, TypeError, "maximum_share: expected a number, got 'all'"),
        ({"target_parameters": 0}, ValueError, "target_parameters: expected at least 1, got 0"),
        ({"target_macs": 1e6}, TypeError, "target_macs: expected a whole number, got 1000000.0"),
        ({"interval": 0}, ValueError, "interval: expected at least 1, got 0"),
        ({"interval": 2, "start": -1}, ValueError, "start: expected at least 0, got -1"),
        ({"start": 5}, ValueError, "start: 5 delays the checks that step.. makes, but interval is None"),
        ({"l1_weight": -1e-3}, ValueError, "l1_weight: expected a finite number of at least 0, got -0.001"),
        ({"l1_weight": 1.0, "l1_warmup": 0.5}, TypeError, "l1_warmup: expected a whole number, got 0.5"),
        ({"l1_warmup": 9}, ValueError, "l1_warmup: l1_weight rises over 9 steps, but it is 0"),
        ({"compensate": 1}, TypeError, "compensate: expected True or False, got 1"),
        ({"layers": "0"}, TypeError, "layers: expected a list of layer names or None, got '0'"),
        ({"layers": [0]}, TypeError, "layers: expected a list of layer names"),
        ({"layers": []}, ValueError, "layers: expected at least one name"),
        ({"layers": ["0", "0"]}, ValueError, "layers: .* no repeated ones"),
        ({"layers": ["3"]}, UnsupportedModelError, "layers: 3 cannot be pruned: its neurons are the model's outputs"),
        (
            {"optimizer": "sgd"},
            TypeError,
            "optimizer: expected a torch.optim.Optimizer, .* or None, got str",
        ),
    ],
)
def test_wrong_arguments_are_named(options, error, reason):
    model = make_model()
    with pytest.raises(error, match=reason):
        make_pruner(model, **options)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_wrong_models_and_optimizers_are_named():
    model = make_model()
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got function"):
        make_pruner(lambda x: x)
    with pytest.raises(UnsupportedModelError, match=r"model: DataParallel .* use DistributedDataParallel"):
        make_pruner(nn.DataParallel(model))
    with pytest.raises(UnsupportedModelError, match="model: its lazy modules have no parameters yet; call it"):
        make_pruner(nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 3)))
    with pytest.raises(ValueError, match="optimizer: SGD holds none of the model's parameters"):
        make_pruner(model, torch.optim.SGD(make_model().parameters(), lr=0.1))
    with pytest.raises(ValueError, match="optimizer: LBFGS keeps one flat history"):
        make_pruner(model, torch.optim.LBFGS(model.parameters()))


@pytest.mark.parametrize("layers", [["0"], None])
def test_the_last_linear_is_never_pruned(layers):
    model = nn.Sequential(nn.Linear(INPUTS, 3))
    with pytest.raises(UnsupportedModelError, match="its neurons are the model's outputs"):
        make_pruner(model, layers=layers)
