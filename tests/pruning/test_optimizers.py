"""The state of every optimizer of torch.optim follows a prune, or the optimizer is refused."""

import inspect

import pytest
import torch
from dead_neurons import ALIVE, CLASSES, DEAD, INPUTS, NORMS, batch, build, prune_dead, sliced, step
from pruner_cases import make_model, make_pruner
from torch import nn
from torch.optim import lr_scheduler

from kddp_ext.pruning.pruner import DynamicPruner

pytestmark = pytest.mark.usefixtures("one_trace_each")

# Each entry of a parameter is updated from the same entry of its gradient and its moments alone.
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
# The same update in other code, or with another sign: tried with every optimizer that has it.
VARIANTS = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"maximize": True}, {"weight_decay": 0.1}]


def test_it_is_decided_what_becomes_of_every_optimizer():
    """A new one in torch.optim fails this test until it is in one of the three tables."""
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
                    told = " ".join(f"{key}={value}" for key, value in options.items())
                    yield pytest.param(lambda p, k=kind, o=options: k(p, **o), id=f"{name} {told}")


def assert_dead_neurons_do_not_matter(optimizer, norms, prepare=lambda model: None):
    """Outputs stay, and so does the next step of what remains; nothing of the optimizer is replaced."""
    model, its_optimizer, generator = build(optimizer, norms, prepare=prepare)
    whole, whole_optimizer, _ = build(optimizer, norms, prepare=prepare)
    groups = [(id(group), [id(p) for p in group["params"]]) for group in its_optimizer.param_groups]
    example = batch(generator)
    whole.train()(example[0])  # the pruned one sees this batch as it observes it: running statistics move alike
    report = prune_dead(model, its_optimizer, example[0])
    assert report.layers[0].pruned == tuple(DEAD)
    assert model[0].out_features == model[4].in_features == len(ALIVE)
    assert groups == [(id(group), [id(p) for p in group["params"]]) for group in its_optimizer.param_groups]

    after = batch(generator)
    for mode in (False, True):
        torch.testing.assert_close(model.train(mode)(after[0]), whole.train(mode)(after[0]), rtol=1e-12, atol=1e-12)
    step(model, its_optimizer, after)
    step(whole, whole_optimizer, after)
    expected = {name: sliced(name, tensor) for name, tensor in whole.state_dict().items()}
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("optimizer", optimizers())
def test_output_and_next_step_stay(optimizer):
    assert_dead_neurons_do_not_matter(optimizer, NORMS["both"])


@pytest.mark.parametrize("norms", [NORMS["none"], NORMS["before"], NORMS["after"]], ids=["none", "before", "after"])
@pytest.mark.parametrize("optimizer", optimizers(variants=[{}]))
def test_output_and_next_step_stay_with_other_norms(optimizer, norms):
    assert_dead_neurons_do_not_matter(optimizer, norms)


def freeze(model):
    for parameter in (model[0].weight, model[4].bias, model[6].weight):
        parameter.requires_grad_(False)


@pytest.mark.parametrize("optimizer", optimizers(variants=[{}, {"fused": True}]))
def test_a_partly_frozen_model(optimizer):
    assert_dead_neurons_do_not_matter(optimizer, NORMS["none"], prepare=freeze)


@pytest.mark.parametrize("name", ENTRYWISE)
def test_parameter_groups_with_settings_of_their_own(name):
    kind = getattr(torch.optim, name)
    accepted = inspect.signature(kind).parameters

    def grouped(parameters):
        parameters = list(parameters)
        settings = {"lr": 0.02, "weight_decay": 0.05, "maximize": True, "foreach": True}
        weights = {"params": [p for p in parameters if p.dim() == 2]}
        biases = {key: value for key, value in settings.items() if key in accepted}
        return kind([weights, {**biases, "params": [p for p in parameters if p.dim() == 1]}], lr=0.01)

    assert_dead_neurons_do_not_matter(grouped, NORMS["none"])


def test_factored_moments_are_sliced_along_the_dimensions_they_have():
    """Adafactor: an entry's step depends on its whole row and column, and is not the same afterwards."""
    model, optimizer, generator = build(torch.optim.Adafactor, NORMS["none"], torch.float32)
    before = {name: dict(optimizer.state[p]) for name, p in model.named_parameters()}
    prune_dead(model, optimizer, batch(generator, torch.float32)[0])
    rows, columns = before["0.weight"]["row_var"], before["0.weight"]["col_var"]
    assert torch.equal(optimizer.state[model[0].weight]["row_var"], rows[ALIVE])
    assert torch.equal(optimizer.state[model[0].weight]["col_var"], columns)
    assert torch.equal(optimizer.state[model[4].weight]["col_var"], before["4.weight"]["col_var"][:, ALIVE])
    assert torch.equal(optimizer.state[model[4].weight]["row_var"], before["4.weight"]["row_var"])
    assert torch.equal(optimizer.state[model[0].bias]["variance"], before["0.bias"]["variance"][ALIVE])
    assert_steps_change_every_parameter(model, optimizer, generator)


