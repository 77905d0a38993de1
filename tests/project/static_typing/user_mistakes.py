"""Mistakes that `mypy --strict` finds for a user; the comment of a line names the error that is expected there."""

from pathlib import Path

import torch
from torch import Tensor, nn

import kddp_ext
from kddp_ext.integrations.lightning import DynamicPruning


def largest(statistics: kddp_ext.NeuronStatistics) -> Tensor:
    return statistics.max_abs


def mistakes(model: nn.Module, logits: Tensor, labels: Tensor, path: Path) -> None:
    kddp_ext.fused_kd_l1_loss(logits, logits, labels, temprature=2.0)  # error: call-overload
    kddp_ext.fused_kd_l1_loss(logits, logits, labels, divergence="kl")  # error: call-overload
    kddp_ext.fused_kd_l1_loss(logits, logits)  # error: call-overload
    loss, terms = kddp_ext.fused_kd_l1_loss(logits, logits, labels, return_terms=True)
    terms.cross_entropy.item()  # error: attr-defined
    kddp_ext.fused_kd_l1_loss(logits, logits, labels, return_terms=True).backward()  # error: attr-defined

    criterion = kddp_ext.FusedKDL1Loss(return_terms=True)
    criterion(logits, logits, labels).backward()  # error: attr-defined
    criterion(logits, logits, labels, l1_weight=0.1)  # error: call-arg
    kddp_ext.FusedKDL1Loss(backend="cuda")  # error: call-overload

    kddp_ext.DynamicPruner(model)  # error: call-arg
    pruner = kddp_ext.DynamicPruner(model, example_inputs=torch.zeros(2, 3))  # error: arg-type
    kddp_ext.DynamicPruner(model, example_inputs=(logits,), threshhold=0.1)  # error: call-arg
    kddp_ext.DynamicPruner(model, example_inputs=(logits,), process_group=True)  # error: arg-type
    kddp_ext.DynamicPruner(model, example_inputs=(logits,), criterion=largest)  # error: arg-type
    removed = pruner.step().neurons_pruned  # error: union-attr
    pruner.prune().layers[0].width = 3  # error: attr-defined
    pruner.widths = {}  # error: misc

    kddp_ext.save_student(path, model, {}, None)  # error: arg-type
    kddp_ext.save_student(path, model, pruner.history, {"epoch": 3})  # error: dict-item
    kddp_ext.load_student(path, "Student", (logits,))  # error: arg-type
    student: nn.Linear = kddp_ext.load_student(path, nn.ReLU, (logits,))  # error: assignment
    kddp_ext.read_student_header(path)["names"]  # error: typeddict-item
    kddp_ext.build_info()["gpu"]  # error: typeddict-item
    kddp_ext.export_onnx(model, path)  # error: call-arg

    callback = DynamicPruning(example_inputs=(logits,), every_n_epochs="1")  # error: arg-type
    callback.pruner.prune()  # error: union-attr
    del loss, removed, student
