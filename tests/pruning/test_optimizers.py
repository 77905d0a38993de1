"""The state of every optimizer of torch.optim is sliced with the parameters, or the optimizer is refused."""

import inspect

import pytest
import torch
from dead_neurons import ALIVE, CLASSES, DEAD, INPUTS, NORMS, batch, build, prune_dead, sliced, step
from pruner_cases import example, make_model, make_pruner, observed_pruner
from torch import nn

pytestmark = pytest.mark.usefixtures("one_trace_each")

# These update each entry of a parameter from the same entry of its gradient and its moments.
ENTRYWISE = {
    "ASGD": [{"lr": 0.01}],
    "Adadelta": [{}],
    "Adagrad": [{"lr": 0.05}, {"lr": 0.05, "initial_accumulator_value": 0.1}],
    "Adam": [{"lr": 0.01}, {"lr": 0.01, "amsgrad": True}, {"lr": 0.01, "decoupled_weight_decay": True}],
    "AdamW": [{"lr": 0.01}, {"lr": 0.01, "amsgrad": True}],
    "Adamax": [{}],
    "NAdam": [{}, {"decoupled_weight_decay": True}],
    "RAdam": [{}, {"decoupled_weight_decay": True}],
    "RMSprop": [{"lr": 0.01}, {"lr": 0.01, "momentum": 0.9, "centered": True}],
    "Rprop": [{}],
    "SGD": [
        {"lr": 0.05},
        {"lr": 0.05, "momentum": 0.9, "nesterov": True},
        {"lr": 0.05, "momentum": 0.9, "dampening": 0.1},
    ],
}
WHOLE_MATRICES = {"Adafactor", "Muon"}
REFUSED = {"LBFGS": "keeps one flat history", "SparseAdam": "takes sparse gradients only"}
# Other implementations of the same update, or another sign, for every optimizer that has the option.
VARIANTS = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"maximize": True}, {"weight_decay": 0.1}]


def test_every_optimizer_of_torch_is_in_a_table():
    present = {
        name
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }
    assert present == ENTRYWISE.keys() | WHOLE_MATRICES | REFUSED.keys()


def optimizers(variants=VARIANTS):
    for name, settings in ENTRYWISE.items():
        kind = getattr(torch.optim, name)
        for setting in settings:
            for variant in variants:
                if variant.keys() <= inspect.signature(kind).parameters.keys():
                    options = {**setting, **variant}
                    label = " ".join(f"{key}={value}" for key, value in options.items())
                    yield pytest.param(lambda p, k=kind, o=options: k(p, **o), id=f"{name} {label}")


def assert_dead_neurons_do_not_matter(optimizer, norms, prepare=lambda model: None):
    """Outputs stay the same, and so does the next step of the remaining entries; parameter groups stay."""
    model, model_optimizer, generator = build(optimizer, norms, prepare=prepare)
    whole, whole_optimizer, _ = build(optimizer, norms, prepare=prepare)
    groups = [(id(group), [id(p) for p in group["params"]]) for group in model_optimizer.param_groups]
    observed = batch(generator)
    whole.train()(observed[0])  # running statistics move as those of the pruned model do
    report = prune_dead(model, model_optimizer, observed[0])
    assert report.layers[0].pruned == tuple(DEAD)
    assert model[0].out_features == model[4].in_features == len(ALIVE)
    assert groups == [(id(group), [id(p) for p in group["params"]]) for group in model_optimizer.param_groups]

    after = batch(generator)
    for mode in (False, True):
        torch.testing.assert_close(model.train(mode)(after[0]), whole.train(mode)(after[0]), rtol=1e-12, atol=1e-12)
    step(model, model_optimizer, after)
    step(whole, whole_optimizer, after)
    expected = {name: sliced(name, tensor) for name, tensor in whole.state_dict().items()}
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("optimizer", optimizers())
def test_outputs_and_the_next_step_stay(optimizer):
    assert_dead_neurons_do_not_matter(optimizer, NORMS["both"])


@pytest.mark.parametrize("norms", ["none", "before", "after"])
@pytest.mark.parametrize("optimizer", optimizers(variants=[{}]))
def test_outputs_and_the_next_step_stay_with_other_norms(optimizer, norms):
    assert_dead_neurons_do_not_matter(optimizer, NORMS[norms])


def freeze(model):
    for parameter in (model[0].weight, model[4].bias, model[6].weight):
        parameter.requires_grad_(False)


@pytest.mark.parametrize("optimizer", optimizers(variants=[{}, {"fused": True}]))
def test_a_partly_frozen_model(optimizer):
    assert_dead_neurons_do_not_matter(optimizer, NORMS["none"], prepare=freeze)


