"""Several processes prune alike: statistics of all samples, one decision, and no change where one of them fails."""

import copy
import itertools
import warnings

import pytest
import rank_cases
import torch
import torch.distributed as dist
from pruner_cases import changed
from rank_processes import RankProcesses
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import kddp_ext
from kddp_ext import UnsupportedModelError
from kddp_ext.pruning.distributed import wrappers_of


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    processes = RankProcesses(tmp_path_factory.mktemp("ranks"))
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def one_process():
    """The result of a single process with the batches of both ranks joined."""
    return rank_cases.train(None, {})


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
    "default": {},
    "gradients in buckets": {"ddp_options": {"gradient_as_bucket_view": True}},
    "static graph": {"ddp_options": {"static_graph": True}},
    "unused parameters": {"ddp_options": {"find_unused_parameters": True}},
    "small buckets": {"ddp_options": {"bucket_cap_mb": 1e-4}},
    "communication hook": {"comm_hook": True},
    "wrapped after the pruner was made": {"wrapped_after": True},
    "pruner of the module inside": {"inner": True},
    "compiled": {"compiled": True},
    "accumulated gradients": {"accumulate": True},
    "convolutions": {"make": rank_cases.make_convolutions, "rounds": 2},
    "residual stream": {"make": rank_cases.make_residual, "rounds": 2},
    # Each rank takes out the means of its own samples, so without them the sums are those of one process.
    "saliency": {"criterion": "saliency", "target_macs": 0.5, "target_steps": 3, "compensate": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_ranks_equal_one_process_with_all_samples(ranks, one_process, options):
    changes_training = {"accumulate", "make", "criterion"} & options.keys()
    expected = rank_cases.train(None, options) if changes_training else one_process
    sizes = [sum(widths) for widths in expected["widths"]]
    assert all(later < earlier for earlier, later in itertools.pairwise([22, *sizes]))
    results = ranks.run(rank_cases.train, options)
    assert_trained_alike(results, expected)
    if options.get("comm_hook"):
        assert all(calls >= 4 for result in results for calls in result["communication hook"])


def test_reconstruction_is_the_same_on_all_ranks(ranks):
    """It uses samples of both ranks; a single process keeps other samples."""
    first, second = ranks.run(rank_cases.train, {"reconstruction_samples": 64})
    without, _ = ranks.run(rank_cases.train, {})
    for kind in ("student", "average", "gradients", "optimizer"):
        assert_equal_bits(first[kind], second[kind])
    assert first["history"] == second["history"]
    assert any(not torch.equal(first["student"][name], tensor) for name, tensor in without["student"].items())


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
    assert second["repaired"]
    assert first["widths"] == second["widths"]  # without the fault, both prune and continue training
    assert sum(first["widths"].values()) < 22
    assert_equal_bits(first["student"], second["student"])


def test_a_rank_that_never_prunes_causes_a_timeout(ranks):
    (error, unchanged), _ = ranks.run(rank_cases.rank_1_never_prunes)
    assert "imeout" in error or "imed out" in error
    assert unchanged


def test_ranks_with_other_layers_are_refused(ranks):
    (error, unchanged), (other_error, other_unchanged) = ranks.run(
        rank_cases.prune_with, [{"layers": ["0", "2"]}, {"layers": ["2"]}]
    )
    assert error == other_error
    assert "rank 1 differs from rank 0 in the width of 0 (None, not 12)" in error
    assert unchanged
    assert other_unchanged


def test_ranks_whose_criteria_round_differently_follow_rank_0(ranks):
    first, second = ranks.run(rank_cases.train, {"criterion": rank_cases.fickle_activity, "threshold": 0.25})
    assert first["history"] == second["history"]
    assert_equal_bits(first["student"], second["student"])


@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"gradient_as_bucket_view": True}])
def test_a_backward_through_an_old_graph_fails_and_training_continues(ranks, options):
    first, second = ranks.run(rank_cases.backward_through_the_old_graph, options)
    assert first["failed"]
    assert second["failed"]
    assert_equal_bits(first["student"], second["student"])


def test_ranks_may_have_different_numbers_of_samples(ranks):
    """A neuron that is active on one rank only is active."""
    assert ranks.run(rank_cases.samples_of_different_number) == [(5,), (5,)]


def test_one_rank_may_keep_an_average(ranks):
    first, second = ranks.run(rank_cases.an_average_on_rank_0_only)
    assert first["widths"][0] == first["widths"][1] == second["widths"][0] < 12
    assert_equal_bits(first["student"], second["student"])


