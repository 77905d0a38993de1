"""The callbacks of other libraries, as `mypy --strict` sees them; what those libraries are is left open."""

from pathlib import Path

from torch import Tensor, nn
from typing_extensions import assert_type

import kddp_ext
from kddp_ext.integrations import lightning, transformers


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
