"""What a layer's own guards keep of the neurons that are to go."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kddp_ext.pruning.selection import KeptBy, removable


@st.composite
def marked_neurons(draw):
    marked = draw(st.lists(st.booleans(), min_size=1, max_size=70))
    levels = st.sampled_from([0.0, 0.25, 0.5, 1.0])
    activity = draw(st.lists(levels, min_size=len(marked), max_size=len(marked)))
    return torch.tensor(marked), torch.tensor(activity, dtype=torch.float64)


@settings(deadline=None)
@given(
    neurons=marked_neurons(),
    minimum_width=st.integers(1, 80),
    maximum_share=st.sampled_from([1.0, 0.5, 0.25, 1 / 3]),
    round_to=st.sampled_from([1, 2, 3, 8, 16, 100]),
)
def test_guards(neurons, minimum_width, maximum_share, round_to):
    marked, activity = neurons
    going, kept_by = removable(
        marked, activity, minimum_width=minimum_width, maximum_share=maximum_share, round_to=round_to
    )
    width, left = len(marked), len(marked) - len(going)
    gone = torch.zeros(width, dtype=torch.bool)
    gone[going] = True
    assert int(gone.sum()) == len(going)  # each once
    assert not bool(gone[~marked].any())  # only marked neurons go
    assert left >= min(minimum_width, width)
    assert len(going) <= maximum_share * width + 1e-9
    assert left == width or left % round_to == 0
    assert kept_by.total == int(marked.sum()) - len(going)
    assert kept_by.budget == 0
    # No fewer could have stayed: a width of one multiple less breaks one of the rules.
    smaller = left - round_to
    assert smaller < max(minimum_width, int((~marked).sum()), width * (1 - maximum_share) - 1e-9)
    # They go weakest first, and none is more active than a marked one that stays.
    assert bool((activity[going].diff() >= 0).all())
    spared = activity[~gone & marked]
    if len(going) and len(spared):
        assert activity[going].max() <= spared.min()


@pytest.mark.parametrize(
    ("options", "going", "kept_by"),
    [
        ({}, [5, 4, 2, 0, 7], KeptBy()),
        ({"minimum_width": 6}, [5, 4, 2, 0], KeptBy(minimum_width=1)),
        ({"maximum_share": 0.3}, [5, 4, 2], KeptBy(maximum_share=2)),
        ({"round_to": 4}, [5, 4], KeptBy(round_to=3)),
        ({"minimum_width": 6, "maximum_share": 0.3, "round_to": 4}, [5, 4], KeptBy(1, 1, 1)),
        ({"round_to": 16}, [], KeptBy(round_to=5)),
    ],
)
def test_each_guard_counts_what_those_before_it_let_go(options, going, kept_by):
    """Ten neurons; of equals, the last goes first."""
    activity = torch.tensor([0.2, 1, 0.1, 1, 0, 0, 1, 0.5, 1, 1], dtype=torch.float64)
    found, kept = removable(activity < 1, activity, **options)
    assert found.tolist() == going
    assert kept == kept_by


def test_a_share_that_is_a_whole_number_in_decimals_is_not_rounded_down():
    marked, activity = torch.ones(100, dtype=torch.bool), torch.zeros(100, dtype=torch.float64)
    assert len(removable(marked, activity, maximum_share=0.29)[0]) == 29
    assert len(removable(marked[:30], activity[:30], maximum_share=0.1)[0]) == 3
    assert len(removable(marked[:9], activity[:9], maximum_share=0.1)[0]) == 0