def test_process_groups(ranks):
    (error, pruned), (other_error, _) = ranks.run(rank_cases.each_by_itself)
    assert pruned > 0
    assert error == other_error
    assert "rank 1 differs from rank 0 in the weights 0.bias" in error
    assert error.endswith("process_group=False lets each prune by itself")
    (pruned, errors), (_, other_errors) = ranks.run(rank_cases.a_group_of_one)
    assert pruned > 0
    assert errors == other_errors
    assert errors == [
        "process_group: this process does not belong to it",
        "process_group: expected a torch.distributed.ProcessGroup, False or None, got str",
        "process_group: False lets each process prune by itself, but DistributedDataParallel keeps this model the same "
        "on all of them",
    ]
    with pytest.raises(ValueError, match=r"process_group: torch\.distributed is not initialised"):
        rank_cases.observed(rank_cases.make_student(), process_group="default")


# --- DistributedDataParallel, in one process


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

    def settings():
        return {key: value for key, value in ddp.__dict__.items() if isinstance(value, bool | int | float | str)}

    before, logged = settings(), ddp._get_ddp_logging_data()
    identities = [id(parameter) for parameter in ddp.parameters()]
    narrower = rank_cases.observed(rank_cases.make_student(), process_group=False)
    assert narrower.prune().neurons_pruned > 0
    narrower.history.replay(student, (rank_cases.example(),))
    assert kddp_ext.rewrap(ddp) is ddp
    assert [id(parameter) for parameter in ddp.parameters()] == identities
    assert settings() == {**before, "_has_rebuilt_buckets": False}
    now = ddp._get_ddp_logging_data()
    for key in ("bucket_cap_bytes", "find_unused_parameters", "gradient_as_bucket_view", "comm_hook", "module_name"):
        assert now[key] == logged[key], key
    assert now["total_parameter_size_bytes"] < logged["total_parameter_size_bytes"]
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
def test_rewrap_records_a_static_graph_again():
    with pytest.warns(UserWarning, match="find_unused_parameters"):
        ddp = DistributedDataParallel(rank_cases.make_student(), static_graph=True, find_unused_parameters=True)
    for rewrapped in (False, True):
        if rewrapped:
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
    ddp = wrapped()
    pruner = rank_cases.observed(ddp)
    assert pruner.prune().neurons_pruned > 0
    kddp_ext.save_student(tmp_path / "student", ddp, pruner.history)
    loaded = kddp_ext.load_student(tmp_path / "student", rank_cases.make_student, (rank_cases.example(),))
    assert torch.equal(loaded(rank_cases.example()), ddp(rank_cases.example()))


def wrapped():
    return DistributedDataParallel(rank_cases.make_student())


def delayed():
    student = rank_cases.make_student().float()
    named = [("4.weight", student[4].weight), ("4.bias", student[4].bias)]
    return DistributedDataParallel(
        student, delay_all_reduce_named_params=named, param_to_hook_all_reduce=student[2].weight
    )


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (changed(wrapped, lambda ddp: ddp.module.requires_grad_(False)), "every parameter is frozen"),
        (
            changed(wrapped, lambda ddp: ddp._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)),
            "FP16_COMPRESS was registered by a private function",
        ),
        (delayed, "delay_all_reduce_named_params"),
        (
            changed(wrapped, lambda ddp: setattr(ddp, "mixed_precision", object())),
            "mixed_precision keeps a second set of parameters",
        ),
        (
            changed(wrapped, lambda ddp: setattr(ddp.module[0].weight, "_in_backward_optimizers", [])),
            "the optimizer runs inside the backward pass",
        ),
        (changed(wrapped, lambda ddp: delattr(ddp, "_comm_hooks")), "keeps its buckets in an unknown way"),
    ],
)
def test_wrappers_that_cannot_be_rebuilt_are_refused(make, reason):
    with pytest.raises(UnsupportedModelError, match=f"DistributedDataParallel cannot be rebuilt: .*{reason}"):
        kddp_ext.rewrap(make())
    with pytest.raises(TypeError, match="ddp: expected a DistributedDataParallel, got Sequential"):
        kddp_ext.rewrap(rank_cases.make_student())


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
    reducer = outer.reducer
    assert rank_cases.observed(student).prune().neurons_pruned > 0
    assert outer.reducer is not reducer
