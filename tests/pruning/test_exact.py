"""Pruning neurons that are exactly dead changes neither the output nor the next step of what remains.

That this holds with every optimizer is in test_optimizers.py.
"""

import pytest
import torch
from dead_neurons import ALIVE, CLASSES, DEAD, INPUTS, NORMS, batch, build, prune_dead, sliced, step
from torch import nn

import kddp_ext
from kddp_ext.pruning.pruner import DynamicPruner

pytestmark = pytest.mark.usefixtures("one_trace_each")


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01, amsgrad=True, weight_decay=0.01)


@pytest.mark.parametrize("norms", NORMS.values(), ids=list(NORMS))
def test_slices_are_taken_bit_for_bit(norms):
    """Parameters, gradients, buffers and every moment are the kept slices themselves."""
    model, optimizer, generator = build(adam, norms, torch.float32)
    whole, whole_optimizer, _ = build(adam, norms, torch.float32)
    x = batch(generator, torch.float32)[0]
    whole.train()(x)
    prune_dead(model, optimizer, x)
    for name, tensor in model.state_dict().items():
        if name != "4.bias":  # it took up the compensation
            assert torch.equal(tensor, sliced(name, whole.state_dict()[name])), name
    of_whole = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, sliced(name, of_whole[name].grad)), name
        state, whole_state = optimizer.state[parameter], whole_optimizer.state[of_whole[name]]
        assert state.keys() == whole_state.keys()
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert torch.equal(state[key], sliced(name, whole_state[key])), (name, key)
        assert torch.equal(state["step"], whole_state["step"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_last_graph_may_be_alive(dtype):
    """`loss` and `logits` of the last step are usually still in scope when an epoch ends."""
    model, optimizer, generator = build(sgd, NORMS["both"], dtype)
    x, labels = batch(generator, dtype)
    pruner = DynamicPruner(model, optimizer, example_inputs=(x,), patience=1, layers=["0"])
    logits = model(x)
    loss = kddp_ext.fused_kd_l1_loss(logits, None, labels, pruner.activations, alpha=0.0, l1_weight=1e-4)
    loss.backward()
    calls = []
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: calls.append(tuple(gradient.shape)))
    assert pruner.prune().neurons_pruned == len(DEAD)
    step(model, optimizer, batch(generator, dtype))
    assert calls
    assert (len(ALIVE), INPUTS) in calls
    assert logits.grad_fn is not None
    assert loss.grad_fn is not None


def test_keeps_identity_flags_modes_and_hooks():
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


def test_layers_in_a_row_are_pruned_at_once():
    """A weight that loses rows to its own layer and columns to the one before."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(INPUTS, 8), nn.ReLU(), nn.Linear(8, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, CLASSES)
    ).double()
    with torch.no_grad():
        model[3].bias.fill_(2)  # alive but for those that follow
        for module, dead in ((model[0], [1, 2]), (model[3], [0, 6])):
            module.weight[dead] = 0
            module.bias[dead] = -1
    optimizer = torch.optim.Adam(model.parameters())
    generator = torch.Generator().manual_seed(2)
    step(model, optimizer, batch(generator))
    x, _ = batch(generator)
    pruner = DynamicPruner(model, optimizer, example_inputs=(x,), criterion="dead", patience=1)
    expected = model.eval()(x)
    middle = model[2].weight.detach().clone()
    moment = optimizer.state[model[2].weight]["exp_avg"].clone()
    pruner.activations.observe()
    report = pruner.prune()
    assert [layer.pruned for layer in report.layers] == [(1, 2), (0, 6)]
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    rows, columns = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([0, 3, 4, 5, 6, 7])
    assert torch.equal(model[2].weight, middle[rows][:, columns])
    assert torch.equal(optimizer.state[model[2].weight]["exp_avg"], moment[rows][:, columns])


def test_parameters_that_the_optimizer_does_not_hold():
    model, _, generator = build(sgd, NORMS["none"])
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer, batch(generator))
    prune_dead(model, optimizer, batch(generator)[0])
    assert optimizer.state[model[4].weight]["momentum_buffer"].shape == (7, len(ALIVE))
    step(model, optimizer, batch(generator))


def test_transposed_storage():
    model, optimizer, generator = build(adam, NORMS["none"])
    with torch.no_grad():
        for linear in (model[0], model[4]):
            linear.weight.data = linear.weight.data.t().contiguous().t()
            linear.weight.grad = linear.weight.grad.t().contiguous().t()
    x, _ = batch(generator)
    expected = model(x)
    gradient = model[0].weight.grad.clone()
    prune_dead(model, optimizer, x)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(model[0].weight.grad, gradient[ALIVE])
    step(model, optimizer, batch(generator))
