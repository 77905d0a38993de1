"""Criterion "saliency": the sums equal what autograd gives for a multiplier of each sample and neuron."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from pruner_cases import INPUTS, example, make_model
from pruning.zoo import STRUCTURES, randomise_
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import kddp_ext
from kddp_ext import DynamicPruner
from kddp_ext.pruning.attention import with_removable_heads
from kddp_ext.pruning.tracing.recording import first_argument, tensors_in


def loss_of(outputs):
    """A loss of each sample that is not linear, averaged over the samples."""
    return sum(each.square().flatten(1).mean(1).add(1).log().mean() for each in tensors_in(outputs))


class Multipliers:
    """In front of every layer that reads neurons, (a - ā) is multiplied by 1 for each sample and neuron.

    The derivative of the loss by this multiplier is Σ over readers and positions of (a - ā) ∂loss/∂a.
    """

    def __init__(self, model, neurons, *, compensate=True):
        self.neurons, self.compensate = neurons, compensate
        self.means = [torch.zeros(()) for _ in neurons.values]
        self.seen = [0 for _ in neurons.values]
        for module, value in dict.fromkeys((reader.module, reader.value) for reader in neurons.readers):
            readers = [each for each in neurons.readers if (each.module, each.value) == (module, value)]
            mean = compensate and all(each.shift is not None for each in readers)
            model.get_submodule(module).register_forward_pre_hook(
                lambda _, args, kwargs, value=value, mean=mean: self.replace(args, kwargs, value, mean),
                with_kwargs=True,
            )

    def begin(self, samples):
        self.samples = samples
        self.ones = torch.ones(samples, self.neurons.number, dtype=torch.float64, requires_grad=True)
        self.values = {}

    def replace(self, args, kwargs, index, takes_mean):
        x, value = first_argument(args, kwargs), self.neurons.values[index]
        axis, layout = value.layout.axis, value.layout
        self.values.setdefault(index, []).append(x.detach().movedim(axis, -1).flatten(0, -2))
        ones = torch.where(value.neurons >= 0, self.ones[:, value.neurons.clamp(min=0)], 1.0)
        ones = ones[:, None, :, None].expand(-1, layout.outer, -1, layout.inner).flatten(1)
        ones = ones.repeat_interleave(len(x) // self.samples, 0)
        ones = (
            ones.view(len(x), *[1] * (x.dim() - 1)).transpose(1, axis)
            if x.dim() == 1
            else ones.view(len(x), *[-1 if dim == axis else 1 for dim in range(1, x.dim())])
        )
        mean = self.means[index] / self.seen[index] if takes_mean and self.seen[index] else torch.zeros(())
        mean = mean.view([-1 if dim == axis else 1 for dim in range(x.dim())]) if mean.dim() else mean
        y = mean + (x - mean) * ones
        return tuple(y if e is x else e for e in args), {k: y if e is x else e for k, e in kwargs.items()}

    def end(self):
        for index, rows in self.values.items():
            rows = torch.cat(rows)
            self.means[index] = self.means[index] + rows.sum(0)
            self.seen[index] += len(rows)


def measured(model, batches, *, loss=loss_of, scale=1.0, **options):
    """A pruner after one step with each batch."""
    pruner = DynamicPruner(model, example_inputs=batches[0], criterion="saliency", **options)
    for batch in batches:
        value = loss(model(*batch))
        pruner.activations.observe(value)
        (scale * value).backward()
    return pruner


def expected(model, batches, pruner, *, compensate=True):
    """The predicted increases by the definition."""
    neurons = pruner._state.neurons
    multipliers, squares, samples = Multipliers(model, neurons, compensate=compensate), 0, 0
    for number, batch in enumerate(batches):
        multipliers.begin(len(batch[0]))
        loss = loss_of(model(*batch))
        if number:  # the first pass measures the means
            (products,) = torch.autograd.grad(loss, multipliers.ones)
            squares = squares + (products * len(products)).square().sum(0)
            samples += len(products)
        multipliers.end()
    return squares / (2 * samples)


NETWORKS = [
    "ResNet-20, option A", "SE-ResNet", "DenseNet", "ShuffleNetV2", "U-Net", "ViT, torch.nn", "Swin, timm",
    "MobileNetV3", "Llama", "ALBERT", "GPT-2, classifier", "kddp_ext's student", "video", "gated convolutions",
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "streams"),
    [
        *((name, "exact") for name in NETWORKS),
        ("ViT, torch.nn", "all"),
        ("Llama", "all"),
        ("NFNet", "all"),
        ("PVT", "all"),
    ],
)
def test_saliency_is_the_derivative_by_a_multiplier(name, streams):
    structure = STRUCTURES[name]
    torch.manual_seed(0)
    model = structure.build().double().eval()
    randomise_(model, 1)
    batches = []
    for rows in (2, 3, 3):
        shapes = [(each.is_floating_point(), (rows, *each.shape[1:])) for each in structure.inputs()]
        batches.append(tuple(torch.randn(s).double() if real else torch.randint(1, 20, s) for real, s in shapes))
    copied = copy.deepcopy(model)
    with with_removable_heads(copied):  # their output projections are modules that run
        pass
    pruner = measured(model, batches, streams=streams)
    increase, right = increase_of(pruner), expected(copied, batches, pruner)
    assert int(pruner._state.saliency.samples) == 6
    assert bool((right > 0).any())
    torch.testing.assert_close(increase, right, rtol=1e-9, atol=1e-14 * float(right.max()))


# --- training loops


def batches_of(count=3, rows=6):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(rows, INPUTS, generator=generator),) for _ in range(count)]


def increase_of(pruner):
    return torch.cat(list(pruner.saliency.values()))


def test_neither_compensation_nor_a_bias_takes_out_the_mean_that_cannot_be_replaced():
    model = make_model().double()
    batches = [(x.double(),) for (x,) in batches_of()]
    copied = copy.deepcopy(model)
    with with_removable_heads(copied):  # their output projections are modules that run
        pass
    pruner = measured(model, batches, compensate=False)
    torch.testing.assert_close(increase_of(pruner), expected(copied, batches, pruner, compensate=False))
    with_mean = increase_of(measured(make_model().double(), batches))
    assert not torch.allclose(with_mean, increase_of(pruner))


@pytest.mark.parametrize("scale", [65536.0, 1 / 3])
def test_the_scale_of_the_loss_is_divided_out(scale):
    """That of GradScaler, and the share of an accumulation step."""
    torch.testing.assert_close(
        increase_of(measured(make_model(), batches_of(), scale=scale)),
        increase_of(measured(make_model(), batches_of())),
    )


@pytest.mark.parametrize("options", [{"reduction": "sum"}, {"normalizer": 17.0}, {"reduction": "none"}, {"alpha": 0.0}])
def test_reductions_of_the_fused_loss_give_the_same_saliency(options):
    """It is that of the mean loss of a sample; the penalty of these activations is not a part of it."""

    def run(reduce=lambda loss: loss, l1_weight=0.0, **options):
        model = make_model()
        pruner = DynamicPruner(model, example_inputs=(example(),), criterion="saliency")
        for (x,) in batches_of():
            logits = model(x)
            loss = kddp_ext.fused_kd_l1_loss(
                logits, logits.detach().flip(1), torch.arange(len(x)) % 3, pruner.activations,
                l1_weight=l1_weight, **{"alpha": 0.5, **options},
            )  # fmt: skip
            reduce(loss).backward()
        return increase_of(pruner), pruner._state.saliency.mean_loss

    if options == {"alpha": 0.0}:
        (right, loss), (found, same) = run(alpha=0.0), run(alpha=0.0, l1_weight=0.3)
    else:
        (right, loss), (found, same) = run(), run(torch.mean if "none" in options.values() else torch.sum, **options)
    torch.testing.assert_close(found, right)
    assert same == pytest.approx(loss)


def test_a_pass_whose_gradients_overflow_is_left_out():
    batches = batches_of(4)
    pruner = DynamicPruner(model := make_model(), example_inputs=batches[0], criterion="saliency")
    for number, batch in enumerate(batches):
        loss = loss_of(model(*batch))
        pruner.activations.observe(loss)
        (loss * (torch.inf if number == 2 else 1)).backward()
    without = measured(make_model(), batches[:2])
    # The means of the last pass include those of the pass that was left out.
    assert int(pruner._state.saliency.samples) + 6 == 12
    assert bool(increase_of(pruner).isfinite().all())
    assert int(pruner._state.saliency.samples) == 12
    assert int(increase_of(without).numel()) == 8


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_model()

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=reentrant)

    batches = [(x.requires_grad_(),) for (x,) in batches_of()]
    found = increase_of(measured(Checkpointed(), batches))
    torch.testing.assert_close(found, increase_of(measured(make_model(), batches)))
    assert bool((found > 0).any())


def test_a_compiled_model_gives_the_same_saliency():
    model = make_model()
    batches = batches_of(4)
    pruner = DynamicPruner(model, example_inputs=batches[0], criterion="saliency")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for batch in batches:
        loss = loss_of(compiled(*batch))
        pruner.activations.observe(loss)
        loss.backward()
    torch.testing.assert_close(increase_of(pruner), increase_of(measured(make_model(), batches)))


def test_bfloat16_under_autocast_is_near_float32():
    def run(enabled):
        model = make_model(32)
        pruner = DynamicPruner(model, example_inputs=(example(),), criterion="saliency")
        for (x,) in batches_of(3, 64):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                outputs = model(x)
            loss = loss_of(outputs.float())
            pruner.activations.observe(loss)
            loss.backward()
        return increase_of(pruner)

    right = run(False)
    assert float((run(True) - right).abs().max()) < 0.05 * float(right.max())


def test_passes_that_wait_for_their_backward_are_measured_alone():
    """Two losses are added before one backward."""
    batches = batches_of(3)
    pruner = DynamicPruner(model := make_model(), example_inputs=batches[0], criterion="saliency")
    total = 0
    for batch in batches:
        loss = loss_of(model(*batch))
        pruner.activations.observe(loss)
        total = total + loss
    total.backward()
    torch.testing.assert_close(increase_of(pruner), increase_of(measured(make_model(), batches)))


def test_a_batch_of_another_size_and_validation_in_between():
    batches = [(x.double(),) for (x,) in [*batches_of(2), (example(3),)]]
    pruner = DynamicPruner(model := make_model().double(), example_inputs=batches[0], criterion="saliency")
    for batch in batches:
        loss = loss_of(model(*batch))
        pruner.activations.observe(loss)
        loss.backward()
        with torch.no_grad():
            model(example(5).double())
    pruner._taps.finish()
    assert int(pruner._state.saliency.samples) == 9
    torch.testing.assert_close(increase_of(pruner), expected(make_model().double(), batches, pruner))


def test_nothing_of_the_size_of_activations_is_kept():
    batches = batches_of(2, 1000)
    pruner = measured(make_model(64), batches)
    held = [leaf.grad for leaf in pruner._taps.current.leaves if leaf.grad is not None]
    assert sum(each.numel() for each in held) <= 1000 * 64  # one product for each sample and neuron
    pruner._taps.finish()
    assert not pruner._taps._pending


# --- pruning


class Operations(TorchDispatchMode):
    """Counts operations by name, without views."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        if not any(each.alias_info and not each.alias_info.is_write for each in func._schema.returns):
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operations_of_a_step(layers, convolutions, criterion):
    """With `criterion` None, those of the same step without a pruner."""
    if convolutions:
        hidden = [module for _ in range(layers) for module in (nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())]
        model, x = nn.Sequential(*hidden, nn.Flatten(), nn.Linear(36, 3)), torch.randn(16, 4, 3, 3)
    else:
        hidden = [module for _ in range(layers) for module in (nn.Linear(4, 4), nn.ReLU())]
        model, x = nn.Sequential(*hidden, nn.Linear(4, 3)), torch.randn(16, 4)
    labels, pruner, activations = torch.arange(16) % 3, None, []
    if criterion is not None:
        pruner = DynamicPruner(model, example_inputs=(x,), criterion=criterion)
    for module in model[:-1]:
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda _module, _inputs, output: activations.append(output))
    for _ in range(3):
        activations.clear()
        with Operations() as operations:
            logits = model(x)
            read = activations if pruner is None else pruner.activations
            kddp_ext.fused_kd_l1_loss(logits, None, labels, read, alpha=0.0, l1_weight=0.1).backward()
    return operations.counts


