"""Several processes prune alike: the statistics of all, one decision, and nothing where one of them fails."""

import copy
import warnings

import pytest
import rank_cases
import torch
import torch.distributed as dist
from rank_processes import RankProcesses
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import kddp_ext
from kddp_ext import UnsupportedModelError
from kddp_ext.pruning.distributed import wrappers_of
from kddp_ext.pruning.pruner import DynamicPruner


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    processes = RankProcesses(tmp_path_factory.mktemp("ranks"))
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def one_process():
    """What a single process comes to, with the batches of both ranks joined."""
    return rank_cases.train(None)


def assert_equal_bits(a, b):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def assert_trained_alike(results, expected):
    first, second = results
    assert first["widths"] == second["widths"] == expected["widths"]
    assert first["history"] == second["history"] == expected["history"]
    for kind in ("student", "average", "gradients", "optimizer"):
        assert_equal_bits(first[kind], second[kind])
        for name, tensor in expected[kind].items():
            torch.testing.assert_close(
                first[kind][name], tensor, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )


OPTIONS = {
    "as made by default": {},
    "gradients in buckets": {"ddp_options": {"gradient_as_bucket_view": True}},
    "static graph": {"ddp_options": {"static_graph": True}},
    "looking for unused parameters": {"ddp_options": {"find_unused_parameters": True}},
    "many small buckets": {"ddp_options": {"bucket_cap_mb": 1e-4}},
    "a communication hook": {"comm_hook": True},
    "wrapped after the pruner was made": {"wrapped_after": True},
    "the pruner was given the module inside": {"inner": True},
    "compiled": {"compiled": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_ranks_stay_alike_and_equal_one_process_with_all_samples(ranks, one_process, options):
    sizes = [sum(widths) for widths in one_process["widths"]]
    assert 22 > sizes[0] > sizes[1] > sizes[2]
    results = ranks.run(rank_cases.train_with, options)
    assert_trained_alike(results, one_process)
    if options.get("comm_hook"):
        assert all(calls >= 4 for result in results for calls in result["calls of the communication hook"])


def test_accumulated_gradients(ranks):
    """Two backward passes a step, the first of which does not synchronise."""
    assert_trained_alike(
        ranks.run(rank_cases.train_with, {"accumulate": True}), rank_cases.train_with(None, {"accumulate": True})
    )


def test_what_varied_in_the_removed_is_reconstructed_alike(ranks):
    """From samples of both ranks; a single process keeps other samples, so it comes to other weights."""
    first, second = ranks.run(rank_cases.train_with, {"reconstruction_samples": 64})
    without, _ = ranks.run(rank_cases.train_with, {})
    for kind in ("student", "average", "gradients", "optimizer"):
        assert_equal_bits(first[kind], second[kind])
    assert first["history"] == second["history"]
    assert any(not torch.equal(first["student"][name], tensor) for name, tensor in without["student"].items())


def test_convolutions(ranks):
    """What the positions of removed channels contributed on average is of all ranks' samples."""
    options = {"make": rank_cases.make_convolutions, "rounds": 2}
    expected = rank_cases.train_with(None, options)
    assert 12 > expected["widths"][0][0] > expected["widths"][1][0]
    assert_trained_alike(ranks.run(rank_cases.train_with, options), expected)


def test_statistics_of_several_shares_are_those_of_all_samples():
    """Of whole numbers, whose sums are exact; with the sums of positions, and with all of the latest values."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(-9, 9, (rows, 4, 3), generator=generator).float() for rows in (5, 2, 7)]
    whole = kddp_ext.NeuronStatistics(4, positions=3, samples=10)
    shares = [kddp_ext.NeuronStatistics(4, positions=3, samples=10) for _ in batches]
    for share, batch in zip(shares, batches, strict=True):
        share.observe(batch)
        whole.observe(batch)
    before = [share.state_dict() for share in shares]
    total = kddp_ext.NeuronStatistics.joined(shares)
    assert torch.equal(total.values, whole.values)
    assert torch.equal(total.position_sums, whole.position_sums)
    assert total.rows == whole.rows == 3 * 14
    kept, of_shares = total.ring.samples, torch.cat([share.ring.samples for share in shares])
    assert len(kept) == min(10, len(of_shares))
    assert all(any(torch.equal(row, other) for other in of_shares) for row in kept)
    for share, its_state in zip(shares, before, strict=True):  # and the shares are what they were
        assert rank_cases.same(share.state_dict(), its_state)


FAULTS = {
    "other_weights": "rank 1 differs from rank 0 in the weights 0.weight. Ranks that prune together must be alike",
    "other_threshold": r"rank 1 differs from rank 0 in threshold (0.25, not 0.5)",
    "other_steps": "rank 1 differs from rank 0 in the number of steps (1, not 0)",
    "other_counters": "rank 1 differs from rank 0 in the history of 2",
    "nan_statistics": "rank 1: ValueError: prune: some activations of 2 were infinite or NaN",
    "no_samples": "rank 1: RuntimeError: prune: there are no statistics of 0 since the last check",
    "unknown_optimizer_state": "rank 1: ValueError: optimizer: AdamW keeps 'history' of 2.weight, list",
    "frozen_model": "rank 1: UnsupportedModelError: model: its DistributedDataParallel cannot be rebuilt: every",
    "failing_swap": "rank 1: ValueError: injected into set_data",
    "failing_rewrap": "rank 1: ValueError: injected into rewrap",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_one_rank_is_an_error_of_all_and_changes_nothing(ranks, fault):
    assert FAULTS.keys() == rank_cases.SPOILS.keys()
    first, second = ranks.run(rank_cases.fail_on_rank_1, fault)
    assert first["error"] == second["error"]
    assert first["error"].startswith("prune: nothing was pruned on any rank: rank 1")
    assert FAULTS[fault] in first["error"]
    assert first["unchanged"]
    assert second["unchanged"]
    assert second["restored"]
    assert first["widths"] == second["widths"]  # and without the fault both prune, and train on
    assert sum(first["widths"].values()) < 22
    assert_equal_bits(first["student"], second["student"])


def test_a_rank_that_never_prunes_ends_in_the_timeout(ranks):
    (error, unchanged), _ = ranks.run(rank_cases.rank_1_never_prunes)
    assert "imeout" in error or "imed out" in error
    assert unchanged


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (rank_cases.decide_differently, "rank 1 differs from rank 0 in the neurons to be removed"),
        (rank_cases.other_layers, "rank 1 differs from rank 0 in the width of 0 (None, not 12)"),
    ],
)
def test_ranks_that_would_prune_otherwise(ranks, case, reason):
    (error, unchanged), (other_error, other_unchanged) = ranks.run(case)
    assert error == other_error
    assert reason in error
    assert unchanged
    assert other_unchanged


@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"gradient_as_bucket_view": True}])
def test_a_backward_through_the_old_graph_neither_hangs_nor_reaches_the_new_buckets(ranks, options):
    first, second = ranks.run(rank_cases.backward_through_the_old_graph, options)
    assert first["failed"]
    assert second["failed"]
    assert_equal_bits(first["student"], second["student"])


def test_ranks_may_have_different_numbers_of_samples(ranks):
    """A neuron that is active on one rank alone is active."""
    assert ranks.run(rank_cases.samples_of_different_number) == [(5,), (5,)]


def test_an_average_that_one_rank_keeps(ranks):
    first, second = ranks.run(rank_cases.an_average_on_rank_0_alone)
    assert first["widths"] == second["widths"]
    assert_equal_bits(first["student"], second["student"])


def test_processes_that_prune_by_themselves(ranks):
    (error, pruned), (other_error, _) = ranks.run(rank_cases.each_by_itself)
    assert pruned > 0
    assert error == other_error
    assert "rank 1 differs from rank 0 in the weights 0.bias" in error
    assert error.endswith("process_group=False lets each prune by itself")


def test_groups(ranks):
    (pruned, errors), (_, other_errors) = ranks.run(rank_cases.a_group_of_one)
    assert pruned > 0
    assert errors == other_errors
    assert errors == [
        "process_group: this process does not belong to it",
        "process_group: expected a torch.distributed.ProcessGroup, False or None, got str",
        "process_group: False lets each process prune by itself, but DistributedDataParallel keeps this model the same "
        "on all of them",
    ]


def test_a_group_of_a_process_without_torch_distributed():
    with pytest.raises(ValueError, match=r"process_group: torch\.distributed is not initialised"):
        DynamicPruner(rank_cases.make_student(), example_inputs=(rank_cases.example(),), process_group="default")


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_rewrap_keeps_settings_hooks_and_the_object():
    student = rank_cases.make_student()
    ddp = DistributedDataParallel(
        student, bucket_cap_mb=3, find_unused_parameters=True, gradient_as_bucket_view=True, forward_sync_buffers=False
    )
    calls = []
    ddp.register_comm_hook(calls, rank_cases.all_reduce_and_count)
    ddp.register_forward_hook(lambda module, args, output: calls.append("forward"))
    student[0].weight.register_post_accumulate_grad_hook(lambda parameter: calls.append("accumulated"))
    ddp(rank_cases.example()).sum().backward()
    settings = {key: value for key, value in ddp.__dict__.items() if isinstance(value, bool | int | float | str)}
    of_reducer = {
        key: value for key, value in ddp._get_ddp_logging_data().items() if "time" not in key and "iteration" not in key
    }
    identities = [id(parameter) for parameter in ddp.parameters()]
    history = kddp_ext.PruningHistory.from_json(narrower_history())
    history.replay(student, (rank_cases.example(),))
    assert kddp_ext.rewrap(ddp) is ddp
    assert [id(parameter) for parameter in ddp.parameters()] == identities
    after = {key: value for key, value in ddp.__dict__.items() if isinstance(value, bool | int | float | str)}
    assert after == {**settings, "_has_rebuilt_buckets": False}
    for key in ("bucket_cap_bytes", "find_unused_parameters", "gradient_as_bucket_view", "comm_hook", "module_name"):
        assert ddp._get_ddp_logging_data()[key] == of_reducer[key], key
    assert ddp._get_ddp_logging_data()["total_parameter_size_bytes"] < of_reducer["total_parameter_size_bytes"]
    calls.clear()
    ddp.zero_grad()
    ddp(rank_cases.example()).sum().backward()
    assert sorted(map(str, calls)) == ["0", "accumulated", "forward"]
    reference = copy.deepcopy(student)
    reference.zero_grad()
    reference(rank_cases.example()).sum().backward()
    for mine, other in zip(student.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.usefixtures("one_rank")
def test_a_static_graph_is_recorded_anew():
    with pytest.warns(UserWarning, match="find_unused_parameters"):
        ddp = DistributedDataParallel(rank_cases.make_student(), static_graph=True, find_unused_parameters=True)
    for _ in range(2):
        ddp(rank_cases.example()).sum().backward()
    assert ddp._static_graph_delay_allreduce_enqueued
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kddp_ext.rewrap(ddp)
    assert ddp.static_graph
    assert not ddp._static_graph_delay_allreduce_enqueued
    for _ in range(2):
        ddp(rank_cases.example()).sum().backward()
    assert ddp._static_graph_delay_allreduce_enqueued


@pytest.mark.usefixtures("one_rank")
def test_a_wrapped_student_is_saved_as_the_student(tmp_path):
    ddp = DistributedDataParallel(rank_cases.make_student())
    pruner = DynamicPruner(ddp, example_inputs=(rank_cases.example(),), threshold=0.5, patience=1)
    ddp(rank_cases.example())
    pruner.activations.observe()
    assert pruner.prune().neurons_pruned > 0
    kddp_ext.save_student(tmp_path / "student", ddp, pruner.history)
    loaded = kddp_ext.load_student(tmp_path / "student", rank_cases.make_student, (rank_cases.example(),))
    assert torch.equal(loaded(rank_cases.example()), ddp(rank_cases.example()))


def narrower_history():
    pruner = DynamicPruner(
        rank_cases.make_student(),
        example_inputs=(rank_cases.example(),),
        threshold=rank_cases.THRESHOLD,
        patience=1,
        process_group=False,
    )
    pruner.model(rank_cases.example())
    pruner.activations.observe()
    assert pruner.prune().neurons_pruned > 0
    return pruner.history.to_json()


@pytest.mark.usefixtures("one_rank")
def test_what_cannot_be_rewrapped_is_named():
    with pytest.raises(TypeError, match="ddp: expected a DistributedDataParallel, got Sequential"):
        kddp_ext.rewrap(rank_cases.make_student())
    student = rank_cases.make_student()
    ddp = DistributedDataParallel(student)
    student.requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match="every parameter is frozen"):
        kddp_ext.rewrap(ddp)
    ddp = DistributedDataParallel(rank_cases.make_student())
    ddp._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    with pytest.raises(UnsupportedModelError, match="FP16_COMPRESS was registered by a private function"):
        kddp_ext.rewrap(ddp)
    student = rank_cases.make_student()
    last = student[4]
    delayed = [("4.weight", last.weight), ("4.bias", last.bias)]
    ddp = DistributedDataParallel(
        student.float(), delay_all_reduce_named_params=delayed, param_to_hook_all_reduce=student[2].weight
    )
    with pytest.raises(UnsupportedModelError, match="delay_all_reduce_named_params"):
        kddp_ext.rewrap(ddp)


@pytest.mark.usefixtures("one_rank")
def test_wrappers_are_found_at_any_depth():
    class Task(nn.Module):
        def __init__(self, student):
            super().__init__()
            self.student = student

    student, other = rank_cases.make_student(), rank_cases.make_student()
    outer = DistributedDataParallel(Task(student))
    inside = nn.Sequential(nn.Identity(), DistributedDataParallel(rank_cases.make_student()))
    assert wrappers_of([student]) == (outer,)
    assert wrappers_of([inside]) == (inside[1],)
    assert wrappers_of([other]) == ()
    pruner = DynamicPruner(student, example_inputs=(rank_cases.example(),), threshold=rank_cases.THRESHOLD, patience=1)
    student(rank_cases.example())
    pruner.activations.observe()
    reducer = outer.reducer
    assert pruner.prune().neurons_pruned > 0
    assert outer.reducer is not reducer
