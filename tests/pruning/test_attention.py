"""nn.MultiheadAttention keeps its outputs when tracing gives it another class, and when heads are removed."""

import copy

import pytest
import torch
from pruner_cases import halves, silence
from torch import nn

from kddp_ext.pruning.attention import with_removable_heads
from kddp_ext.pruning.compaction import Removal, plan_compaction
from kddp_ext.pruning.tracing.find import find_neurons

CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)

# Options of the module, and of its call.
CASES = {
    "batch first": ({"batch_first": True}, {}),
    "batch second": ({}, {}),
    "without weights": ({"batch_first": True}, {"need_weights": False}),
    "weights of each head": ({}, {"average_attn_weights": False}),
    "without bias": ({"bias": False, "batch_first": True}, {}),
    "causal mask": ({"batch_first": True}, {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}),
    "mask of numbers": ({}, {"attn_mask": torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).double()}),
    "mask of each sample and head": ({"batch_first": True}, {"attn_mask": CAUSAL.expand(12, -1, -1)}),
    "padding": ({"batch_first": True}, {"key_padding_mask": PADDING}),
    "both masks": ({"batch_first": True}, {"key_padding_mask": PADDING, "attn_mask": CAUSAL, "need_weights": False}),
    "keys and values of other sizes": ({"batch_first": True, "kdim": 10, "vdim": 14}, {}),
}


def case(name):
    torch.manual_seed(0)
    options, arguments = CASES[name]
    attention = nn.MultiheadAttention(24, 4, **options).double()
    sizes = 24, options.get("kdim", 24), options.get("vdim", 24)
    shape = (3, 5) if options.get("batch_first") else (5, 3)
    return attention, [torch.randn(*shape, size, dtype=torch.float64) for size in sizes], arguments


def results(attention, inputs, arguments):
    return [each for each in attention(*inputs, **arguments) if each is not None]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_outputs_weights_and_gradients_stay(name, training):
    attention, inputs, arguments = case(name)
    other = copy.deepcopy(attention)
    with with_removable_heads(other):
        assert type(other) is not nn.MultiheadAttention
    for one, two in ((inputs, inputs), ([inputs[0]] * 3, [inputs[0]] * 3))[: 1 if "kdim" in CASES[name][0] else 2]:
        expected, got = (
            results(each.train(training), given, arguments) for each, given in ((attention, one), (other, two))
        )
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
        for each in (expected, got):
            each[0].square().sum().backward()
    for a, b in zip(attention.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-10, atol=1e-10)


def test_a_sample_without_a_batch_dimension():
    attention, inputs, _ = case("batch second")
    inputs, other = [each[:, 0] for each in inputs], copy.deepcopy(attention)
    with with_removable_heads(other):
        for a, b in zip(results(attention, inputs, {}), results(other, inputs, {}), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


class Attends(nn.Module):
    def __init__(self, attention, arguments):
        super().__init__()
        self.attention, self.arguments, self.last = attention, arguments, nn.Linear(24, 3).double()

    def forward(self, *inputs):
        return self.last(self.attention(*inputs, **self.arguments)[0])


@pytest.mark.parametrize("name", [name for name, (_, arguments) in CASES.items() if "need_weights" in arguments])
def test_heads_are_removed_exactly(name):
    attention, inputs, arguments = case(name)
    model = Attends(attention, arguments).eval()
    neurons = find_neurons(model, tuple(inputs)).neurons
    neurons = neurons.only([group for group in neurons.groups if group.width == 4])
    assert len(neurons.groups) == 1
    removal = Removal(neurons, halves(neurons))
    silence(model, neurons, removal.keep)
    expected = model(*inputs)
    plan_compaction(model, removal).apply()
    assert model.attention.num_heads == 2
    torch.testing.assert_close(model(*inputs), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(copy.deepcopy(model)(*inputs), expected, rtol=1e-12, atol=1e-12)