@pytest.mark.parametrize("convolutions", [False, True])
def test_a_layer_adds_few_operations_to_a_step(convolutions):
    """Its samples are picked and its products computed; the entries of channels are added up. All else is shared."""

    def added_by_a_layer(criterion):
        few, many = (operations_of_a_step(layers, convolutions, criterion) for layers in (2, 4))
        return Counter({name: (many[name] - few[name]) / 2 for name in many if many[name] != few[name]})

    added = added_by_a_layer("saliency")
    added.subtract(added_by_a_layer(None))
    expected = {"index": 1, "gradient_products": 1} | ({"sum": 1, "amax": 1} if convolutions else {})
    assert {name: count for name, count in added.items() if count} == expected


def test_dead_neurons_go_first_and_a_target_ends_it():
    model = make_model(8)
    with torch.no_grad():
        model[0].weight[[2, 5]] = 0
        model[0].bias[[2, 5]] = -1
    pruner = measured(model, batches_of(), target_macs=6 / 8)
    report = pruner.prune()
    assert report.layers[0].pruned == (2, 5)
    assert report.predicted_increase == 0
    assert report.macs_after == report.macs_before * 6 // 8


def test_target_steps_take_the_same_share_each_time():
    model, batches = make_model(64), batches_of()
    pruner = measured(model, batches, target_parameters=0.25, target_steps=2)
    shares = [pruner.prune()]
    for batch in batches:
        loss = loss_of(model(*batch))
        pruner.activations.observe(loss)
        loss.backward()
    shares.append(pruner.prune())
    first, second = (report.parameters_after / shares[0].parameters_before for report in shares)
    assert first == pytest.approx(0.5, abs=0.03)
    assert second == pytest.approx(0.25, abs=0.03)
    assert shares[1].latest_predicted == shares[0].predicted_increase
    assert shares[1].latest_measured == pytest.approx(shares[1].loss - shares[0].loss)


