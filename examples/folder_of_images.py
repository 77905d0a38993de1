"""Images in a folder for each class, a teacher and a student of your own; the student becomes smaller as it learns.

    python folder_of_images.py

The program draws images of two classes. For images of your own, give their folder to `Path`, and leave out `draw`.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from quickstart import test, train
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import kddp_ext


def draw(folder):
    random = np.random.default_rng(0)
    for number in range(240):
        stripes = np.tile(np.sin(np.arange(16) * random.uniform(0.8, 1.6) + random.uniform(0, 6)), (16, 1))
        image = 128 + 60 * (stripes.T if number % 2 else stripes) + random.normal(0, 30, (16, 16))
        place = folder / ("rows" if number % 2 else "columns")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(place / f"{number}.png")


def network(width, classes):
    layers = [nn.Conv2d(1, width, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(width, 2 * width, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, classes))


torch.manual_seed(0)
folder = Path("stripes")
draw(folder)
files, classes = sorted(folder.glob("*/*")), sorted(each.name for each in folder.iterdir())
images = torch.tensor(np.stack([np.array(Image.open(file).convert("L").resize((16, 16))) for file in files]))
labels = torch.tensor([classes.index(file.parent.name) for file in files])
data = random_split(TensorDataset(images[:, None] / 128 - 1, labels), [0.8, 0.2])
loader, test_loader = DataLoader(data[0], batch_size=16, shuffle=True), DataLoader(data[1], batch_size=64)
teacher, student = network(32, len(classes)), network(16, len(classes))
optimizer = torch.optim.Adam(teacher.parameters(), lr=5e-3)
for _ in range(8):
    train(loader, teacher, nn.CrossEntropyLoss(), optimizer)
test(test_loader, teacher.requires_grad_(False))
optimizer = torch.optim.Adam(student.parameters(), lr=5e-3)
pruner = kddp_ext.DynamicPruner(
    student, optimizer, example_inputs=(images[:2, None] / 128,), criterion="saliency", target_macs=0.4, interval=48
)
for X, y in (batch for _ in range(8) for batch in loader):
    loss = kddp_ext.fused_kd_l1_loss(student(X), teacher(X), y, pruner.activations)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    pruner.step()
print(pruner)
test(test_loader, student)
