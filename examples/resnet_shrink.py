"""Trains a small residual network on handwritten digits and shrinks it, by the lines marked `# shrink`.

    python resnet_shrink.py

Channels that a residual sum adds up are removed together, in all layers that write or read them.
"""

import copy

import torch
from quickstart import load_data, test, train
from torch import nn
from torch.utils.data import DataLoader

import kddp_ext


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.norm2(self.second(torch.relu(self.norm1(self.first(x))))))


torch.manual_seed(0)
training_data, test_data = load_data()
loader, test_loader = DataLoader(training_data, batch_size=64, shuffle=True), DataLoader(test_data, batch_size=64)
stem = nn.Unflatten(1, (1, 8)), nn.Conv2d(1, 24, 3, padding=1), nn.ReLU()
head = nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24 * 4 * 4, 10)
original = nn.Sequential(*stem, Block(24), Block(24), *head)
optimizer = torch.optim.Adam(original.parameters(), lr=3e-3)
for _ in range(4):
    train(loader, original, nn.CrossEntropyLoss(), optimizer)
test(test_loader, original)

model = copy.deepcopy(original)  # shrink
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
pruner = kddp_ext.DynamicPruner(  # shrink
    model, optimizer, example_inputs=(training_data[0][0][None],),
    criterion="saliency", target_macs=0.25, target_steps=8, interval=8,
)  # fmt: skip
for _ in range(6):
    model.train()
    for images, labels in loader:
        logits = model(images)
        with torch.no_grad():
            teacher_logits = original(images)  # shrink
        loss = kddp_ext.fused_kd_l1_loss(logits, teacher_logits, labels, pruner.activations)  # shrink
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if report := pruner.step():  # shrink
            print(report)
test(test_loader, model)