def test_the_loss_budget_bounds_the_predicted_increase():
    for budget in (0.0003, 0.001, 0.003):
        pruner = measured(make_model(32), batches_of(), loss_budget=budget)
        curve = pruner.preview().curve
        report = pruner.prune()
        assert report.predicted_increase <= budget * report.loss
        following = next(step for step in curve if step.macs < report.macs_after)
        assert following.activity > budget * report.loss
        assert "predicted increase of the loss" in str(report)


def test_a_loss_above_the_budget_has_to_fall_before_more_is_removed():
    """The budget counts from the lowest loss that a check has seen."""
    model, batches = make_model(32), batches_of()
    pruner = measured(model, batches, loss_budget=0.001)
    assert pruner.prune().neurons_pruned > 0
    for factor, prunes in ((1.002, False), (1.0, True)):
        for batch in batches:
            loss = loss_of(model(*batch))
            pruner.activations.observe(loss)
            loss.backward()
        pruner._taps.finish()
        pruner._state.saliency.loss.fill_(pruner._state.lowest_loss * factor).mul_(pruner._state.saliency.steps)
        assert (pruner.prune().neurons_pruned > 0) == prunes


def test_without_a_loss_the_budget_says_what_to_do():
    batches = batches_of()
    pruner = DynamicPruner(model := make_model(), example_inputs=batches[0], criterion="saliency")
    for batch in batches:
        outputs = model(*batch)
        pruner.activations.observe()
        loss_of(outputs).backward()
    with pytest.raises(RuntimeError, match=r"the loss is not known.*pruner\.activations\.observe\(loss\)"):
        pruner.prune()


