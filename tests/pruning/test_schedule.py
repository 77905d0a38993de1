"""Checks that come with the steps, and the penalty's weight on its way up."""

import pytest
import torch
from pruner_cases import example, kill, make_model, make_pruner, observe

import kddp_ext
from kddp_ext.pruning.settings import Schedule


def steps_that_prune(pruner, count):
    found = []
    for step in range(1, count + 1):
        observe(pruner)
        if pruner.step() is not None:
            found.append(step)
    return found


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, []),
        ({"interval": 1}, list(range(1, 13))),
        ({"interval": 5}, [5, 10]),
        ({"interval": 4, "start": 8}, [8, 12]),
        ({"interval": 4, "start": 9}, [12]),
        ({"interval": 20}, []),
    ],
)
def test_prunes_at_every_intervalth_step_from_the_start(options, steps):
    assert steps_that_prune(make_pruner(make_model(), **options), 12) == steps


def test_a_step_prunes_as_prune_does():
    model = make_model()
    pruner = make_pruner(model, criterion="dead", interval=2)
    kill(model, [3])
    observe(pruner)
    assert pruner.step() is None
    assert pruner.widths == {"0": 8}
    report = pruner.step()
    assert report.layers[0].pruned == (3,)
    assert pruner.widths == {"0": 7}


def test_what_was_seen_before_the_start_is_not_judged():
    """Neuron 2 lives in the first interval only, and is dead in the one that the first check judges."""
    model = make_model()
    pruner = make_pruner(model, criterion="dead", interval=2, start=4)
    for _ in range(2):
        observe(pruner)
        assert pruner.step() is None
    assert pruner.statistics["0"].rows == 0
    kill(model, [2])
    observe(pruner)
    pruner.step()
    observe(pruner)
    assert pruner.step().layers[0].pruned == (2,)


def test_a_step_whose_prune_fails_is_not_counted():
    pruner = make_pruner(make_model(), interval=2)
    pruner.step()
    before = pruner._state
    with pytest.raises(RuntimeError, match="no statistics of 0"):
        pruner.step()
    assert pruner._state is before
    observe(pruner)
    assert pruner.step() is not None


def test_the_weight_of_the_penalty_rises_with_the_steps():
    pruner = make_pruner(make_model(), l1_weight=0.5, l1_warmup=4)
    weights = [pruner.l1_weight]
    for _ in range(6):
        pruner.step()
        weights.append(pruner.l1_weight)
    assert weights == [0, 0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    assert make_pruner(make_model(), l1_weight=0.5).l1_weight == 0.5
    assert make_pruner(make_model()).l1_weight == 0.0


def test_steps_are_part_of_the_state():
    pruner = make_pruner(make_model(), interval=3, l1_weight=1.0, l1_warmup=10)
    assert steps_that_prune(pruner, 4) == [3]  # a prune keeps the count
    resumed = make_pruner(make_model(), interval=3, l1_weight=1.0, l1_warmup=10)
    resumed.load_state_dict(pruner.state_dict())
    assert resumed.l1_weight == pruner.l1_weight == 0.4
    assert steps_that_prune(resumed, 3) == steps_that_prune(pruner, 3) == [2]


def test_a_training_loop_with_steps():
    """The weight goes into the loss; the pruner does the rest."""
    model = make_model(width=30)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    pruner = make_pruner(model, optimizer, threshold=0.1, interval=15, start=30, l1_weight=0.3, l1_warmup=20)
    reports, weights = [], []
    labels = torch.arange(6) % 3
    for _ in range(90):
        weights.append(pruner.l1_weight)
        loss = kddp_ext.fused_kd_l1_loss(
            model(example()), None, labels, pruner.activations, alpha=0.0, l1_weight=pruner.l1_weight
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report = pruner.step()
        if report is not None:
            reports.append(report)
    assert len(reports) == 5
    assert sum(report.neurons_pruned for report in reports) == 30 - pruner.widths["0"] > 0
    assert weights[0] == 0
    assert weights[20:] == [0.3] * 70


def test_no_interval_ends_without_one():
    assert not any(Schedule().interval_ends(step) for step in range(1, 9))
