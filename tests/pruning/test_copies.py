"""Copies of the model, such as moving averages, are pruned with it or not at all."""

import copy

import pytest
import torch
from dead_neurons import ALIVE, DEAD, NORMS, batch, build, sliced, step
from pruner_cases import example, kill, make_model, make_pruner, observe
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kddp_ext import load_student, save_student
from kddp_ext.pruning import compaction
from kddp_ext.pruning.pruner import DynamicPruner

pytestmark = pytest.mark.usefixtures("one_trace_each")


def averaged(model, *, use_buffers):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)


def train_with_average(*, use_buffers):
    """A model with two norms whose neurons DEAD died long ago, and its average, of other weights."""
    model, optimizer, generator = build(torch.optim.AdamW, NORMS["both"])
    average = averaged(model, use_buffers=use_buffers)
    step(model, optimizer, batch(generator))
    average.update_parameters(model)
    return model, optimizer, average, generator


def prune(model, optimizer, copies, x):
    pruner = DynamicPruner(model, optimizer, example_inputs=(x,), patience=1, layers=["0"], copies=copies)
    with torch.no_grad():
        model.train()(x)
        model[1].weight[DEAD] = 0
        model[1].bias[DEAD] = -1
    model(x)
    pruner.reset()
    pruner.activations.observe()
    return pruner.prune()


@pytest.mark.parametrize("use_buffers", [False, True])
def test_a_moving_average_goes_on(use_buffers):
    """Averages of sliced weights are slices of the averages, and the count of averages goes on."""
    model, optimizer, average, generator = train_with_average(use_buffers=use_buffers)
    whole = copy.deepcopy(average)
    x, _ = batch(generator)
    identities = [id(tensor) for tensor in [*average.parameters(), *average.buffers()]]
    report = prune(model, optimizer, [average], x)
    assert report.layers[0].pruned == tuple(DEAD)
    assert [id(tensor) for tensor in [*average.parameters(), *average.buffers()]] == identities
    assert average.module[0].out_features == average.module[4].in_features == len(ALIVE)
    assert average.module[1].num_features == average.module[3].num_features == len(ALIVE)
    for name, tensor in average.module.state_dict().items():
        if name != "4.bias":  # it took up the compensation
            assert torch.equal(tensor, sliced(name, whole.module.state_dict()[name])), name

    before = {name: tensor.clone() for name, tensor in average.module.state_dict().items()}
    step(model, optimizer, batch(generator))
    count = int(average.n_averaged)
    average.update_parameters(model)
    assert int(average.n_averaged) == count + 1
    buffers = {name for name, _ in model.named_buffers()}
    for name, tensor in average.module.state_dict().items():
        new, old = model.state_dict()[name], before[name]
        if tensor.is_floating_point():
            expected = new if name in buffers and not use_buffers else 0.5 * old + 0.5 * new
            torch.testing.assert_close(tensor, expected, msg=lambda m, n=name: f"{n}: {m}")
    average.eval()(x)


def test_a_copy_is_compensated_through_its_own_weights():
    """The neurons are constant, so nothing is lost: neither of the model's outputs nor of the copy's."""
    model = make_model()
    with torch.no_grad():
        model[0].weight[[1, 4]] = 0
        model[0].bias[[1, 4]] = torch.tensor([2.0, 0.5])
    ema = copy.deepcopy(model)
    with torch.no_grad():
        ema[3].weight.mul_(torch.tensor([[2.0], [-1.0], [0.5]]))
    expected, of_ema = model(example()), ema(example())
    pruner = make_pruner(model, copies=[ema])
    observe(pruner)
    assert pruner.prune().layers[0].pruned == (1, 4)
    torch.testing.assert_close(model(example()), expected)
    torch.testing.assert_close(ema(example()), of_ema)
    assert not torch.equal(ema[3].bias, model[3].bias)


def test_copies_of_other_kinds_at_once():
    """A plain one, one in another dtype, one behind torch.compile with gradients of its own."""
    model = make_model(dropout=0.1)
    plain, double, compiled = (copy.deepcopy(model) for _ in range(3))
    double.double()
    compiled[0].weight.grad = torch.arange(40.0).reshape(8, 5)
    pruner = make_pruner(model, copies=(plain, double, torch.compile(compiled)), criterion="dead")
    kill(model, [2])
    observe(pruner)
    assert pruner.prune().neurons_pruned == 1
    for each in (plain, double, compiled):
        assert each[0].weight.shape == (7, 5)
        assert each[3].weight.shape == (3, 7)
    assert torch.equal(compiled[0].weight.grad, torch.arange(40.0).reshape(8, 5)[[0, 1, 3, 4, 5, 6, 7]])
    kill(model, [0])
    observe(pruner)
    assert pruner.prune().neurons_pruned == 1
    assert double[0].weight.dtype == torch.float64
    assert double(example().double()).shape == plain(example()).shape


def test_a_copy_is_saved_as_the_student(tmp_path):
    model = make_model()
    average = averaged(model, use_buffers=False)
    pruner = make_pruner(model, copies=[average], criterion="dead")
    kill(model, [2, 5])
    observe(pruner)
    pruner.prune()
    save_student(tmp_path / "student", average, pruner.history)
    loaded = load_student(tmp_path / "student", make_model, (example(),))
    assert torch.equal(loaded(example()), average(example()))


class InjectedError(Exception):
    pass


