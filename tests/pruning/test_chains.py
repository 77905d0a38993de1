"""On chains drawn at random: pruning is cutting a neuron's outgoing weights, and the history says which."""

import copy
import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kddp_ext.pruning.pruner import DynamicPruner

INPUTS, CLASSES = 5, 3
ACTIVATIONS = [nn.ReLU, nn.GELU, nn.Tanh, nn.PReLU, nn.Softplus, nn.Identity, lambda: nn.ReLU(inplace=True)]


@st.composite
def chains(draw):
    """Linear layers with norms, activations and dropouts between them in any order."""
    modules, width = [], INPUTS
    for _ in range(draw(st.integers(1, 3))):
        wider = draw(st.integers(1, 12))
        between = [draw(st.sampled_from(ACTIVATIONS))()]
        if draw(st.booleans()):
            between.append(nn.BatchNorm1d(wider, affine=draw(st.booleans())))
        if wider > 2 and draw(st.booleans()):  # with one neuron fewer, a slope a channel would be one for all
            between.append(nn.PReLU(wider))
        if draw(st.booleans()):
            between.append(nn.Dropout(0.3, inplace=draw(st.booleans())))
        modules += [nn.Linear(width, wider, bias=draw(st.booleans())), *draw(st.permutations(between))]
        width = wider
    return nn.Sequential(*modules, nn.Linear(width, CLASSES)).double()


@settings(max_examples=8, deadline=None)
@given(
    model=chains(),
    threshold=st.floats(0.05, 0.9),
    criterion=st.sampled_from(["contribution", "mean_activation"]),
    round_to=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_pruning_is_cutting_outgoing_weights(model, threshold, criterion, round_to, seed):
    torch.manual_seed(seed)
    x = torch.randn(20, INPUTS, dtype=torch.float64)
    for module in model:
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    model.train()(x)
    fresh, cut = copy.deepcopy(model), copy.deepcopy(model)
    pruner = DynamicPruner(
        model,
        example_inputs=(x,),
        criterion=criterion,
        threshold=threshold,
        patience=1,
        round_to=round_to,
        compensate=False,
    )
    for _ in range(2):
        model.eval()(x)
        pruner.activations.observe()
        pruner.prune()

    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name, reader in itertools.pairwise(names):
        cut.get_submodule(reader).weight.data[:, pruner.history.pruned(name)] = 0
        width = model.get_submodule(name).out_features
        assert width == model.get_submodule(reader).in_features == pruner.history.widths[name]
        assert width % round_to == 0 or width == fresh.get_submodule(name).out_features
    torch.testing.assert_close(model(x), cut.eval()(x), rtol=1e-10, atol=1e-12)

    pruner.history.replay(fresh, (x,))
    assert fresh.state_dict().keys() == model.state_dict().keys()
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
