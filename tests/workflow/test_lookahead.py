"""Slow weights, against the rule written out for a single number."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kddp_ext.workflow.lookahead import Lookahead


def test_slow_weights_follow_the_rule_and_take_the_model_along() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    weight = model[0].weight
    with torch.no_grad():
        weight.fill_(2.0)
    lookahead = Lookahead(model)
    slow = 2.0
    for position, fast in ((0.0, 5.0), (0.5, -1.0), (1.0, 4.0)):
        with torch.no_grad():
            weight.fill_(fast)
        lookahead.step(position)
        kept = 0.95**5 * position**3
        slow = kept * slow + (1 - kept) * fast
        assert weight.item() == pytest.approx(slow, rel=1e-6)


def test_running_statistics_follow_and_counts_are_left_alone() -> None:
    model = nn.BatchNorm1d(3)
    lookahead = Lookahead(model)
    model(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)) + 5)
    seen, count = model.running_mean.clone(), int(model.num_batches_tracked)
    lookahead.step(1.0)
    torch.testing.assert_close(model.running_mean, (1 - 0.95**5) * seen)
    assert int(model.num_batches_tracked) == count
