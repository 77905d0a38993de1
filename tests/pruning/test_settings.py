"""Wrong arguments are named, and a schedule prunes at its steps."""

import pytest
import torch
from pruner_cases import example, kill, make_model, make_pruner, observe
from torch import nn

from kddp_ext import UnsupportedModelError
from kddp_ext.pruning.selection import _FUNCTIONS
from kddp_ext.pruning.settings import CRITERIA

pytestmark = pytest.mark.usefixtures("one_trace_each")


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"example_inputs": torch.zeros(2, 5)}, TypeError, r"example_inputs: expected a tuple .* got Tensor"),
        ({"criterion": "magic"}, ValueError, "criterion: expected one of contribution, .* got 'magic'"),
        ({"criterion": 3}, ValueError, "criterion: expected one of .* or a function of .* got 3"),
        ({"threshold": 0}, ValueError, "threshold: expected more than 0 and at most 1, got 0"),
        ({"threshold": float("nan")}, ValueError, "threshold: .* got nan"),
        ({"threshold": 1.5}, ValueError, "threshold: .* got 1.5"),
        ({"threshold": "0.1"}, TypeError, "threshold: expected a number, got str"),
        ({"threshold": 10**400}, ValueError, "threshold: expected a number that a float can hold"),
        ({"criterion": torch.ones_like, "threshold": 0.0}, ValueError, r"threshold: .* at most 1.8e\+308, got 0.0"),
        ({"criterion": torch.ones_like, "threshold": float("inf")}, ValueError, "threshold: .* got inf"),
        ({"patience": 0}, ValueError, "patience: expected at least 1, got 0"),
        ({"patience": 1.0}, TypeError, "patience: expected a whole number, got 1.0"),
        ({"patience": True}, TypeError, "patience: expected a whole number, got True"),
        ({"patience": 2**63}, ValueError, r"patience: expected less than 2\*\*63, got more"),
        ({"minimum_width": 0}, ValueError, "minimum_width: expected at least 1, got 0"),
        ({"round_to": -8}, ValueError, "round_to: expected at least 1, got -8"),
        ({"maximum_share": 0.0}, ValueError, "maximum_share: expected more than 0 and at most 1, got 0.0"),
        ({"target_parameters": 0}, ValueError, "target_parameters: expected at least 1, got 0"),
        (
            {"target_macs": 1e6},
            ValueError,
            "target_macs: expected a whole number, or a share .* at most 1, got 1000000.0",
        ),
        ({"target_parameters": 0.0}, ValueError, "target_parameters: expected a whole number, or a share above 0"),
        ({"target_steps": 0}, ValueError, "target_steps: expected at least 1, got 0"),
        ({"resource": "flops"}, ValueError, "resource: expected macs, parameters, a function of the widths by layer"),
        ({"loss_budget": 0.1}, ValueError, "loss_budget: expected None with criterion 'contribution'"),
        ({"criterion": "saliency", "loss_budget": 0}, ValueError, "loss_budget: expected more than 0"),
        ({"interval": 0}, ValueError, "interval: expected at least 1, got 0"),
        ({"interval": 2, "start": -1}, ValueError, "start: expected at least 0, got -1"),
        ({"start": 5}, ValueError, r"start: 5 delays the checks that step\(\) makes, but interval is None"),
        ({"l1_weight": -1e-3}, ValueError, "l1_weight: expected a finite number of at least 0, got -0.001"),
        ({"l1_weight": 1.0, "l1_warmup": 0.5}, TypeError, "l1_warmup: expected a whole number, got 0.5"),
        ({"l1_warmup": 9}, ValueError, "l1_warmup: l1_weight rises over 9 steps, but it is 0"),
        ({"compensate": 1}, TypeError, "compensate: expected True or False, got 1"),
        ({"layers": "0"}, TypeError, "layers: expected a list of layer names or None, got '0'"),
        ({"layers": []}, ValueError, "layers: expected at least one name"),
        ({"layers": ["0", "0"]}, ValueError, "layers: .* no repeated ones"),
        ({"layers": ["1"]}, UnsupportedModelError, "layers: 1 cannot be pruned: it is a ReLU; only layers that"),
        ({"layers": ["3"]}, UnsupportedModelError, "layers: 3 cannot be pruned: its neurons are outputs of the model"),
        ({"layers": ["fc9"]}, UnsupportedModelError, "layers: fc9 .* no such module; its prunable layers are 0"),
        ({"streams": "some"}, ValueError, "streams: expected 'exact' or 'all', got 'some'"),
        ({"optimizer": "sgd"}, TypeError, "optimizer: expected a torch.optim.Optimizer, .* or None, got str"),
    ],
)
def test_wrong_arguments_are_named(options, error, reason):
    model = make_model()
    with pytest.raises(error, match=reason):
        make_pruner(model, **options)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("model", "error", "reason"),
    [
        (lambda x: x, TypeError, "model: expected a torch.nn.Module, got function"),
        (nn.DataParallel(make_model()), UnsupportedModelError, "model: DataParallel .* use DistributedDataParallel"),
        (
            nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 3)),
            UnsupportedModelError,
            "model: its lazy modules have no parameters yet; call it",
        ),
        (nn.Sequential(nn.Linear(5, 3)), UnsupportedModelError, "no layer that can be pruned.*outputs of the model"),
        (nn.Sequential(nn.ReLU()), UnsupportedModelError, "because it has no Linear layer or convolution"),
    ],
)
def test_wrong_models_are_named(model, error, reason):
    with pytest.raises(error, match=rf"(?s){reason}"):
        make_pruner(model)


