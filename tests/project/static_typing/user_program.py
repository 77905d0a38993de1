"""A user's program over the public names, as `mypy --strict` sees it. Lightning and Transformers are left open."""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import kddp_ext
from kddp_ext.integrations import lightning, transformers


class Student(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.hidden = nn.Linear(16, width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.hidden(images)))
        return logits


def the_loss_of_a_call(logits: Tensor, teacher_logits: Tensor, labels: Tensor, with_terms: bool) -> None:
    assert_type(kddp_ext.fused_kd_l1_loss(logits, teacher_logits, labels), Tensor)
    assert_type(kddp_ext.fused_kd_l1_loss(logits, None, labels, alpha=0.0, divergence="jsd"), Tensor)
    assert_type(kddp_ext.fused_kd_l1_loss(logits, teacher_logits, None, alpha=1, return_terms=False), Tensor)
    loss, terms = kddp_ext.fused_kd_l1_loss(
        logits, teacher_logits, labels, [logits], l1_weight=[0.1], return_terms=True
    )
    assert_type(loss, Tensor)
    assert_type(terms, kddp_ext.LossTerms)
    assert_type(terms.kd + terms.ce + terms.l1 + terms.correct, Tensor)
    either = kddp_ext.fused_kd_l1_loss(logits, teacher_logits, labels, return_terms=with_terms)
    assert_type(either, Tensor | tuple[Tensor, kddp_ext.LossTerms])
    weights = torch.ones(labels.shape)
    by_row = kddp_ext.fused_kd_l1_loss(logits, teacher_logits, labels, sample_weights=weights, reduction="none")
    assert_type(by_row, Tensor)
    temperature = torch.tensor(3.0)
    kddp_ext.fused_kd_l1_loss(logits, teacher_logits, labels, logits, temperature=temperature, normalizer=32)
    kddp_ext.fused_kd_l1_loss(logits, None, labels, alpha=0, class_dim=1, class_weights=torch.ones(10))


def the_loss_of_last_layers(hidden: Tensor, weight: Tensor, labels: Tensor, with_terms: bool) -> None:
    layers = hidden, weight, hidden, weight
    assert_type(kddp_ext.fused_linear_kd_loss(*layers, labels, student_bias=weight[0], chunk_rows=16), Tensor)
    both = kddp_ext.fused_linear_kd_loss(hidden, weight, None, None, labels, hidden, alpha=0.0, return_terms=True)
    assert_type(both, tuple[Tensor, kddp_ext.LossTerms])
    either = kddp_ext.fused_linear_kd_loss(*layers, labels, return_terms=with_terms)
    assert_type(either, Tensor | tuple[Tensor, kddp_ext.LossTerms])


def the_loss_as_a_module(logits: Tensor, teacher_logits: Tensor, labels: Tensor, with_terms: bool) -> None:
    plain = kddp_ext.FusedKDL1Loss(temperature=2.0, l1_weight=1e-3)
    annotated: kddp_ext.FusedKDL1Loss = plain
    assert_type(annotated(logits, teacher_logits, labels), Tensor)
    telling = kddp_ext.FusedKDL1Loss(divergence="dkd", return_terms=True)
    assert_type(telling(logits, teacher_logits, labels, [logits]), tuple[Tensor, kddp_ext.LossTerms])
    either = kddp_ext.FusedKDL1Loss(return_terms=with_terms)
    assert_type(either(logits, teacher_logits, labels), Tensor | tuple[Tensor, kddp_ext.LossTerms])


def peak_contribution(statistics: kddp_ext.NeuronStatistics, outgoing: Tensor) -> Tensor:
    return outgoing * statistics.max_abs


