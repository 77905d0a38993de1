"""The activations that the loss gets belong to the logits that it gets, whatever else the model is used for."""

import pytest
import torch
from pruner_cases import example, make_model, make_pruner
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import kddp_ext

LABELS = torch.arange(6) % 3


def gradients(model, pruner, logits, activations, l1_weight=0.1):
    """The gradients of a step's loss, and the statistics that it left."""
    loss = kddp_ext.fused_kd_l1_loss(logits, None, LABELS, activations, alpha=0.0, l1_weight=l1_weight)
    found = torch.autograd.grad(loss, list(model.parameters()))
    values = pruner.statistics["0"].values.clone()
    pruner.reset()
    return (*found, values)


def expected(model, pruner):
    logits = model(example())
    return gradients(model, pruner, logits, pruner.activations)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("rows", [6, 4])
def test_validation_between_the_forward_pass_and_the_loss_changes_nothing(mode, rows):
    model = make_model()
    pruner = make_pruner(model)
    wanted = expected(model, pruner)
    logits = model(example())
    with mode():
        model(example(rows) + 3)
    torch.testing.assert_close(gradients(model, pruner, logits, pruner.activations), wanted, rtol=0, atol=0)


def test_two_passes_before_one_loss_are_an_error_from_which_the_next_step_recovers():
    model = make_model()
    pruner = make_pruner(model)
    for view in (1, 2):
        model(view * example())
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"more than one forward pass with gradients has reached 0 .*one batch"):
            _ = pruner.activations
    logits = model(example())
    torch.testing.assert_close(gradients(model, pruner, logits, pruner.activations), expected(model, pruner))


class Twice(nn.Module):
    """Calls its block twice. A batch of two rows is interrupted between the calls."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4))

    def forward(self, x):
        first = self.block(x)
        if len(x) == 2:
            raise ValueError("interrupted")
        return self.block(first)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_an_interrupted_pass_of_a_layer_that_is_called_twice_is_an_error_from_which_the_next_recovers(mode):
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(6, 4)
    pruner = kddp_ext.DynamicPruner(model, example_inputs=(x,))

    def values():
        model(x)
        return [each.detach().clone() for each in pruner.activations]

    wanted = values()
    with pytest.raises(ValueError, match="interrupted"), mode():
        model(x[:2])
    with pytest.raises(RuntimeError, match="more than one forward pass with gradients"):
        values()
    torch.testing.assert_close(values(), wanted, rtol=0, atol=0)


def test_passes_whose_activations_are_read_in_between_each_count():
    model = make_model()
    pruner = make_pruner(model)
    logits, activations = [], []
    for view in (1, 2):
        logits.append(model(view * example()))
        activations.append(pruner.activations)
    for each in zip(logits, activations, strict=True):
        kddp_ext.fused_kd_l1_loss(each[0], None, LABELS, each[1], alpha=0.0)
    assert pruner.statistics["0"].rows == 12


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.inner, self.reentrant = make_model(), reentrant

    def forward(self, x):
        if torch.compiler.is_exporting():
            return self.inner(x)
        return checkpoint(self.inner, x.requires_grad_(), use_reentrant=self.reentrant)


def checkpointed(reentrant):
    model = Checkpointed(reentrant)
    return model, kddp_ext.DynamicPruner(model, example_inputs=(example(),))


def test_a_checkpoints_recomputation_changes_nothing():
    model, pruner = checkpointed(reentrant=False)
    for _ in range(2):
        logits, activations = model(example()), pruner.activations
        loss = kddp_ext.fused_kd_l1_loss(logits, None, LABELS, activations, alpha=0.0, l1_weight=0.1)
        loss.backward()
    plain = make_model()
    logits = plain(example())
    loss = kddp_ext.fused_kd_l1_loss(logits, None, LABELS, [plain[1](plain[0](example()))], alpha=0.0, l1_weight=0.1)
    loss.backward()
    torch.testing.assert_close(model.inner[0].weight.grad, 2 * plain[0].weight.grad)


def test_a_reentrant_checkpoint_is_an_error_that_names_the_way_out():
    model, pruner = checkpointed(reentrant=True)
    logits = model(example())
    with pytest.raises(
        ValueError, match=r"activations\[0\]: expected a tensor that requires a gradient.*use_reentrant=False"
    ):
        kddp_ext.fused_kd_l1_loss(logits, None, LABELS, pruner.activations, alpha=0.0, l1_weight=0.1)
    assert pruner.statistics["inner.0"].rows == 0


def test_a_compiled_model_is_not_compiled_again_for_each_pass():
    model = make_model()
    pruner = make_pruner(model)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    for _ in range(4):
        logits = compiled(example())
        gradients(model, pruner, logits, pruner.activations)
        with torch.no_grad():
            compiled(example())
    assert counter.frame_count <= 3  # with gradients before and after the first read, and without
