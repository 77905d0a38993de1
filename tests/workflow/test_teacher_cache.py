"""The cache of the teacher's logits is never stale, and a damaged file is computed again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from workflow_ranks import CountingTeacher

from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.runtime import Runtime
from kddp_ext.workflow.teacher_logits import TeacherLogits

MakeCache = Callable[..., TeacherLogits]
RUNTIME = Runtime("cpu", "float32")


@pytest.fixture
def cache(image_data: Callable[..., ImageData], tmp_path: Path) -> Callable[..., TeacherLogits]:
    """Makes the cache of a teacher as a new process would."""

    def make(teacher: nn.Module, shift: int = 2, **data: Any) -> TeacherLogits:
        return TeacherLogits(teacher, image_data(**data), shift, tmp_path, RUNTIME)

    return make


def test_logits_are_those_of_the_view(cache: MakeCache, image_data: Callable[..., ImageData]) -> None:
    teacher = CountingTeacher()
    logits = cache(teacher).view(3)
    assert torch.equal(logits, teacher(image_data().training_images(torch.arange(50), 3, shift=2)))


def test_a_second_run_reads_what_the_first_computed(cache: MakeCache) -> None:
    first = cache(CountingTeacher()).view(0)
    teacher = CountingTeacher()
    assert torch.equal(cache(teacher).view(0), first)
    assert teacher.seen == 0


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"augment": False}, {"shift": 1}, {"count": 61}, {"teacher": CountingTeacher(seed=1)}, {"view": 1}],
)
def test_nothing_stale_is_read(cache: MakeCache, change: dict[str, object]) -> None:
    cache(CountingTeacher()).view(0)
    change = dict(change)
    teacher, view = change.pop("teacher", CountingTeacher()), change.pop("view", 0)
    cache(teacher, **change).view(view)
    assert teacher.seen > 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "one bit"])
def test_a_damaged_file_is_computed_again(cache: MakeCache, tmp_path: Path, damage: str) -> None:
    first = cache(CountingTeacher()).view(0)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    flipped = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    path.write_bytes({"truncated": content[:-9], "empty": b"", "foreign": b"hello world", "one bit": flipped}[damage])
    teacher = CountingTeacher()
    assert torch.equal(cache(teacher).view(0), first)
    assert teacher.seen == 50
    assert torch.equal(cache(teacher).view(0), first)
    assert teacher.seen == 50


def test_without_augmentation_one_file_serves_every_view(cache: MakeCache, tmp_path: Path) -> None:
    teacher = CountingTeacher()
    logits = cache(teacher, augment=False)
    assert torch.equal(logits.view(0), logits.view(5))
    assert teacher.seen == 50
    assert len(list(tmp_path.iterdir())) == 1