def test_without_gradients_saliency_says_what_is_missing():
    pruner = measured(make_model(), batches_of(1))
    with pytest.raises(RuntimeError, match="no gradients of the activations were seen"):
        pruner.prune()


def test_the_state_continues_where_it_was_saved():
    """The first pass after loading is measured as it would have been without the interruption."""
    batches = batches_of(4)
    whole = measured(make_model(), batches)
    first = measured(make_model(), batches[:2])
    second = DynamicPruner(model := make_model(), example_inputs=batches[0], criterion="saliency")
    second.load_state_dict(first.state_dict())
    for batch in batches[2:]:
        loss = loss_of(model(*batch))
        second.activations.observe(loss)
        loss.backward()
    assert torch.equal(increase_of(second), increase_of(whole))
    assert second._state.saliency.mean_loss == whole._state.saliency.mean_loss


def test_a_pruner_continues_the_history_of_a_pruned_model():
    batches = batches_of()
    first = measured(make_model(16), batches, target_macs=0.75)
    first.prune()
    second = measured(first.model, batches, target_macs=0.5, history=first.history)
    second.prune()
    assert second.history.original_widths == {"0": 16}
    fresh = make_model(16)
    second.history.replay(fresh, (example(),))
    assert fresh[0].out_features == second.widths["0"] == 6
    assert set(first.history.pruned("0")) < set(second.history.pruned("0"))