def test_muon_with_another_optimizer_for_the_biases():
    """Muon takes matrices alone, so models have two optimizers; its steps depend on the whole matrix."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, 9), nn.ReLU(), nn.Linear(9, CLASSES))
    muon = torch.optim.Muon([model[0].weight, model[2].weight], lr=0.02)
    adam = torch.optim.AdamW([model[0].bias, model[2].bias])
    generator = torch.Generator().manual_seed(2)
    both = Together(muon, adam)
    step(model, both, batch(generator, torch.float32))
    with torch.no_grad():
        model[0].weight[DEAD] = 0
        model[0].bias[DEAD] = -1
    x, _ = batch(generator, torch.float32)
    momenta = [muon.state[model[0].weight]["momentum_buffer"], muon.state[model[2].weight]["momentum_buffer"]]
    moment = adam.state[model[0].bias]["exp_avg"]
    expected = model(x)
    pruner = DynamicPruner(model, [muon, adam], example_inputs=(x,), patience=1)
    model(x)
    pruner.activations.observe()
    assert pruner.prune().neurons_pruned == len(DEAD)
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(muon.state[model[0].weight]["momentum_buffer"], momenta[0][ALIVE])
    assert torch.equal(muon.state[model[2].weight]["momentum_buffer"], momenta[1][:, ALIVE])
    assert torch.equal(adam.state[model[0].bias]["exp_avg"], moment[ALIVE])
    assert_steps_change_every_parameter(model, both, generator)


class Together:
    def __init__(self, *optimizers):
        self.optimizers = optimizers

    def zero_grad(self):
        for each in self.optimizers:
            each.zero_grad()

    def step(self):
        for each in self.optimizers:
            each.step()


def assert_steps_change_every_parameter(model, optimizer, generator):
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(2):
        step(model, optimizer, batch(generator, torch.float32))
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert not torch.equal(parameter, old)
        assert parameter.isfinite().all()


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_refused_with_a_reason(name, reason):
    model = make_model()
    optimizer = getattr(torch.optim, name)(model.parameters())
    with pytest.raises(ValueError, match=f"optimizer: {name} {reason}"):
        make_pruner(model, optimizer)
    with pytest.raises(ValueError, match=f"optimizer: {name} {reason}"):
        make_pruner(model, [torch.optim.SGD(model.parameters(), lr=0.1), optimizer])


def test_a_list_that_holds_something_else_is_named():
    model = make_model()
    adam = torch.optim.Adam(model.parameters())
    with pytest.raises(TypeError, match=r"optimizer: expected a torch.optim.Optimizer, .* got \[Adam"):
        make_pruner(model, [adam, None])
    with pytest.raises(ValueError, match="optimizer: SGD holds none of the model's parameters"):
        make_pruner(model, [adam, torch.optim.SGD(make_model().parameters(), lr=0.1)])


SCHEDULES = {
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 2, 0.5),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=12),
    "plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=1),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))
def test_learning_rate_schedules_go_on(schedule):
    """The same rates and momenta, step by step, as without a prune."""

    def run(prune_after):
        model, optimizer, generator = build(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), NORMS["none"])
        rates = schedule(optimizer)
        seen = []
        for index in range(10):
            step(model, optimizer, batch(generator))
            rates.step(*[1.0] * isinstance(rates, lr_scheduler.ReduceLROnPlateau))
            seen.append([(group["lr"], group["momentum"]) for group in optimizer.param_groups])
            if index == prune_after:
                prune_dead(model, optimizer, batch(generator)[0])
                assert model[0].out_features < 9
        assert rates.optimizer is optimizer
        return seen

    seen = run(prune_after=3)
    assert seen == run(prune_after=None)
    assert len({rates[0] for rates in seen}) > 1


def test_state_that_was_moved_to_another_device_follows_there():
    """Some keep moments on the CPU while the model is on a GPU; here they are on "meta"."""
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters())
    pruner = make_pruner(model, optimizer, threshold=0.5)
    x, labels = torch.randn(16, INPUTS - 1), torch.zeros(16, dtype=torch.int64)
    nn.functional.cross_entropy(model(x), labels).backward()
    optimizer.step()
    for state in optimizer.state.values():
        state["exp_avg_sq"] = state["exp_avg_sq"].to("meta")
    pruner.activations.observe()
    assert pruner.prune().neurons_pruned > 0
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
        assert state["exp_avg"].is_cpu
        assert state["exp_avg_sq"].is_meta