def a_training_loop(student: Student, images: Tensor, teacher_logits: Tensor, labels: Tensor) -> kddp_ext.DynamicPruner:
    optimizer = torch.optim.Adam(student.parameters())
    criterion: kddp_ext.Criterion = peak_contribution
    pruner = kddp_ext.DynamicPruner(
        student,
        [optimizer],
        example_inputs=(images[:2],),
        criterion=criterion,
        threshold=0.1,
        patience=1,
        l1_weight=1e-3,
    )
    for _ in range(3):
        logits = student(images)
        assert_type(pruner.activations, kddp_ext.TrackedActivations)
        for activation in pruner.activations:
            assert_type(activation, Tensor)
        loss = kddp_ext.fused_kd_l1_loss(logits, teacher_logits, labels, pruner.activations, l1_weight=pruner.l1_weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert_type(pruner.step(), kddp_ext.PruneReport | None)
    preview = pruner.preview(threshold=0.2)
    assert_type(preview, kddp_ext.Preview)
    assert_type(preview.layers, tuple[kddp_ext.LayerPreview, ...])
    pruner.settings = dataclasses.replace(pruner.settings, criterion="contribution", threshold=0.2)
    assert_type(pruner.statistics, dict[str, kddp_ext.NeuronStatistics])
    report = pruner.prune()
    assert_type(report, kddp_ext.PruneReport)
    assert_type(report.layers, tuple[kddp_ext.LayerReport, ...])
    assert_type(report.layers[0].kept_by, kddp_ext.KeptBy)
    assert_type(report.layers[0].reconstruction_error, float | None)
    assert_type((pruner.widths, pruner.refused), tuple[dict[str, int], dict[str, str]])
    return pruner


def files(student: Student, pruner: kddp_ext.DynamicPruner, images: Tensor, folder: Path) -> None:
    assert_type(pruner.history, kddp_ext.PruningHistory)
    kddp_ext.save_student(folder / "student.safetensors", student, pruner.history, {"epoch": "3"})
    loaded = kddp_ext.load_student(folder / "student.safetensors", Student, (images[:2],))
    assert_type(loaded, Student)
    header = kddp_ext.read_student_header(str(folder / "student.safetensors"))
    assert_type(header["metadata"], dict[str, str])
    assert_type(header["tensors"], dict[str, tuple[str, tuple[int, ...]]])
    history = kddp_ext.PruningHistory.from_json(header["history"])
    assert_type(history, kddp_ext.PruningHistory)
    again = Student()
    history.replay(again, (images[:2],))
    pruner.load_state_dict(pruner.state_dict())


def an_export(student: Student, images: Tensor, path: Path) -> None:
    kddp_ext.export_onnx(student, path, (images[:1],), dynamic_batch=False)


def several_processes(model: nn.parallel.DistributedDataParallel) -> None:
    assert_type(kddp_ext.rewrap(model), nn.parallel.DistributedDataParallel)


def a_refusal(model: nn.Module, images: Tensor) -> str:
    try:
        kddp_ext.DynamicPruner(model, example_inputs=(images,), layers=["head"], process_group=False)
    except kddp_ext.UnsupportedModelError as error:
        return str(error)
    return ""


def the_build() -> None:
    info = kddp_ext.build_info()
    assert_type((info["cpu"], info["cuda"]), tuple[str, bool])
    assert_type(info["cuda_architectures"], list[str])
    assert_type(kddp_ext.__version__, str)


def with_lightning(images: Tensor) -> float:
    pruning = lightning.DynamicPruning(student="student", example_inputs=(images[:2],), threshold=0.02)
    assert_type(pruning.report, kddp_ext.PruneReport | None)
    assert_type(pruning.state_key, str)
    assert pruning.pruner is not None
    assert_type(pruning.pruner, kddp_ext.DynamicPruner)
    return pruning.pruner.l1_weight


def with_transformers(input_ids: Tensor, attention_mask: Tensor, model: nn.Module, folder: Path) -> None:
    inputs = (input_ids[:2], attention_mask[:2])
    pruning = transformers.DynamicPruning(example_inputs=inputs, every_n_epochs=None, interval=500)
    pruning.rebuild(model, folder)
    assert_type(pruning.pruner, kddp_ext.DynamicPruner | None)
