"""The names that the Python blocks of a page expect: a student, a teacher, data."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kddp_ext

PIXELS, CLASSES = 64, 10
Names = dict[str, Any]


def make_student() -> nn.Module:
    """A perceptron with two layers to prune."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(PIXELS, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, CLASSES)
    )


def loop() -> Names:
    """A student, a teacher, an optimizer and four batches."""
    student = make_student()
    images, labels = torch.randn(64, PIXELS), torch.randint(CLASSES, (64,))
    return {
        "torch": torch,
        "kddp_ext": kddp_ext,
        "make_student": make_student,
        "student": student,
        "model": student,
        "teacher": nn.Linear(PIXELS, CLASSES).requires_grad_(False),
        "optimizer": torch.optim.Adam(student.parameters()),
        "images": images,
        "example": (images[:2],),
        "example_inputs": (images[:2],),
        "loader": DataLoader(TensorDataset(images, labels), batch_size=16),
        "epochs": 2,
    }


def shrinking() -> Names:
    """`loop`, with a trained network to shrink."""
    return {**loop(), "original": make_student()}


def with_processes() -> Names:
    """`loop`, with torch.distributed initialised for this process alone."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return loop()


def pruning() -> Names:
    """`with_processes`, with the checkpoint of a pruned student."""
    names = with_processes()
    student = make_student()
    pruner = kddp_ext.DynamicPruner(student, example_inputs=names["example"], threshold=0.5, patience=1)
    student(names["images"])
    pruner.activations.observe()
    assert pruner.prune().neurons_pruned
    optimizer = torch.optim.Adam(student.parameters())
    states = {"pruner": pruner.state_dict(), "student": student.state_dict(), "optimizer": optimizer.state_dict()}
    return {**names, "checkpoint": states}


class Newest(os.PathLike[str]):
    """The newest file that matches a pattern when the path is used."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern

    def __fspath__(self) -> str:
        return str(max(Path().glob(self.pattern), key=lambda path: path.stat().st_mtime))


def lightning() -> Names:
    """`loop`, with the checkpoint of the page's training."""
    return {**loop(), "path": Newest("**/*.ckpt")}


def transformers() -> Names:
    """A small BERT, and sentences of four words."""
    from transformers import BertConfig, BertForSequenceClassification

    def make_bert() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
        return BertForSequenceClassification(BertConfig(vocab_size=32, max_position_embeddings=8, **sizes))

    words, mask = torch.randint(32, (32, 4)), torch.ones(32, 4, dtype=torch.int64)
    data = [
        {"input_ids": row, "attention_mask": ones, "labels": int(row[0] % 2)}
        for row, ones in zip(words, mask, strict=True)
    ]
    names = {"make_student": make_bert, "student": make_bert(), "teacher": make_bert(), "data": data}
    return {**names, "input_ids": words, "attention_mask": mask}


# By page, or by page and heading.
SETUPS: dict[str, Callable[[], Names]] = {
    "README.md": loop,
    "docs/index.md": loop,
    "docs/your-loop.md": with_processes,
    "docs/losses.md": with_processes,
    "docs/pruning.md": pruning,
    "docs/shrinking.md": shrinking,
    "docs/integrations.md#Lightning": lightning,
    "docs/integrations.md#Hugging Face Transformers": transformers,
    "docs/integrations.md#ONNX": loop,
}
# Stands in for torch.compile: it traces and runs the trace, without a minute of C++ compilation.
compiled_without_code = partial(torch.compile, backend="eager")
