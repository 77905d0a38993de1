"""Shrinks a trained network with this package, with Torch-Pruning, and by training a narrower one, at equal cost.

python -m benchmarks.shrinking SOURCE --folder DIR --data-dir DIR [--budgets 0.5 ...] [--contenders NAME ...]

Every contender has the same passes over the images, the same distillation loss, batches, augmentation and learning
rate. A training that is finished is not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import kddp_ext
from benchmarks.table import Table
from benchmarks.trainings import Study, mean_accuracy, show, study_parser
from kddp_ext.files import write_json
from kddp_ext.workflow.config import RunConfig, ShrinkConfig
from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.jobs import Job
from kddp_ext.workflow.measure import count_macs
from kddp_ext.workflow.models import FastTeacher, build_student
from kddp_ext.workflow.runs import start_training
from kddp_ext.workflow.shrink import PROBES, settings_of, with_slow_norms
from kddp_ext.workflow.train import Recipe, Training, student_recipe

OURS = ("saliency", "contribution")
_EACH_LAYER = ", each layer"  # the same share of every layer, in place of a ranking over all layers
TORCH_PRUNING = (
    "GroupMagnitude",
    "GroupTaylor",
    "GroupNorm",
    "GroupMagnitude" + _EACH_LAYER,
    "GroupTaylor" + _EACH_LAYER,
)
NARROWER = ("narrower", "narrower, three times the passes")
UNPRUNED = "unpruned"  # shows what the same training costs and gains without pruning
_FINEST = 400  # steps in which Torch-Pruning removes everything; it stops at the budget
_PRUNES = 6  # of Torch-Pruning in a training, evenly spread over the part that prunes
_PRUNES_UNTIL = 0.25  # of the training: it recovers between two prunes


class TorchPruning:
    """Prunes by Torch-Pruning where the training loop expects a pruner of this package.

    Parameters become new objects, so the optimizers start afresh after each prune.
    """

    activations: tuple[()] = ()
    widths: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, kind: str, training: Training, data: ImageData, recipe: Recipe, target: float) -> None:
        self.closed = False
        self._training, self._recipe, self._image = training, recipe, data.example()
        self._original, self._target = count_macs(training.model, self._image), target
        steps = len(data.train) // recipe.batch_size
        self._interval = int(recipe.epochs * steps * recipe.pruning.until) // _PRUNES
        self._count = 0
        self.pruner = torch_pruner(kind, training.model, data)
        self._watch(kind)

    def _watch(self, kind: str) -> None:
        if kind == "GroupNorm":  # its sparsity training adds to the gradients
            regularize = self.pruner.regularize
            self._training.optimizers[0].register_step_pre_hook(
                lambda *_: None if self.closed else regularize(self._training.model)
            )
        self._kind = kind

    def step(self) -> None:
        """Count a step, and prune at each interval."""
        self._count += 1
        if self._count % self._interval == 0 and self._count // self._interval <= _PRUNES:
            share = self._target ** (self._count // self._interval / _PRUNES)
            prune_to(self.pruner, self._training.model, self._image, share * self._original)
            if self._kind == "GroupNorm":
                self.pruner.update_regularizer()
            self._training.optimizers = self._recipe.optimizers(self._training.model)
            self._watch(self._kind)

    def close(self) -> None:
        """Prune no more."""
        self.closed = True


def torch_pruner(kind: str, model: nn.Module, data: ImageData) -> Any:
    """A pruner of Torch-Pruning, as its README advises."""
    import torch_pruning as tp  # not needed for the other contenders

    importances: dict[str, Callable[[], object]] = {
        "GroupMagnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "GroupTaylor": tp.importance.GroupTaylorImportance,
        "GroupNorm": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    }
    name = kind.removesuffix(_EACH_LAYER)
    pruner = tp.pruner.GroupNormPruner if name == "GroupNorm" else tp.pruner.BasePruner
    frozen = [each for each in model.modules() if isinstance(each, nn.Conv2d) and not each.weight.requires_grad]
    return pruner(
        model,
        data.example(2),
        importance=importances[name](),
        global_pruning=name == kind,
        pruning_ratio=1.0,
        max_pruning_ratio=0.95,
        iterative_steps=_FINEST,
        ignored_layers=[*frozen, model.get_submodule("classifier")],
    )


def prune_to(pruner: Any, model: nn.Module, image: torch.Tensor, macs: float) -> None:
    """Prune until the model has at most this many multiply-accumulates."""
    training = model.training
    for _ in range(_FINEST):
        if count_macs(model, image) <= macs:
            break
        pruner.step()
    model.train(training)


class Shrinking(Study):
    """The trainings, and the network that they shrink."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments)
        self.arguments = arguments
        self.original = self.network().eval()
        self.macs = count_macs(self.original, self.data.example())

    def network(self) -> nn.Module:
        """The trained network."""
        return with_slow_norms(self.runtime.place(self.saved.load()))

    def settings(self, contender: str, budget: float, seed: int, **changes: Any) -> RunConfig:
        """The settings of a training; a budget above 1 is a loss budget in thousandths."""
        targets = {"target_macs": budget} if budget <= 1 else {"loss_budget": budget / 1000}
        names = ("epochs", "learning_rate", "muon_learning_rate")
        options = {"seed": seed, **{name: getattr(self.arguments, name) for name in names}}
        config = settings_of(ShrinkConfig(**{**options, **targets, **changes}), self.saved, len(self.data.train))
        if contender == "contribution":
            pruning = replace(config.pruning, criterion="contribution", threshold=1.0, patience=1)
            config = replace(config, pruning=pruning)
        return config

    def contend(self, contender: str, budget: float, seed: int) -> dict[str, Any]:
        """Train a contender; returns its figures."""
        times = 3 if contender == NARROWER[1] else 1
        until = _PRUNES_UNTIL if contender in TORCH_PRUNING else ShrinkConfig.until
        config = self.settings(contender, budget, seed, epochs=times * self.arguments.epochs, until=until)
        recipe = replace(student_recipe(config, "kddp"), probes=PROBES if contender in OURS else 0)
        model = self.narrower(config, budget) if contender in NARROWER else self.network()
        training = Training(model, model, recipe.optimizers(model), None, [])
        if contender in OURS:
            training = start_training(self.run, Job(contender, "kddp", config), model, recipe, self.saved.history)
        elif contender in TORCH_PRUNING:
            pruner = TorchPruning(contender, training, self.data, recipe, budget)
            training.pruner = cast(kddp_ext.DynamicPruner, pruner)
        figures = self.train(f"{contender} {budget:g} {seed}", training, recipe, self.original)
        widths = {name: each.out_channels for name, each in model.named_modules() if isinstance(each, nn.Conv2d)}
        return {**figures, "widths": widths}

    def narrower(self, config: RunConfig, budget: float) -> nn.Module:
        """A fresh network whose channels are all narrower by one factor, which meets the budget."""
        channels = config.student.channels
        for factor in (1 - step / 200 for step in range(200)):
            narrow = tuple(max(1, math.floor(each * factor + 0.5)) for each in channels)
            student = replace(config.student, channels=narrow)
            model = build_student(replace(config, student=student), self.data.info)
            if count_macs(model, self.data.example().cpu()) <= budget * self.macs:
                break
        if isinstance(model, FastTeacher):
            model.whiten(self.data.example(2000).cpu())
        return with_slow_norms(self.runtime.place(model))

    def at_once(self, contender: str, budget: float) -> dict[str, Any]:
        """Prune without any training, by the gradients of 2000 training images, in one step or in eight."""
        model, image = self.network().eval(), self.data.example()
        images, labels = self.data.normalise(self.data.train.images[:2000]), self.data.train.labels[:2000]
        kind = contender.removesuffix(_EIGHT_PRUNES)
        prunes = 1 if kind == contender else 8
        ours = theirs = None
        if kind.startswith("saliency"):
            samples = 0 if "without" in kind else ShrinkConfig.reconstruction_samples
            ours = kddp_ext.DynamicPruner(
                model,
                example_inputs=(self.data.example(2),),
                criterion="saliency",
                target_macs=budget,
                target_steps=prunes,
                reconstruction_samples=samples,
            )
        else:
            theirs = torch_pruner(kind, model, self.data)
        for count in range(1, prunes + 1):
            model.zero_grad()
            for some, their in zip(images.split(250), labels.split(250), strict=True):
                loss = nn.functional.cross_entropy(model(some), their)
                if ours is not None:
                    ours.activations.observe(loss)
                loss.backward()
            if ours is not None:
                ours.prune()
            else:
                prune_to(theirs, model, image, budget ** (count / prunes) * self.macs)
        return self.figures(model)


