"""The settings that a data set starts from. docs/workflow.md says how they were chosen."""

from __future__ import annotations

from kddp_ext.workflow.config import Dataset, Preset, PruningConfig, RunConfig, StudentConfig, TeacherConfig


def preset(dataset: Dataset, name: Preset) -> RunConfig:
    """The settings that `dataset` starts from: good ones, or with "quick" such as take minutes."""
    return {"digits": _digits, "fashion-mnist": _fashion_mnist, "cifar10": _cifar10}[dataset](name)


def _digits(name: Preset) -> RunConfig:
    quick = name == "quick"
    return RunConfig(
        dataset="digits",
        preset=name,
        precision="float32",  # a network this small gains nothing from bfloat16
        teacher=TeacherConfig(epochs=6 if quick else 12),
        student=StudentConfig(epochs=8 if quick else 20),
        pruning=PruningConfig(l1_weight=5e-3 if quick else 0.015),
    )


def _fashion_mnist(name: Preset) -> RunConfig:
    quick = name == "quick"
    return RunConfig(
        dataset="fashion-mnist",
        preset=name,
        validation=5000,
        teacher=TeacherConfig(channels=(32, 64, 128), epochs=3 if quick else 10, batch_size=256, learning_rate=0.3),
        student=StudentConfig(channels=(16, 32), epochs=4 if quick else 15, batch_size=256),
        pruning=PruningConfig(l1_weight=1e-3),
    )


def _cifar10(name: Preset) -> RunConfig:
    quick = name == "quick"
    return RunConfig(
        dataset="cifar10",
        preset=name,
        validation=5000 if quick else 0,  # default's settings were chosen; it trains on all images
        augment=True,
        teacher=TeacherConfig(
            channels=(32, 64, 256) if quick else (64, 256, 256),
            epochs=6 if quick else 10,
            batch_size=2000,
            optimizer="muon",  # with Jordan's rates, for steps of 2000 images
            learning_rate=0.24,
            bias_learning_rate=440.0,
            classifier_learning_rate=7.0,
            momentum=0.85,
            weight_decay=1 / 60,
        ),
        student=StudentConfig(
            channels=(32, 64, 128),
            width=1024,
            epochs=5 if quick else 12,
            batch_size=256,
            views=0 if quick else 8,
        ),
        pruning=PruningConfig(l1_weight=5e-4 if quick else 1e-3, l1_until=1.0 if quick else 0.25),
    )
