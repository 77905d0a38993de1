"""How much a network changes when neurons are removed: without compensation, with the average, with reconstruction.

python -m benchmarks.compensation [--share S] [--epochs N] [--markdown FILE]

Networks are trained on scikit-learn's digits. In each layer that can be pruned, one at a time, the least active share
of the neurons is removed, and the output of the next layer on unseen images is compared with the output before.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rich.console import Console
from sklearn.datasets import load_digits
from torch import Tensor, nn

import kddp_ext
from benchmarks.table import Table, write_markdown
from kddp_ext.pruning.tracing.find import find_neurons

TRAINING_IMAGES, BATCH, OBSERVED = 1400, 64, 128
MODES: dict[str, dict[str, Any]] = {
    "nothing": {"compensate": False},
    "average": {"reconstruction_samples": 0},
    "reconstruction": {},
}


class Change(NamedTuple):
    """For one layer: width, removed neurons, and by mode the change of the next layer's outputs and of the logits."""

    layer: str
    width: int
    removed: int
    next_layer: dict[str, float]
    logits: dict[str, float]


def perceptron(activation: type[nn.Module]) -> nn.Module:
    """Two hidden layers."""
    hidden = [nn.Linear(64, 256), activation(), nn.Linear(256, 128), activation()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(128, 10))


def convolutional() -> nn.Module:
    """Three convolutions with norms that absorb the average, and a hidden layer behind a flatten."""
    layers: list[nn.Module] = []
    for inputs, outputs, pooled in ((1, 32, False), (32, 64, True), (64, 64, True)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] * pooled
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))


class TokenMixer(nn.Module):
    """Rows of an image as tokens: attention and a feed-forward layer, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(32, 4, 128, 0.0, "gelu", batch_first=True) for _ in range(2))
        )
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.embed(images.flatten(1, 2))).mean(1))
        return logits


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "perceptron, ReLU": lambda: perceptron(nn.ReLU),
    "perceptron, GELU": lambda: perceptron(nn.GELU),
    "convolutional": convolutional,
    "transformer": TokenMixer,
}


def digits() -> tuple[Tensor, Tensor]:
    """Images, float32 (1797, 1, 8, 8) from 0 to 1, and labels, int64 (1797,)."""
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


def trained(build: Callable[[], nn.Module], epochs: int) -> nn.Module:
    """A network after `epochs` passes over the first TRAINING_IMAGES, in evaluation mode."""
    torch.manual_seed(0)
    model, (images, labels) = build(), digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(TRAINING_IMAGES).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


def changes(model: nn.Module, share: float) -> list[Change]:
    """The changes for each layer that can be pruned, one at a time."""
    neurons = find_neurons(model, (digits()[0][:2],)).neurons
    return [_change(model, group.name, neurons.readers_of(group)[0].module, share) for group in neurons.groups]


def _change(model: nn.Module, layer: str, reader: str, share: float) -> Change:
    images = digits()[0]
    of_next: dict[str, float] = {}
    of_logits: dict[str, float] = {}
    before = after = 0
    for mode, options in MODES.items():
        pruned = copy.deepcopy(model)
        pruner = kddp_ext.DynamicPruner(
            pruned,
            example_inputs=(images[:2],),
            layers=[layer],
            patience=1,
            threshold=1.0,
            maximum_share=share,
            **options,
        )
        with torch.no_grad():
            for batch in images[:TRAINING_IMAGES].split(OBSERVED):
                pruned(batch)
                pruner.activations.observe()
        before = pruner.widths[layer]
        pruner.prune()
        after = pruner.widths[layer]
        of_next[mode], of_logits[mode] = (
            _distance(ours, theirs)
            for ours, theirs in zip(_outputs(pruned, reader), _outputs(model, reader), strict=True)
        )
    return Change(layer, before, before - after, of_next, of_logits)


def _outputs(model: nn.Module, reader: str) -> tuple[Tensor, Tensor]:
    """The output of the layer `reader`, with a BatchNorm behind it that may absorb the average; and the logits."""
    seen: list[Tensor] = []
    names = [name for name, _ in model.named_modules()]
    behind = names[names.index(reader) + 1] if reader != names[-1] else reader
    norm = isinstance(model.get_submodule(behind), nn.BatchNorm2d)
    module = model.get_submodule(behind if norm else reader)
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        logits = model(digits()[0][TRAINING_IMAGES:])
    handle.remove()
    return seen[0], logits


def _distance(pruned: Tensor, whole: Tensor) -> float:
    return float((pruned - whole).norm() / whole.norm())


def table(results: dict[str, list[Change]], share: float) -> Table:
    """One row for each layer; the last is the median."""
    rows, ratios = [], []
    for network, layers in results.items():
        for change in layers:
            gain = change.next_layer["nothing"] / max(change.next_layer["reconstruction"], 1e-12)
            ratios.append(gain)
            moved = [f"{change.next_layer[mode]:.1e}" for mode in MODES]
            of_logits = change.logits["nothing"] / max(change.logits["reconstruction"], 1e-12)
            counted = f"{change.removed} of {change.width}"
            rows.append([f"{network}, {change.layer}", counted, *moved, f"{gain:.1f}x", f"{of_logits:.1f}x"])
    rows.append(["median", "", "", "", "", f"{statistics.median(ratios):.1f}x", ""])
    columns = ["network, layer", "neurons removed", *MODES, "nearer by", "logits nearer by"]
    title = f"Relative change of the next layer's outputs where {share:.0%} of a layer's neurons go"
    note = "On digits that were not trained on. Nearer by: nothing / reconstruction."
    return Table("compensation", title, columns, rows, note)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compensation", description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=0.3, help="share of the neurons to remove (default 0.3)")
    parser.add_argument("--epochs", type=int, default=15, help="epochs of training (default 15)")
    parser.add_argument("--markdown", metavar="FILE", help="write the table to this file, or into its marked place")
    arguments = parser.parse_args()
    results = {name: changes(trained(build, arguments.epochs), arguments.share) for name, build in NETWORKS.items()}
    found = table(results, arguments.share)
    Console().print(found.for_terminal())
    if arguments.markdown:
        write_markdown(arguments.markdown, None, [found])


if __name__ == "__main__":
    main()
