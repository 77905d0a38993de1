"""Real trainings on digits: streams, heads and hidden layers all get narrower, and the networks stay accurate."""

import pytest
import torch
from pruning.zoo import STRUCTURES
from pruning.zoo.groups import GROUPS, WITH_NORMS
from pruning.zoo.layers import CLASSES
from sklearn.datasets import load_digits

import kddp_ext

TRAINING_IMAGES, BATCH = 437, 23


def images(pixels):
    """8×8 pixels as 16×16 pixels of three channels."""
    return pixels[:, None].repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 3, -1, -1) / 8 - 1


def tokens(pixels):
    """16 tokens, the ink of each half row as one of 8 levels."""
    return (pixels.reshape(-1, 16, 4).sum(2) * (7.99 / 64)).long()


def digits(encode):
    data = load_digits(n_class=CLASSES)
    # Shuffled, because the last images are of other writers.
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    return encode(torch.tensor(data.images, dtype=torch.float32)[order]), torch.tensor(data.target)[order]


# How the images become inputs, the epochs, the accuracy to be reached, and the groups.
TRAININGS = {
    "ResNet-20, option A": (images, 8, 0.9, GROUPS),
    "ViT, transformers": (images, 9, 0.9, WITH_NORMS),
    "GPT-2, classifier": (tokens, 18, 0.8, WITH_NORMS),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_streams_heads_and_hidden_layers_are_pruned_while_a_network_learns_digits(name):
    """A quarter of each group goes after a third and half of the training, the least active neurons."""
    torch.manual_seed(0)
    encode, epochs, accuracy, groups = TRAININGS[name]
    model, (inputs, labels) = STRUCTURES[name].build(), digits(encode)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    options = {"streams": "all", "threshold": 1.0, "maximum_share": 0.25, "patience": 1}
    pruner = kddp_ext.DynamicPruner(model, optimizer, example_inputs=(inputs[:2],), **options)
    before = pruner.widths
    assert len(before) == len(groups[name])
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(TRAINING_IMAGES).split(BATCH):
            logits = model.train()(inputs[batch])
            loss = kddp_ext.fused_kd_l1_loss(logits, None, labels[batch], pruner.activations, alpha=0.0, l1_weight=0.01)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch in (epochs // 3, epochs // 2):
            pruner.prune()
    with torch.no_grad():
        right = model.eval()(inputs[TRAINING_IMAGES:]).argmax(1) == labels[TRAINING_IMAGES:]
    print(f"\n{name}: {float(right.float().mean()):.1%}, {pruner}")
    assert all(pruner.widths[layer] < 0.8 * width for layer, width in before.items())
    assert right.float().mean() > accuracy