_EIGHT_PRUNES = ", eight prunes"
AT_ONCE = (
    "saliency",
    "saliency" + _EIGHT_PRUNES,
    "saliency, without reconstruction",
    *(each for each in TORCH_PRUNING if each != "GroupNorm"),
    "GroupTaylor" + _EACH_LAYER + _EIGHT_PRUNES,
)


def main() -> None:
    """Run everything that is not finished, then write the tables."""
    arguments = _parse()
    study = Shrinking(arguments)
    shares = [budget for budget in arguments.budgets if budget <= 1]
    for contender in arguments.at_once:
        for budget in shares:
            study.finish(f"at once, {contender}, {budget:g}", lambda c=contender, b=budget: study.at_once(c, b))
    for seed in arguments.seeds:
        for budget in arguments.budgets:
            for contender in arguments.contenders:
                if budget in shares or contender == "saliency":
                    study.finish(
                        f"{contender}, {budget:g}, seed {seed}",
                        lambda c=contender, b=budget, s=seed: study.contend(c, b, s),
                    )
    study.finish("original", lambda: study.figures(study.original))
    results = {path.stem: json.loads(path.read_text()) for path in sorted(arguments.folder.glob("*.json"))}
    network = arguments.source.resolve().parent.name
    if arguments.json:
        others = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        write_json(arguments.json, {**others, network: results})
    show(tables(network, results, study.macs), arguments.markdown)


