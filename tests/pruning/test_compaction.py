"""Removing neurons: exact slices, compensation, copies of the model, and nothing changed after a failure."""

import copy

import pytest
import torch
from dead_neurons import ALIVE, DEAD, INPUTS, NORMS, batch, build, prune_dead, sliced, step
from pruner_cases import check, example, make_model, make_pruner, observed_pruner, state_of
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import kddp_ext
from kddp_ext.pruning import compaction
from kddp_ext.pruning.pruner import DynamicPruner

pytestmark = pytest.mark.usefixtures("one_trace_each")


# --- exact slices (test_optimizers.py covers every optimizer)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01, amsgrad=True, weight_decay=0.01)


@pytest.mark.parametrize("norms", NORMS.values(), ids=list(NORMS))
def test_parameters_gradients_buffers_and_moments_are_exact_slices(norms):
    model, optimizer, generator = build(adam, norms, torch.float32)
    whole, whole_optimizer, _ = build(adam, norms, torch.float32)
    x = batch(generator, torch.float32)[0]
    whole.train()(x)
    prune_dead(model, optimizer, x)
    for name, tensor in model.state_dict().items():
        if name != "4.bias":  # it is compensated
            assert torch.equal(tensor, sliced(name, whole.state_dict()[name])), name
    whole_parameters = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, sliced(name, whole_parameters[name].grad)), name
        state, whole_state = optimizer.state[parameter], whole_optimizer.state[whole_parameters[name]]
        assert state.keys() == whole_state.keys()
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert torch.equal(state[key], sliced(name, whole_state[key])), (name, key)
        assert torch.equal(state["step"], whole_state["step"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_last_graph_may_be_alive(dtype):
    """`loss` and `logits` of the last step are usually still in scope at the end of an epoch."""
    model, optimizer, generator = build(sgd, NORMS["both"], dtype)
    x, labels = batch(generator, dtype)
    pruner = DynamicPruner(model, optimizer, example_inputs=(x,), patience=1, layers=["0"])
    logits = model(x)
    loss = kddp_ext.fused_kd_l1_loss(logits, None, labels, pruner.activations, alpha=0.0, l1_weight=1e-4)
    loss.backward()
    shapes = []
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: shapes.append(tuple(gradient.shape)))
    assert pruner.prune().neurons_pruned == len(DEAD)
    step(model, optimizer, batch(generator, dtype))
    assert (len(ALIVE), INPUTS) in shapes
    assert logits.grad_fn is not None
    assert loss.grad_fn is not None


def test_identities_flags_modes_and_hooks_stay():
    model, optimizer, generator = build(torch.optim.AdamW, NORMS["both"])
    model[0].weight.requires_grad_(False)
    model[1].eval()
    x, _ = batch(generator)
    calls = []
    model[0].weight.mark = "the user's own attribute"
    model[1].weight.register_hook(lambda gradient: calls.append("gradient"))
    model[1].weight.register_post_accumulate_grad_hook(lambda parameter: calls.append("accumulated"))
    model[2].register_forward_hook(lambda module, args, output: calls.append("forward"))
    identities = [id(tensor) for tensor in [*model.parameters(), *model.buffers()]]
    modes = [module.training for module in model.modules()]
    pruner = DynamicPruner(model, optimizer, example_inputs=(x,), patience=1, layers=["0"])
    model(x).sum().backward()
    pruner.activations.observe()
    assert pruner.prune().neurons_pruned == len(DEAD)
    assert [id(tensor) for tensor in [*model.parameters(), *model.buffers()]] == identities
    assert [module.training for module in model.modules()] == modes
    assert not model[0].weight.requires_grad
    assert model[1].weight.requires_grad
    assert model[0].weight.mark == "the user's own attribute"
    calls.clear()
    step(model, optimizer, batch(generator))
    assert calls == ["forward", "gradient", "accumulated"]


def test_transposed_storage_and_parameters_outside_the_optimizer():
    model, _, generator = build(adam, NORMS["none"])
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer, batch(generator))
    with torch.no_grad():
        for linear in (model[0], model[4]):
            linear.weight.data = linear.weight.data.t().contiguous().t()
            linear.weight.grad = linear.weight.grad.t().contiguous().t()
    x, _ = batch(generator)
    expected, gradient = model(x), model[0].weight.grad.clone()
    prune_dead(model, optimizer, x)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(model[0].weight.grad, gradient[ALIVE])
    assert optimizer.state[model[4].weight]["momentum_buffer"].shape == (7, len(ALIVE))
    step(model, optimizer, batch(generator))


# --- compensation of the mean


