"""Compares the increase of the loss that saliency predicts with the true one, for single neurons at their means.

python -m benchmarks.prediction SOURCE --folder DIR --data-dir DIR [--neurons N] [--images N] [--markdown FILE]

SOURCE is the folder of a finished training. Two losses are compared: the cross entropy, and the distillation loss of a
copy of the network, whose saliency `kddp shrink` measures with `kddp_ext.fisher_loss`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kddp_ext
from benchmarks.table import Table
from benchmarks.trainings import Study, show, study_parser
from kddp_ext.pruning.tracing.find import find_neurons
from kddp_ext.pruning.tracing.structure import PrunableNeurons, Reader
from kddp_ext.workflow.config import ShrinkConfig
from kddp_ext.workflow.networks import logits_of
from kddp_ext.workflow.train import measure_saliency

_BATCH = 250
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of the logits, those of the unchanged network, and the labels


def cross_entropy(logits: Tensor, _: Tensor, labels: Tensor) -> Tensor:
    """The mean cross entropy."""
    return F.cross_entropy(logits, labels)


SETTINGS = kddp_ext.LossSettings(temperature=ShrinkConfig.temperature, alpha=ShrinkConfig.alpha)
LOSSES: dict[str, Loss] = {
    "cross entropy": cross_entropy,
    "distillation": partial(kddp_ext.fused_kd_l1_loss, temperature=SETTINGS.temperature, alpha=SETTINGS.alpha),
}


class Prediction(Study):
    """A trained network in evaluation mode, its neurons, and some training images."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments)
        self.model = self.runtime.place(self.saved.load()).eval()
        self.neurons = find_neurons(self.model, (self.data.example(2),)).neurons
        images, labels = self.data.train.images[: arguments.images], self.data.train.labels[: arguments.images]
        self.batches = list(zip(self.data.normalise(images).split(_BATCH), labels.split(_BATCH), strict=True))
        order = torch.randperm(self.neurons.number, generator=torch.Generator().manual_seed(0))
        self.chosen = order[: arguments.neurons].tolist()

    def compare(self) -> dict[str, Any]:
        """The predicted and the true increase of both losses for each chosen neuron."""
        true = self.true_increases()
        predicted = {"cross entropy": self.by_labels(), "distillation": self.by_fisher_loss()}
        return {
            name: {"predicted": predicted[name][self.chosen].tolist(), "true": [each[name] for each in true]}
            for name in LOSSES
        }

    def by_labels(self) -> Tensor:
        """The predicted increase of the cross entropy, (N,) float64."""
        pruner = self.pruner()
        for images, labels in self.batches_to_measure():
            loss = F.cross_entropy(logits_of(self.model(images)), labels)
            pruner.activations.observe(loss)
            loss.backward()
        return self.increases(pruner)

    def by_fisher_loss(self) -> Tensor:
        """The predicted increase of the distillation loss, (N,) float64."""
        pruner = self.pruner()
        measured = ((images, partial(F.cross_entropy, target=labels)) for images, labels in self.batches_to_measure())
        measure_saliency(pruner, measured, SETTINGS, self.runtime, seed=0)
        return self.increases(pruner)

    def batches_to_measure(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All batches, and before them one that measures only means."""
        yield self.batches[0]
        yield from self.batches

    def pruner(self) -> kddp_ext.DynamicPruner:
        """A pruner of the network, which removes nothing."""
        return kddp_ext.DynamicPruner(self.model, example_inputs=(self.data.example(2),), criterion="saliency")

    def increases(self, pruner: kddp_ext.DynamicPruner) -> Tensor:
        """What the pruner predicts for all neurons."""
        predicted = torch.cat([pruner.saliency[group.name] for group in self.neurons.groups])
        pruner.close()
        self.model.zero_grad()
        return predicted

    @torch.no_grad()
    def true_increases(self) -> list[dict[str, float]]:
        """By loss, what each chosen neuron's mean in place of its values adds."""
        pruner, logits = self.pruner(), list[Tensor]()
        for images, _ in self.batches:
            logits.append(logits_of(self.model(images)))
            pruner.activations.observe()
        means = [each.position_mean for each in pruner.statistics.values()]
        pruner.close()
        before = self.losses(logits)
        found = []
        for neuron in self.chosen:
            with at_mean(self.model, self.neurons, means, neuron):
                after = self.losses(logits)
            found.append({name: after[name] - before[name] for name in LOSSES})
        return found

    def losses(self, unchanged: list[Tensor]) -> dict[str, float]:
        """The mean losses of the model as it is, next to the unchanged network's logits."""
        sums, number = dict.fromkeys(LOSSES, 0.0), sum(len(labels) for _, labels in self.batches)
        for (images, labels), teacher_logits in zip(self.batches, unchanged, strict=True):
            logits = logits_of(self.model(images))
            for name, loss in LOSSES.items():
                sums[name] += float(loss(logits, teacher_logits, labels)) * len(labels) / number
        return sums


@contextmanager
def at_mean(model: nn.Module, neurons: PrunableNeurons, means: Sequence[Tensor], neuron: int) -> Iterator[None]:
    """The model with one neuron replaced wherever it is read: by its mean, or by 0 if the layer can absorb no constant.

    `means` are the `position_mean` of the values.
    """

    def replaced(reader: Reader, value: Tensor) -> Tensor:
        read = neurons.values[reader.value]
        shape = [1] * value.dim()
        shape[read.layout.axis] = -1
        is_neuron = read.layout.in_order(read.neurons == neuron).to(value.device).view(shape)
        mean = read.layout.in_order(means[reader.value]).to(value).view(shape)
        return torch.where(is_neuron, mean if reader.shift is not None else 0.0, value)

    with ExitStack() as hooks:
        for reader in neurons.readers:
            module = model.get_submodule(reader.module)
            hook = module.register_forward_pre_hook(lambda _, args, each=reader: (replaced(each, args[0]), *args[1:]))
            hooks.callback(hook.remove)
        yield


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's; equal values have any order."""
    ranks = torch.stack([torch.tensor(each, dtype=torch.float64).argsort().argsort() for each in (first, second)])
    return float(torch.corrcoef(ranks.double())[0, 1])


def main() -> None:
    """Measure what is not in the folder yet, then write the table of everything in it."""
    parser = study_parser(__doc__)
    parser.add_argument("--neurons", type=int, default=60, help="chosen at random")
    parser.add_argument("--images", type=int, default=2000, help="of the training images")
    arguments = parser.parse_args()
    name = ", ".join(arguments.source.resolve().parts[-2:])
    study = Prediction(arguments)
    study.finish(name, study.compare)
    rows = []
    for path in sorted(arguments.folder.glob("*.json")):
        for loss, found in json.loads(path.read_text()).items():
            predicted, true = found["predicted"], found["true"]
            correlation = rank_correlation(predicted, true)
            rows.append([path.stem, loss, str(len(true)), f"{correlation:.2f}", f"{sum(predicted) / sum(true):.2f}"])
    columns = ["network", "loss", "neurons", "rank correlation", "sum of predicted / sum of true"]
    table = Table("prediction", "One neuron at its mean: predicted and true increase of the loss", columns, rows)
    show([table], arguments.markdown)


if __name__ == "__main__":
    main()