@pytest.mark.parametrize("name", ENTRYWISE)
def test_parameter_groups_with_their_own_settings(name):
    kind = getattr(torch.optim, name)
    accepted = inspect.signature(kind).parameters

    def grouped(parameters):
        parameters = list(parameters)
        settings = {"lr": 0.02, "weight_decay": 0.05, "maximize": True, "foreach": True}
        weights = {"params": [p for p in parameters if p.dim() == 2]}
        biases = {key: value for key, value in settings.items() if key in accepted}
        return kind([weights, {**biases, "params": [p for p in parameters if p.dim() == 1]}], lr=0.01)

    assert_dead_neurons_do_not_matter(grouped, NORMS["none"])


def assert_steps_change_every_parameter(model, optimizers, generator):
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(2):
        step(model, optimizers[0], batch(generator, torch.float32))
        for optimizer in optimizers[1:]:
            optimizer.step()
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert not torch.equal(parameter, old)
        assert parameter.isfinite().all()


def test_factored_moments_are_sliced_along_the_dimensions_they_have():
    """Adafactor: the step of an entry depends on its row and column, so it is not the same afterwards."""
    model, optimizer, generator = build(torch.optim.Adafactor, NORMS["none"], torch.float32)
    before = {name: dict(optimizer.state[p]) for name, p in model.named_parameters()}
    prune_dead(model, optimizer, batch(generator, torch.float32)[0])
    first, last = optimizer.state[model[0].weight], optimizer.state[model[4].weight]
    assert torch.equal(first["row_var"], before["0.weight"]["row_var"][ALIVE])
    assert torch.equal(first["col_var"], before["0.weight"]["col_var"])
    assert torch.equal(last["col_var"], before["4.weight"]["col_var"][:, ALIVE])
    assert torch.equal(last["row_var"], before["4.weight"]["row_var"])
    assert torch.equal(optimizer.state[model[0].bias]["variance"], before["0.bias"]["variance"][ALIVE])
    assert_steps_change_every_parameter(model, [optimizer], generator)


def test_two_optimizers_of_one_model():
    """Muon takes matrices only, so biases need another optimizer; its steps depend on the whole matrix."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, 9), nn.ReLU(), nn.Linear(9, CLASSES))
    muon = torch.optim.Muon([model[0].weight, model[2].weight], lr=0.02)
    adam = torch.optim.AdamW([model[0].bias, model[2].bias])
    generator = torch.Generator().manual_seed(2)
    step(model, muon, batch(generator, torch.float32))
    adam.step()
    with torch.no_grad():
        model[0].weight[DEAD] = 0
        model[0].bias[DEAD] = -1
    x, _ = batch(generator, torch.float32)
    momenta = [muon.state[model[index].weight]["momentum_buffer"] for index in (0, 2)]
    moment = adam.state[model[0].bias]["exp_avg"]
    expected = model(x)
    assert observed_pruner(model, x, [muon, adam]).prune().neurons_pruned == len(DEAD)
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(muon.state[model[0].weight]["momentum_buffer"], momenta[0][ALIVE])
    assert torch.equal(muon.state[model[2].weight]["momentum_buffer"], momenta[1][:, ALIVE])
    assert torch.equal(adam.state[model[0].bias]["exp_avg"], moment[ALIVE])
    adam.zero_grad()
    assert_steps_change_every_parameter(model, [muon, adam], generator)


def test_optimizers_that_cannot_follow_are_refused():
    model = make_model()
    adam = torch.optim.Adam(model.parameters())
    for name, reason in REFUSED.items():
        optimizer = getattr(torch.optim, name)(model.parameters())
        for argument in (optimizer, [adam, optimizer]):
            with pytest.raises(ValueError, match=f"optimizer: {name} {reason}"):
                make_pruner(model, argument)
    zero = type("ZeroRedundancyOptimizer", (torch.optim.SGD,), {})(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizer: ZeroRedundancyOptimizer keeps each parameter's state on one rank"):
        make_pruner(model, zero)
    with pytest.raises(TypeError, match=r"optimizer: expected a torch.optim.Optimizer, .* got \[Adam"):
        make_pruner(model, [adam, None])
    with pytest.raises(ValueError, match="optimizer: SGD holds none of the model's parameters"):
        make_pruner(model, [adam, torch.optim.SGD(make_model().parameters(), lr=0.1)])


def test_state_on_another_device_is_sliced_there():
    """Some optimizers keep moments on the CPU while the model is on a GPU; here they are on "meta"."""
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters())
    pruner = make_pruner(model, optimizer, threshold=0.5)
    model(example(16)).sum().backward()
    optimizer.step()
    for state in optimizer.state.values():
        state["exp_avg_sq"] = state["exp_avg_sq"].to("meta")
    pruner.activations.observe()
    assert pruner.prune().neurons_pruned > 0
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
        assert state["exp_avg"].is_cpu
        assert state["exp_avg_sq"].is_meta