def constant_neurons(*behind):
    """Neurons 1 and 4 of five have a constant output other than zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), *behind).double()
    with torch.no_grad():
        model[0].weight[[1, 4]] = 0
        model[0].bias[[1, 4]] = torch.tensor([0.3, -2.0]).double()
    return model


class Residual(nn.Module):
    """A stream that two layers write and three read; the last reads it behind an activation."""

    def __init__(self):
        super().__init__()
        self.body, self.up, self.down = constant_neurons(), nn.Linear(5, 6).double(), nn.Linear(6, 5).double()
        self.side, self.last = nn.Linear(5, 2).double(), nn.Linear(5, 3).double()
        with torch.no_grad():
            self.down.weight[[1, 4]] = 0

    def forward(self, x):
        h = self.body(x)
        h = h + self.down(self.up(h).relu())
        return torch.cat([self.side(h), self.last(h.tanh())], 1)


class Gated(nn.Module):
    """Both layers are constant in the neurons that go."""

    def __init__(self):
        super().__init__()
        self.body, self.gate, self.last = constant_neurons(), nn.Linear(4, 5).double(), nn.Linear(5, 3).double()
        with torch.no_grad():
            self.gate.weight[[1, 4]] = 0

    def forward(self, x):
        return self.last(self.body(x) * self.gate(x).sigmoid())


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.left, self.right = constant_neurons(), nn.Linear(5, 3).double(), nn.Linear(5, 2).double()

    def forward(self, x):
        h = self.body(x)
        return torch.cat([self.left(h), self.right(h)], 1)


class Grouped(nn.Module):
    """Each of two groups of outputs reads five channels; a neuron is a channel of either group."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(4, 10, 1), nn.Sigmoid()).double()
        self.last = nn.Conv1d(10, 6, 1, groups=2).double()
        with torch.no_grad():
            self.body[0].weight[[1, 4, 6, 9]] = 0

    def forward(self, x):
        return self.last(self.body(x.unsqueeze(2))).flatten(1)


COMPENSATED = {
    "bias": (lambda: constant_neurons(nn.Linear(5, 3)), ("2.bias",)),
    "bias and norm": (lambda: constant_neurons(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)), ("2.bias",)),
    "norm without bias": (
        lambda: constant_neurons(nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)),
        ("3.running_mean",),
    ),
    "norm without bias or affine": (
        lambda: constant_neurons(nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 3)),
        ("3.running_mean",),
    ),
    "two heads": (TwoHeads, ("left.bias", "right.bias")),
    "residual stream": (Residual, ("up.bias", "side.bias", "last.bias")),
    "gated": (Gated, ("last.bias",)),
    "grouped convolution": (Grouped, ("last.bias",)),
    "depthwise convolution": (
        lambda: constant_neurons(
            nn.Unflatten(1, (-1, 1)), nn.Conv1d(5, 10, 1, groups=5), nn.Tanh(), nn.Conv1d(10, 4, 1), nn.Flatten()
        ),
        ("5.bias",),
    ),
}


def prune_constant_neurons(model, x, **options):
    layer = "0" if isinstance(model, nn.Sequential) else "body.0"
    return observed_pruner(model.eval(), x, layers=[layer], **options).prune()


@pytest.mark.parametrize(("make", "compensated"), COMPENSATED.values(), ids=list(COMPENSATED))
def test_compensation_replaces_constant_neurons_exactly(make, compensated):
    model, x = make(), torch.randn(50, 4, dtype=torch.float64)
    model.train()(x)
    whole = copy.deepcopy(model)
    report = prune_constant_neurons(model, x)
    assert report.layers[0].pruned == (1, 4)
    assert report.layers[0].compensated == compensated
    for training in (False, True):
        torch.testing.assert_close(model.train(training)(x), whole.train(training)(x), rtol=1e-12, atol=1e-12)


def test_impossible_compensation_is_reported_and_compensation_can_be_turned_off():
    x = torch.randn(20, 4, dtype=torch.float64)
    report = prune_constant_neurons(constant_neurons(nn.Linear(5, 3, bias=False)), x)
    assert report.layers[0].uncompensated == ("2",)
    assert "not compensated, because they have no bias: 2" in str(report)
    model = constant_neurons(nn.Linear(5, 3))
    bias = model[2].bias.detach().clone()
    assert prune_constant_neurons(model, x, compensate=False).layers[0].compensated == ()
    assert torch.equal(model[2].bias, bias)


# --- copies of the model


