"""The time of a training step in which the pruner measures saliency, compared with its other criteria and none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import kddp_ext
from benchmarks.settings import Settings
from benchmarks.table import Table, milliseconds, times
from benchmarks.timing import Quartiles, Stopwatch, stages_in_turns
from kddp_ext.workflow.models import PlainStudent, PreActivationResNet

CLASSES = 10
WITHOUT = "no pruner"


class SmallViT(nn.Module):
    """A vision transformer for images of 32x32: patches of 4x4, three layers of 128 channels and four heads."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 128, 4, stride=4)
        self.position = nn.Parameter(torch.zeros(64, 128))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(128, 4, 256, 0.0, "gelu", batch_first=True, norm_first=True) for _ in range(3)
        )
        self.norm = nn.LayerNorm(128)
        self.classifier = nn.Linear(128, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            tokens = layer(tokens)
        logits: Tensor = self.classifier(self.norm(tokens).mean(1))
        return logits


MODELS: dict[str, Callable[[], nn.Module]] = {
    "cnn5": lambda: PlainStudent(3, 32, CLASSES, (32, 64, 128), 1024),
    "ResNet-20": lambda: PreActivationResNet(3, CLASSES, 20, (16, 32, 64)),
    "small ViT": SmallViT,
}


def measure(settings: Settings) -> dict[str, Any]:
    """Seconds of a step (forward, loss, backward, Adam), in float32 and for convolutions in channels-last layout."""
    batch = 8 if settings.smoke else 64
    result = {}
    for name, build in MODELS.items():
        runs = {WITHOUT: _step(build, None, batch)}
        runs |= {each: _step(build, each, batch) for each in ("contribution", "saliency")}
        result[name] = stages_in_turns(runs, settings)["time"].to_json(base="contribution")
    return {"batch": batch, "models": result}


def _step(build: Callable[[], nn.Module], criterion: str | None, batch: int) -> Callable[[Stopwatch], None]:
    torch.manual_seed(0)
    model = build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's annotations
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    images = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    teacher, labels = torch.randn(batch, CLASSES), torch.randint(CLASSES, (batch,))
    pruner = None
    if criterion is not None:
        pruner = kddp_ext.DynamicPruner(model, optimizer, example_inputs=(images[:2],), criterion=criterion)

    def run(stopwatch: Stopwatch) -> None:
        with stopwatch("time"):
            logits = model(images)
            activations = () if pruner is None else pruner.activations
            loss = kddp_ext.fused_kd_l1_loss(logits, teacher, labels, activations)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def tables(by_heap: dict[str, dict[str, Any]]) -> list[Table]:
    """One row for each network."""
    rows, batch = [], 0
    for heap, result in by_heap.items():
        batch = result["batch"]
        for name, timed in result["models"].items():
            seconds = [milliseconds(timed["seconds"][each]) for each in (WITHOUT, "contribution", "saliency")]
            ratio = times(Quartiles(**timed["times_contribution"]["saliency"]))
            rows.append([f"{heap}, {name}", *seconds, ratio])
    columns = ["memory, network", "no pruner (ms)", "contribution (ms)", "saliency (ms)", "saliency / contribution"]
    return [Table("saliency-step", f"A training step of {batch} images", columns, rows)]