def _parse() -> argparse.Namespace:
    """The command line."""
    parser = study_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=ShrinkConfig.learning_rate)
    parser.add_argument("--muon-learning-rate", type=float, default=ShrinkConfig.muon_learning_rate)
    parser.add_argument(
        "--budgets",
        type=float,
        nargs="*",
        default=[0.7, 0.5, 0.25],
        help="shares of the MACs, or loss budgets in thousandths if above 1",
    )
    contenders = [*OURS, *TORCH_PRUNING, *NARROWER]
    parser.add_argument("--contenders", nargs="*", default=contenders, choices=[*contenders, UNPRUNED])
    parser.add_argument("--at-once", nargs="*", default=[*AT_ONCE], choices=AT_ONCE)
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the figures of every training to this file")
    return parser.parse_args()


def tables(network: str, found: dict[str, dict[str, Any]], macs: int) -> list[Table]:
    """The figures over the seeds, and those without training, from all results of a network by name."""
    runs: dict[tuple[str, float], list[dict[str, Any]]] = {}
    once: dict[tuple[str, float], dict[str, Any]] = {}
    for name, result in found.items():
        if name.startswith("at once, "):
            contender, budget = name.removeprefix("at once, ").rsplit(", ", 1)
            once[contender, float(budget)] = result
        elif ", seed" in name:
            contender, budget, _ = name.rsplit(", ", 2)
            runs.setdefault((contender, float(budget)), []).append(result)
    rows = []
    for (contender, budget), results in sorted(
        runs.items(), key=lambda each: (-each[0][1] if each[0][1] <= 1 else each[0][1], each[0][0])
    ):
        asked = f"{budget:.0%} of MACs" if budget <= 1 else f"loss budget {budget / 1000:g}"
        share = statistics.fmean(each["macs"] for each in results) / macs
        parameters = statistics.fmean(each["parameters"] for each in results)
        seconds = statistics.fmean(each["processor_seconds"] for each in results)
        rows.append(
            [
                asked,
                contender,
                str(len(results)),
                mean_accuracy(results),
                f"{share:.1%}",
                f"{parameters:,.0f}",
                f"{seconds:.0f}",
            ]
        )
    columns = ["asked", "contender", "seeds", "test accuracy (%)", "MACs left", "parameters", "processor s"]
    without = []
    for (contender, budget), result in sorted(once.items(), key=lambda each: (-each[0][1], each[0][0])):
        share = result["macs"] / macs
        without.append([f"{budget:.0%} of MACs", contender, f"{100 * result['accuracy']:.2f}", f"{share:.1%}"])
    return [
        Table(
            f"{network}, trained",
            f"{network}, shrunk and trained: mean ± standard deviation over the seeds",
            columns,
            rows,
        ),
        Table(
            f"{network}, at once",
            f"{network}, pruned without training",
            ["asked", "contender", "test accuracy (%)", "MACs left"],
            without,
        ),
    ]


if __name__ == "__main__":
    main()