def test_scripted_models_are_refused():
    with pytest.raises(UnsupportedModelError, match="a scripted module cannot be changed"):
        make_pruner(torch.jit.trace(make_model(), example(), check_trace=False))


def test_every_criterion_has_a_function():
    assert tuple(_FUNCTIONS) == CRITERIA


# --- the schedule


def steps_that_prune(pruner, count):
    pruned = []
    for step in range(1, count + 1):
        observe(pruner)
        if pruner.step() is not None:
            pruned.append(step)
    return pruned


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, []),
        ({"interval": 1}, list(range(1, 13))),
        ({"interval": 5}, [5, 10]),
        ({"interval": 4, "start": 8}, [8, 12]),
        ({"interval": 4, "start": 9}, [12]),
        ({"interval": 20}, []),
    ],
)
def test_every_nth_step_prunes_from_the_start_on(options, steps):
    assert steps_that_prune(make_pruner(make_model(), **options), 12) == steps


def test_statistics_before_the_start_are_discarded():
    """Neuron 2 is active only in the first interval, and dead in the interval of the first check."""
    model = make_model()
    pruner = make_pruner(model, criterion="dead", interval=2, start=4)
    for _ in range(2):
        observe(pruner)
        assert pruner.step() is None
    assert pruner.statistics["0"].rows == 0
    kill(model, [2])
    observe(pruner)
    pruner.step()
    observe(pruner)
    assert pruner.step().layers[0].pruned == (2,)


def test_a_step_whose_prune_fails_is_not_counted():
    pruner = make_pruner(make_model(), interval=2)
    pruner.step()
    before = pruner._state
    with pytest.raises(RuntimeError, match="no statistics of 0"):
        pruner.step()
    assert pruner._state is before
    observe(pruner)
    assert pruner.step() is not None


def test_the_l1_weight_rises_with_the_steps():
    pruner = make_pruner(make_model(), l1_weight=0.5, l1_warmup=4)
    weights = [pruner.l1_weight]
    for _ in range(6):
        pruner.step()
        weights.append(pruner.l1_weight)
    assert weights == [0, 0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    assert make_pruner(make_model(), l1_weight=0.5).l1_weight == 0.5
    assert make_pruner(make_model()).l1_weight == 0.0
