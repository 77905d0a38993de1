"""Shrinks a vision transformer of Hugging Face Transformers: attention heads and MLP neurons are removed.

    python vit_transformers.py

The network is tiny and trained here, on handwritten digits. `ViTForImageClassification.from_pretrained` works the same.
"""

import copy

import torch
from quickstart import load_data
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification

import kddp_ext


def accuracy(model, loader):
    model.eval()
    with torch.no_grad():
        correct = [(model(images[:, None]).logits.argmax(1) == labels).sum().item() for images, labels in loader]
    print(f"Accuracy: {100 * sum(correct) / len(loader.dataset):.1f}%")


torch.manual_seed(0)
training_data, test_data = load_data()
loader, test_loader = DataLoader(training_data, batch_size=64, shuffle=True), DataLoader(test_data, batch_size=64)
config = ViTConfig(
    image_size=8, patch_size=2, num_channels=1, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=64, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
original = ViTForImageClassification(config)
optimizer = torch.optim.Adam(original.parameters(), lr=3e-3)
for images, labels in (batch for _ in range(12) for batch in loader):
    loss = torch.nn.functional.cross_entropy(original(images[:, None]).logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
accuracy(original, test_loader)

model = copy.deepcopy(original).train()
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
pruner = kddp_ext.DynamicPruner(
    model, optimizer, example_inputs=(images[:2, None],),
    criterion="saliency", target_macs=0.6, target_steps=8, interval=8,
)  # fmt: skip
for images, labels in (batch for _ in range(6) for batch in loader):
    logits = model(images[:, None]).logits
    with torch.no_grad():
        teacher_logits = original(images[:, None]).logits
    loss = kddp_ext.fused_kd_l1_loss(logits, teacher_logits, labels, pruner.activations)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if report := pruner.step():
        print(report)
accuracy(model, test_loader)
kddp_ext.save_student("vit.safetensors", model, pruner.history)