class FailsAfter:
    """Sets data as ever, and raises after the k-th time."""

    def __init__(self, calls, error):
        self.left, self.error, self.set_data = calls, error, compaction.set_data

    def __call__(self, *arguments):
        self.set_data(*arguments)
        self.left -= 1
        if self.left == 0:
            raise self.error


@pytest.mark.parametrize("error", [InjectedError, KeyboardInterrupt])
def test_a_failure_at_any_tensor_changes_neither(monkeypatch, error):
    model, optimizer, average, generator = train_with_average(use_buffers=True)
    x, _ = batch(generator)
    pruner = DynamicPruner(
        model, optimizer, example_inputs=(x,), criterion="mean_activation", threshold=1.0, patience=1, copies=[average]
    )
    model(x)
    pruner.activations.observe()
    before = snapshot(model, average)
    changed = 2 * (len(model.state_dict()) - 2)  # of both, all but the norms' counters of batches
    for calls in range(1, changed + 1):
        with monkeypatch.context() as patch:
            patch.setattr(compaction, "set_data", FailsAfter(calls, error))
            with pytest.raises(error):
                pruner.prune()
        assert_same(snapshot(model, average), before)
    assert pruner.prune().neurons_pruned > 0
    assert average.module[0].out_features == model[0].out_features < 9


def snapshot(*modules):
    tensors = [tensor for module in modules for tensor in [*module.parameters(), *module.buffers()]]
    sizes = [
        {key: value for key, value in each.__dict__.items() if isinstance(value, int)}
        for module in modules
        for each in module.modules()
    ]
    return [(id(t), t.data_ptr(), t.shape) for t in tensors], [t.detach().clone() for t in tensors], sizes


def assert_same(now, before):
    assert now[0] == before[0]
    assert now[2] == before[2]
    assert all(torch.equal(a, b) for a, b in zip(now[1], before[1], strict=True))


def wider():
    return make_model(width=9)


def with_a_norm():
    return nn.Sequential(*make_model(), nn.BatchNorm1d(3))


def without_bias():
    model = make_model()
    model[3] = nn.Linear(8, 3, bias=False)
    return model


def with_a_buffer():
    model = make_model()
    model.register_buffer("scale", torch.ones(2))
    return model


def of_other_modules():
    model = make_model()
    model[1] = nn.GELU()
    return model


WRONG = [
    (wider, r"copies\[0\]: 0.weight has shape \(9, 5\), but \(8, 5\) in the model"),
    (with_a_norm, r"copies\[0\]: 4 is BatchNorm1d, but nothing in the model"),
    (without_bias, r"copies\[0\]: 3.bias is missing in it"),
    (with_a_buffer, r"copies\[0\]: scale is not in the model"),
    (of_other_modules, r"copies\[0\]: 1 is GELU, but ReLU in the model"),
]


@pytest.mark.parametrize(("make", "reason"), WRONG)
@pytest.mark.parametrize("wrap", [lambda model: model, AveragedModel], ids=["plain", "averaged"])
def test_copies_of_another_structure_are_refused(make, reason, wrap):
    with pytest.raises(ValueError, match=reason):
        make_pruner(make_model(), copies=[wrap(make())])


def test_wrong_copies_are_named():
    model = make_model()
    for wrong in (copy.deepcopy(model), "ema", None):
        with pytest.raises(TypeError, match="copies: expected a list of modules"):
            make_pruner(model, copies=wrong)
    with pytest.raises(TypeError, match=r"copies\[1\]: expected a torch.nn.Module, got dict"):
        make_pruner(model, copies=[copy.deepcopy(model), model.state_dict() and {}])
    with pytest.raises(ValueError, match=r"copies\[0\]: it shares 0.weight with the model"):
        make_pruner(model, copies=[model])
    shared, other = copy.deepcopy(model), copy.deepcopy(model)
    shared[3].bias = other[3].bias
    with pytest.raises(ValueError, match=r"copies\[1\]: it shares 3.bias with copies\[0\]"):
        make_pruner(model, copies=[other, shared])


def test_a_copy_that_was_changed_is_named_and_nothing_is_pruned():
    model = make_model()
    fine, changed = copy.deepcopy(model), copy.deepcopy(model)
    pruner = make_pruner(model, copies=[fine, changed], criterion="dead")
    kill(model, [2])
    observe(pruner)
    changed[3] = nn.Linear(7, 3)
    before = snapshot(model, fine)
    with pytest.raises(ValueError, match=r"copies\[1\]: 3.weight has shape \(3, 7\), but \(3, 8\) in the model"):
        pruner.prune()
    assert_same(snapshot(model, fine), before)
    assert pruner.widths == {"0": 8}
    changed[3] = copy.deepcopy(fine[3])
    assert pruner.prune().neurons_pruned == 1


def test_compensation_that_overflows_in_a_copy_is_named():
    model = make_model()
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[1] = 1e30
        model[3].weight[:, 1] = 1e-20
    ema = copy.deepcopy(model)
    with torch.no_grad():
        ema[3].weight[:, 1] = 1e20
    pruner = make_pruner(model, copies=[ema])
    observe(pruner)
    before = snapshot(model, ema)
    with pytest.raises(ValueError, match=r"copies\[0\]: compensating for removed neurons makes 3.bias infinite"):
        pruner.prune()
    assert_same(snapshot(model, ema), before)