@pytest.mark.parametrize("layers", [[], ["0"]])
def test_a_history_may_lack_layers_that_were_not_pruned_before(layers):
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    history = kddp_ext.PruningHistory(dict.fromkeys(layers, 8))
    pruner = measured(model, batches_of(), target_macs=0.5, history=history)
    pruner.prune()
    assert pruner.history.original_widths == {"0": 8, "2": 6}
    assert pruner.history.widths == pruner.widths
    assert history.original_widths == dict.fromkeys(layers, 8)


@pytest.mark.parametrize("widths", [{"0": 7}, {"0": 8, "2": 6, "9": 4}])
def test_a_history_of_another_model_is_refused(widths):
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(ValueError, match=r"history: it ends with widths .* but the pruner has"):
        DynamicPruner(model, example_inputs=(example(),), history=kddp_ext.PruningHistory(widths))


def test_the_penalty_is_proportional_to_the_cost_of_a_neuron():
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    pruner = DynamicPruner(model, example_inputs=(example(),), l1_weight=0.1)
    # A neuron of the first layer saves 5 + 4 multiply-accumulates, one of the second 8 + 3.
    mean = (8 * 9 + 4 * 11) / 12
    assert pruner.l1_weights == pytest.approx([0.1 * 9 / mean, 0.1 * 11 / mean])


def test_the_prediction_ranks_neurons_as_their_removal_does():
    """The increase of the loss with each neuron at its mean, in a network that was trained on the digits."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    images = images.float() / 8 - 1
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pruner = DynamicPruner(model, example_inputs=(images[:2],), criterion="saliency")
    for _ in range(2):
        loss = F.cross_entropy(model(images), labels)
        pruner.activations.observe(loss)
        loss.backward()
    predicted = increase_of(pruner)
    true = []
    with torch.no_grad():
        before = F.cross_entropy(model(images), labels)
        hidden = model[:2](images), model[:4](images)
        for value, rest in zip(hidden, (model[2:], model[4:]), strict=True):
            for neuron in range(value.shape[1]):
                changed = value.clone()
                changed[:, neuron] = value[:, neuron].mean()
                true.append(F.cross_entropy(rest(changed), labels) - before)
    ranks = torch.stack([predicted.argsort().argsort(), torch.stack(true).argsort().argsort()]).double()
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.8
