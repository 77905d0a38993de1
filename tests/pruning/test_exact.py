"""Pruning neurons that are exactly dead changes neither the output nor the next step of what remains."""

import pytest
import torch
from torch import nn

import kddp_ext
from kddp_ext.pruner import DynamicPruner

pytestmark = pytest.mark.usefixtures("one_trace_each")

INPUTS, WIDTH, CLASSES = 6, 9, 4
DEAD = [0, 3, 8]
ALIVE = [1, 2, 4, 5, 6, 7]

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, weight_decay=0.01),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "adadelta": torch.optim.Adadelta,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "asgd": torch.optim.ASGD,
    "rprop": torch.optim.Rprop,
}
NORMS = {"none": (False, False), "before": (True, False), "after": (False, True), "both": (True, True)}


def build(optimizer, norms, dtype=torch.float64):
    """A model a few steps into its training, in which the neurons DEAD have just died."""
    torch.manual_seed(1)
    before, after = norms
    model = nn.Sequential(
        nn.Linear(INPUTS, WIDTH, bias=not before),  # before a norm its gradient would be rounding noise
        nn.BatchNorm1d(WIDTH) if before else nn.Identity(),
        nn.ReLU(),
        nn.BatchNorm1d(WIDTH) if after else nn.Identity(),
        nn.Linear(WIDTH, 7),
        nn.Tanh(),
        nn.Linear(7, CLASSES),
    ).to(dtype)
    optimizer = optimizer(model.parameters())
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        step(model, optimizer, batch(generator, dtype))
    with torch.no_grad():
        if before:
            model[1].weight[DEAD] = 0
            model[1].bias[DEAD] = -1
        else:
            model[0].weight[DEAD] = 0
            model[0].bias[DEAD] = -1
        if after:
            model[3].bias[DEAD] = 0
            model[3].running_mean[DEAD] = 0
    return model, optimizer, generator


def batch(generator, dtype=torch.float64):
    x = torch.randn(16, INPUTS, generator=generator).to(dtype)
    return x, torch.randint(CLASSES, (16,), generator=generator)


def step(model, optimizer, batch):
    x, labels = batch
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), labels).backward()
    optimizer.step()


def prune_dead(model, optimizer, x):
    # A batch norm makes dead neurons nonzero by rounding or by its bias: std is what tells them then.
    pruner = DynamicPruner(model, optimizer, example_inputs=(x,), patience=1, layers=["0"])
    training = model.training
    with torch.no_grad():
        model.train()(x)
    pruner.activations.observe()
    report = pruner.prune()
    pruner.close()
    model.train(training)
    return report


def sliced(name, tensor):
    axis = {"0.weight": 0, "0.bias": 0, "1": 0, "3": 0, "4.weight": 1}
    for prefix, dimension in axis.items():
        if name == prefix or (name.split(".")[0] == prefix and tensor.dim() == 1):
            return tensor.index_select(dimension, torch.tensor(ALIVE))
    return tensor


def optimizers_and_norms():
    for optimizer in OPTIMIZERS:
        named = optimizer in ("sgd", "adam", "adamw", "rmsprop", "adagrad")
        for norms in NORMS if named else ["both"]:
            yield pytest.param(OPTIMIZERS[optimizer], NORMS[norms], id=f"{optimizer}-{norms}")


@pytest.mark.parametrize(("optimizer", "norms"), optimizers_and_norms())
def test_output_and_next_step_stay(optimizer, norms):
    model, its_optimizer, generator = build(optimizer, norms)
    whole, whole_optimizer, _ = build(optimizer, norms)
    example = batch(generator)
    whole.train()(example[0])  # the pruned one sees this batch as it observes it: running statistics move alike
    report = prune_dead(model, its_optimizer, example[0])
    assert report.layers[0].pruned == tuple(DEAD)
    assert model[0].out_features == model[4].in_features == len(ALIVE)

    after = batch(generator)
    for mode in (False, True):
        torch.testing.assert_close(model.train(mode)(after[0]), whole.train(mode)(after[0]), rtol=1e-12, atol=1e-12)
    step(model, its_optimizer, after)
    step(whole, whole_optimizer, after)
    expected = {name: sliced(name, tensor) for name, tensor in whole.state_dict().items()}
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("norms", NORMS.values(), ids=list(NORMS))
def test_slices_are_taken_bit_for_bit(norms):
    """Parameters, gradients, buffers and every moment are the kept slices themselves."""
    model, optimizer, generator = build(OPTIMIZERS["adam amsgrad"], norms, torch.float32)
    whole, whole_optimizer, _ = build(OPTIMIZERS["adam amsgrad"], norms, torch.float32)
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
    model, optimizer, generator = build(OPTIMIZERS["sgd"], NORMS["both"], dtype)
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
    model, optimizer, generator = build(OPTIMIZERS["adamw"], NORMS["both"])
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
    model, _, generator = build(OPTIMIZERS["sgd"], NORMS["none"])
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer, batch(generator))
    prune_dead(model, optimizer, batch(generator)[0])
    assert optimizer.state[model[4].weight]["momentum_buffer"].shape == (7, len(ALIVE))
    step(model, optimizer, batch(generator))


def test_factored_moments_are_sliced_along_the_dimensions_they_have():
    model, optimizer, generator = build(torch.optim.Adafactor, NORMS["none"], torch.float32)
    rows = optimizer.state[model[0].weight]["row_var"].clone()
    columns = optimizer.state[model[0].weight]["col_var"].clone()
    prune_dead(model, optimizer, batch(generator, torch.float32)[0])
    assert torch.equal(optimizer.state[model[0].weight]["row_var"], rows[ALIVE])
    assert torch.equal(optimizer.state[model[0].weight]["col_var"], columns)
    step(model, optimizer, batch(generator, torch.float32))


def test_transposed_storage():
    model, optimizer, generator = build(OPTIMIZERS["adam"], NORMS["none"])
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


def test_a_learning_rate_schedule_goes_on():
    model, optimizer, generator = build(OPTIMIZERS["adam"], NORMS["before"])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    prune_dead(model, optimizer, batch(generator)[0])
    step(model, optimizer, batch(generator))
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005)
