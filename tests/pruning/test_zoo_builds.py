"""Every network of the zoo runs on both sets of inputs, in both modes and in float64."""

import pytest
import torch
from pruning.zoo import STRUCTURES
from pruning.zoo.traces import build, cast


@pytest.mark.parametrize("name", STRUCTURES)
def test_outputs_are_finite_and_the_same_in_float64(name):
    structure, model = STRUCTURES[name], build(name)
    inputs, others = structure.inputs(), structure.other_inputs()
    assert len(inputs[0]) != len(others[0])
    with torch.no_grad():
        for arguments in (inputs, others):
            assert model.train()(*arguments).isfinite().all()
            outputs = model.eval()(*arguments)
            assert torch.equal(model(*arguments), outputs)
            expected = outputs.double()
            model.train().double()
            torch.testing.assert_close(model.eval()(*cast(arguments, torch.float64)), expected, rtol=1e-3, atol=1e-4)
            model.train().float()


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_parameter_is_random_and_has_a_gradient(name):
    """A network whose outputs hardly depend on its inputs would hide errors of the pruner."""
    model = build(name).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) < 200_000
    outputs = model(*STRUCTURES[name].inputs())
    assert outputs.std(0).mean() > 0.01 * outputs.std()
    outputs.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.numel() == 1 or parameter.min() < parameter.max(), key
        assert not parameter.requires_grad or parameter.grad.count_nonzero() > 0, key