def averaged(model, *, use_buffers):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_a_moving_average_continues(use_buffers):
    model, optimizer, generator = build(torch.optim.AdamW, NORMS["both"])
    average = averaged(model, use_buffers=use_buffers)
    average.update_parameters(model)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(1.5)
    whole = copy.deepcopy(average)
    identities = [id(tensor) for tensor in [*average.parameters(), *average.buffers()]]
    prune_dead(model, optimizer, batch(generator)[0], copies=[average])
    assert [id(tensor) for tensor in [*average.parameters(), *average.buffers()]] == identities
    assert average.module[0].out_features == average.module[4].in_features == len(ALIVE)
    assert average.module[1].num_features == average.module[3].num_features == len(ALIVE)
    for name, tensor in average.module.state_dict().items():
        if name != "4.bias":  # it is compensated
            assert torch.equal(tensor, sliced(name, whole.module.state_dict()[name])), name

    before = {name: tensor.clone() for name, tensor in average.module.state_dict().items()}
    step(model, optimizer, batch(generator))
    average.update_parameters(model)
    buffers = {name for name, _ in model.named_buffers()}
    for name, tensor in average.module.state_dict().items():
        new, old = model.state_dict()[name], before[name]
        if tensor.is_floating_point():
            expected = new if name in buffers and not use_buffers else 0.5 * old + 0.5 * new
            torch.testing.assert_close(tensor, expected, msg=lambda m, n=name: f"{n}: {m}")


def test_a_copy_is_compensated_through_its_own_weights():
    model = make_model()
    with torch.no_grad():  # constant neurons, which can be replaced without loss
        model[0].weight[[1, 4]] = 0
        model[0].bias[[1, 4]] = torch.tensor([2.0, 0.5])
    ema = copy.deepcopy(model)
    with torch.no_grad():
        ema[3].weight.mul_(torch.tensor([[2.0], [-1.0], [0.5]]))
    expected, ema_expected = model(example()), ema(example())
    pruner = make_pruner(model, copies=[ema])
    assert check(pruner).layers[0].pruned == (1, 4)
    torch.testing.assert_close(model(example()), expected)
    torch.testing.assert_close(ema(example()), ema_expected)
    assert not torch.equal(ema[3].bias, model[3].bias)


def test_copies_may_have_another_dtype_or_be_compiled_and_can_be_saved(tmp_path):
    model = make_model(dropout=0.1)
    plain, double, compiled = (copy.deepcopy(model) for _ in range(3))
    double.double()
    compiled[0].weight.grad = torch.arange(40.0).reshape(8, 5)
    pruner = make_pruner(model, copies=(plain, double, torch.compile(compiled)), criterion="dead")
    assert check(pruner, [2]).neurons_pruned == 1
    for each in (plain, double, compiled):
        assert each[0].weight.shape == (7, 5)
        assert each[3].weight.shape == (3, 7)
    assert torch.equal(compiled[0].weight.grad, torch.arange(40.0).reshape(8, 5)[[0, 1, 3, 4, 5, 6, 7]])
    assert double[0].weight.dtype == torch.float64
    assert double(example().double()).shape == plain(example()).shape
    average = averaged(plain, use_buffers=False)
    kddp_ext.save_student(tmp_path / "student", average, pruner.history)
    loaded = kddp_ext.load_student(tmp_path / "student", make_model, (example(),))
    assert torch.equal(loaded.eval()(example()), average.eval()(example()))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda m: m.__setitem__(0, nn.Linear(5, 9)),
            r"0.weight is of shape \(9, 5\), but of shape \(8, 5\) in the model",
        ),
        (lambda m: m.append(nn.BatchNorm1d(3)), "4 is torch.*BatchNorm1d, but missing in the model"),
        (lambda m: m[3].register_parameter("bias", None), r"3.bias is missing, but of shape \(3,\) in the model"),
        (lambda m: m.register_buffer("s", torch.ones(2)), r"s is of shape \(2,\), but missing in the model"),
        (lambda m: m.__setitem__(1, nn.GELU()), "1 is .*GELU, but .*ReLU in the model"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda model: model, AveragedModel], ids=["plain", "averaged"])
def test_copies_of_another_structure_are_refused(change, reason, wrap):
    other = make_model()
    change(other)
    with pytest.raises(ValueError, match=rf"copies\[0\]: {reason}"):
        make_pruner(make_model(), copies=[wrap(other)])


def test_wrong_copies_are_named():
    model = make_model()
    for wrong in (copy.deepcopy(model), "ema", None):
        with pytest.raises(TypeError, match="copies: expected a list of modules"):
            make_pruner(model, copies=wrong)
    with pytest.raises(TypeError, match=r"copies\[1\]: expected a torch.nn.Module, got dict"):
        make_pruner(model, copies=[copy.deepcopy(model), {}])
    with pytest.raises(ValueError, match=r"copies\[0\]: it shares 0.weight with the model"):
        make_pruner(model, copies=[model])
    shared, other = copy.deepcopy(model), copy.deepcopy(model)
    shared[3].bias = other[3].bias
    with pytest.raises(ValueError, match=r"copies\[1\]: it shares 3.bias with copies\[0\]"):
        make_pruner(model, copies=[other, shared])


# --- a failure at any place changes nothing


