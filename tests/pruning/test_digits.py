"""A real training on digits: the convolutions of a VGG shrink at the same accuracy."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import kddp_ext

TRAINING_IMAGES, BATCH, EPOCHS = 1400, 64, 14
LAYERS = ["0", "3", "7", "10"]


def digits():
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    # Shuffled, because the last images are of other writers.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.tensor(data.target)[order]


def vgg():
    layers, channels = [], 1
    for outputs, pool in ((32, False), (32, True), (64, False), (64, True)):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] * pool
        channels = outputs
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4, 64), nn.ReLU(), nn.Linear(64, 10))


def train(l1_weight):
    """Train a VGG, with prunes where there is a penalty; return its widths and its accuracy on the test images."""
    torch.manual_seed(0)
    model, (images, labels) = vgg(), digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    options = {"layers": LAYERS, "threshold": 0.1, "patience": 1}
    pruner = kddp_ext.DynamicPruner(model, optimizer, example_inputs=(images[:2],), **options)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 4e-3, epochs=EPOCHS, steps_per_epoch=TRAINING_IMAGES // BATCH
    )
    for epoch in range(EPOCHS):
        for batch in torch.randperm(TRAINING_IMAGES)[: TRAINING_IMAGES // BATCH * BATCH].split(BATCH):
            logits = model.train()(images[batch])
            loss = kddp_ext.fused_kd_l1_loss(
                logits, None, labels[batch], pruner.activations, alpha=0.0, l1_weight=l1_weight
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if l1_weight and epoch in (EPOCHS // 3, EPOCHS // 2, 2 * EPOCHS // 3):
            pruner.prune()
    with torch.no_grad():
        right = model.eval()(images[TRAINING_IMAGES:]).argmax(1) == labels[TRAINING_IMAGES:]
    return pruner.widths, float(right.float().mean())


@pytest.fixture
def one_thread():
    """Use one thread, so that sums have the same order on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_pruned_training_is_as_accurate():
    whole, accuracy = train(0.0)
    pruned, after = train(0.03)
    print(f"\n{accuracy:.2%} whole {whole}, {after:.2%} pruned {pruned}")
    assert sum(pruned.values()) < 0.85 * sum(whole.values())
    assert after > accuracy - 0.01