class InjectedError(Exception):
    pass


class FailsAt:
    """Calls a function, but raises before or after the k-th call."""

    def __init__(self, function, call, after, error=InjectedError):
        self.function, self.call, self.after, self.error, self.calls = function, call, after, error, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.call and not self.after:
            raise self.error
        result = self.function(*args, **kwargs)
        if self.calls == self.call and self.after:
            raise self.error
        return result


class Trained:
    """A model with a copy, its optimizer, and a pruner that is about to prune both hidden layers."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.PReLU(6), nn.Linear(6, 3)
        )
        self.copy = copy.deepcopy(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        options = {"criterion": "mean_activation", "threshold": 0.9, "patience": 1, "copies": [self.copy]}
        x = torch.randn(12, 5)
        self.pruner = DynamicPruner(self.model, self.optimizer, example_inputs=(x,), **options)
        self.model(x).square().mean().backward()
        self.optimizer.step()
        self.pruner.activations.observe()

    def state(self):
        return state_of(self.model, self.copy, optimizer=self.optimizer, pruner=self.pruner)


@pytest.mark.parametrize(("after", "error"), [(False, InjectedError), (True, KeyboardInterrupt)])
@pytest.mark.parametrize(("owner", "name"), [(compaction.ops, "gather_slices"), (torch, "empty")])
def test_a_failure_of_any_allocation_changes_nothing(monkeypatch, owner, name, after, error):
    counter, counted, trained = FailsAt(getattr(owner, name), -1, False), Trained(), Trained()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, counter)
        assert all(layer.pruned for layer in counted.pruner.prune().layers)
    assert counter.calls > 0
    before = trained.state()
    for call in range(1, counter.calls + 1):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, FailsAt(getattr(owner, name), call, after, error))
            with pytest.raises(error):
                trained.pruner.prune()
        assert trained.state() == before
    assert trained.pruner.prune().neurons_pruned > 0


@pytest.mark.parametrize(("after", "error"), [(False, InjectedError), (True, KeyboardInterrupt)])
def test_a_failure_of_any_change_changes_nothing(monkeypatch, after, error):
    """Changes are those of tensors, optimizer state, sizes of modules, and the state of the pruner."""
    apply, changes = compaction.CompactionPlan.apply, []
    with monkeypatch.context() as patch:
        patch.setattr(compaction.CompactionPlan, "apply", lambda plan, refresh: changes.extend(plan.changes))
        Trained().pruner.prune()
    trained = Trained()
    before = trained.state()
    for number in range(len(changes)):

        def fail(plan, refresh, number=number):
            change, undo = plan.changes[number]
            plan.changes[number] = FailsAt(change, 1, after, error), undo
            apply(plan, refresh)

        with monkeypatch.context() as patch:
            patch.setattr(compaction.CompactionPlan, "apply", fail)
            with pytest.raises(error):
                trained.pruner.prune()
        assert trained.state() == before
    assert number > 30
    assert trained.pruner.prune().neurons_pruned > 0


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            lambda t: t.optimizer.state[t.model[3].weight].update(exp_avg=torch.zeros(3, 2)),
            r"optimizer: AdamW keeps 'exp_avg' of 3.weight, a tensor of shape \(3, 2\)",
        ),
        (
            lambda t: t.optimizer.state[t.model[5].weight].update(history=[torch.zeros(3)]),
            "optimizer: AdamW keeps 'history' of 5.weight, list, .* nothing was pruned",
        ),
        (
            lambda t: setattr(t.model[5], "weight", nn.Parameter(torch.zeros(3, 7))),
            r"model: 5.weight was traced with shape \(3, 6\) and now has shape \(3, 7\)",
        ),
        (
            lambda t: t.model.__setitem__(5, nn.Linear(6, 3)),
            "model: 5 is another module since the pruner was made; make a new pruner",
        ),
        (
            lambda t: t.copy.__setitem__(5, nn.Linear(7, 3)),
            r"copies\[0\]: 5.weight is of shape \(3, 7\), but of shape \(3, 6\) in the model",
        ),
        (
            lambda t: t.pruner.statistics["3"].values[0, 2].fill_(torch.nan),
            "some activations of 3 were infinite or NaN",
        ),
        (lambda t: t.model[5].weight.data.fill_(torch.inf), "the weights that read 3 are infinite or NaN"),
        (
            lambda t: t.copy[5].weight.data.fill_(torch.inf),
            r"copies\[0\]: compensating for removed neurons makes 5.bias infinite",
        ),
    ],
)
def test_bad_tensors_are_named_and_nothing_changes(spoil, reason):
    trained = Trained()
    spoil(trained)
    before = trained.state()
    with pytest.raises(ValueError, match=reason):
        trained.pruner.prune()
    assert trained.state() == before
