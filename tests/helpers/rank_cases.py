"""Functions that the ranks of test_distributed.py run, each in its own process."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
from pruner_cases import state_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import kddp_ext
from kddp_ext.pruning import compaction
from kddp_ext.pruning import pruner as pruner_module
from kddp_ext.pruning.pruner import DynamicPruner

INPUTS, CLASSES, ROWS = 5, 3, 16
THRESHOLD = 0.5  # high enough for each of a few prunes to remove neurons


def make_student():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(INPUTS, 12), nn.ReLU(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, CLASSES)
    ).double()


def make_convolutions():
    """A Linear layer reads the flattened channels, so each position is observed separately."""
    torch.manual_seed(0)
    convolution, reader = nn.Conv1d(1, 12, 3, padding=1), nn.Linear(12 * INPUTS, CLASSES)
    return nn.Sequential(nn.Unflatten(1, (1, INPUTS)), convolution, nn.ReLU(), nn.Flatten(), reader).double()


def example(rows=4):
    return torch.randn(rows, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def batches(count, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield (
            torch.randn(ROWS, INPUTS, dtype=torch.float64, generator=generator),
            torch.randn(ROWS, CLASSES, dtype=torch.float64, generator=generator),
            torch.randint(CLASSES, (ROWS,), generator=generator),
        )


def share_of(rank, batch):
    """Every second row; all rows for a single process."""
    return batch if rank is None else tuple(each[rank::2] for each in batch)


def train(
    rank,
    rounds=3,
    *,
    ddp_options=None,
    comm_hook=False,
    wrapped_after=False,
    inner=False,
    accumulate=False,
    compiled=False,
    make=make_student,
    reconstruction_samples=0,
):
    """Train for some rounds, each with a prune; rank None is a single process with the joined batches."""
    student = make()
    model = student
    if rank is not None and not wrapped_after:
        model = DistributedDataParallel(student, **(ddp_options or {}))
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01, amsgrad=True)
    if compiled:
        model = torch.compile(model, backend="aot_eager")
    pruner = DynamicPruner(
        student if inner else model,
        optimizer,
        example_inputs=(example(),),
        threshold=THRESHOLD,
        patience=1,
        copies=[average],
        reconstruction_samples=reconstruction_samples,
    )
    if wrapped_after and rank is not None:
        model = DistributedDataParallel(student)
    calls = []
    if comm_hook:
        model.register_comm_hook(calls, all_reduce_and_count)
    widths, per_round = [], []
    for round_ in range(rounds):
        calls.clear()
        for batch in batches(4, seed=round_):
            train_step(rank, model, optimizer, pruner, batch, accumulate=accumulate)
            average.update_parameters(student)
        per_round.append(len(calls))
        pruner.prune()
        widths.append(tuple(pruner.widths.values()))
    train_step(rank, model, optimizer, pruner, next(batches(1, seed=99)), accumulate=accumulate)
    return {
        "widths": widths,
        "history": pruner.history.to_json(),
        "student": tensors_of(student),
        "average": tensors_of(average.module),
        "gradients": {name: p.grad.clone() for name, p in student.named_parameters()},
        "optimizer": {
            f"{name} {key}": value.clone()
            for name, p in student.named_parameters()
            for key, value in optimizer.state[p].items()
        },
        "calls of the communication hook": per_round,
    }


def train_with(rank, options):
    """`train` with keyword arguments."""
    return train(rank, **options)


def train_step(rank, model, optimizer, pruner, batch, *, accumulate=False):
    optimizer.zero_grad()
    halves = [tuple(each[half::2] for each in batch) for half in (0, 1)] if accumulate else [batch]
    for index, half in enumerate(halves):
        last = index == len(halves) - 1
        with model.no_sync() if rank is not None and not last else nullcontext():
            x, teacher, labels = share_of(rank, half)
            loss = kddp_ext.fused_kd_l1_loss(model(x), teacher, labels, pruner.activations, l1_weight=1e-3)
            (loss / len(halves)).backward()
    optimizer.step()


def all_reduce_and_count(calls, bucket):
    calls.append(bucket.index())
    buffer = bucket.buffer().div_(dist.get_world_size())
    return dist.all_reduce(buffer, async_op=True).get_future().then(lambda done: done.value()[0])


def tensors_of(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


class Prepared:
    """A student that is about to be pruned."""

    def __init__(self, rank, **options):
        self.rank, self.student = rank, make_student()
        self.model = DistributedDataParallel(self.student)
        self.optimizer = torch.optim.AdamW(self.student.parameters())
        self.average = copy.deepcopy(self.student)
        settings = {"threshold": THRESHOLD, "patience": 1, "copies": [self.average], **options}
        self.pruner = DynamicPruner(self.model, self.optimizer, example_inputs=(example(),), **settings)
        self.step()
        self.saved_settings = self.pruner.settings
        self.saved = copy.deepcopy([each.state_dict() for each in (self.student, self.optimizer, self.pruner)])

    def step(self, seed=3):
        train_step(self.rank, self.model, self.optimizer, self.pruner, next(batches(1, seed)))

    def state(self):
        return state_of(self.student, self.average, optimizer=self.optimizer, pruner=self.pruner)

    def repair(self):
        """Undo a fault: restore everything as it was when this was made."""
        mock.patch.stopall()
        self.student.requires_grad_(True)
        self.pruner.settings = self.saved_settings
        for each, state in zip((self.student, self.optimizer, self.pruner), self.saved, strict=True):
            each.load_state_dict(state)


def change_counters(prepared):
    state = prepared.pruner.state_dict()
    state["inactive_checks"]["2"][4] = 1
    prepared.pruner.load_state_dict(state)


def failing(owner, name, call):
    """A fault where a function raises after its k-th call."""

    def spoil(prepared):
        function, calls = getattr(owner, name), []

        def fail_once(*arguments, **options):
            result = function(*arguments, **options)
            calls.append(name)
            if len(calls) == call:
                raise ValueError(f"injected into {name}")
            return result

        mock.patch.object(owner, name, fail_once).start()

    return spoil


# Faults of one rank; `Prepared.repair` undoes each.
SPOILS = {
    "other_weights": lambda p: p.student[0].weight.data[2, 1].add_(1e-12),
    "other_threshold": lambda p: setattr(p.pruner, "settings", replace(p.pruner.settings, threshold=0.25)),
    "other_steps": lambda p: p.pruner.step(),
    "other_counters": change_counters,
    "nan_statistics": lambda p: p.pruner.statistics["2"].values[1, 3].fill_(torch.nan),
    "no_samples": lambda p: p.pruner.reset(),
    "unknown_optimizer_state": lambda p: p.optimizer.state[p.student[2].weight].update(history=[1.0]),
    "frozen_model": lambda p: p.student.requires_grad_(False),
    "failing_swap": failing(compaction, "set_data", call=5),
    "failing_rewrap": failing(pruner_module, "rewrap", call=1),
}


def fail_on_rank_1(rank, spoil):
    """The error on this rank, whether anything changed, and the widths after a prune without the fault."""
    prepared = Prepared(rank)
    before_spoil = prepared.state()
    if rank == 1:
        SPOILS[spoil](prepared)
    before = prepared.state()
    error = error_of(prepared.pruner.prune)
    unchanged = before == prepared.state()
    if rank == 1:
        prepared.repair()
    repaired = before_spoil["values"] == prepared.state()["values"]
    prepared.step(seed=4)  # gradients are still averaged
    prepared.pruner.prune()
    prepared.step()
    return {
        "error": error, "unchanged": unchanged, "repaired": repaired, "widths": prepared.pruner.widths,
        "student": tensors_of(prepared.student),
    }  # fmt: skip


def error_of(function):
    try:
        function()
    except (RuntimeError, TypeError, ValueError) as error:
        return str(error)
    return None


def fickle_activity(statistics, outgoing):
    """Different activities on each rank."""
    return statistics.mean_abs if dist.get_rank() else outgoing


def rank_1_never_prunes(rank):
    """The error of rank 0, and whether nothing changed."""
    prepared = Prepared(rank, process_group=dist.new_group(timeout=timedelta(seconds=1)))
    before = prepared.state()
    error = error_of(prepared.pruner.prune) if rank == 0 else None
    dist.barrier()
    return error, before == prepared.state()


def prune_with(rank, options_of_ranks):
    """The error of this rank, and whether nothing changed."""
    prepared = Prepared(rank, **options_of_ranks[rank])
    before = prepared.state()
    return error_of(prepared.pruner.prune), before == prepared.state()


def backward_through_the_old_graph(rank, ddp_options):
    """A second backward through a graph from before a prune; then training continues."""
    student = make_student()
    model = DistributedDataParallel(student, **ddp_options)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    pruner = DynamicPruner(
        model, optimizer, example_inputs=(example(),), threshold=THRESHOLD, patience=1, compensate=False
    )  # so that the last bias keeps its data and its gradient accumulator
    for batch in batches(2, seed=0):
        train_step(rank, model, optimizer, pruner, batch)
    x, teacher, labels = share_of(rank, next(batches(1, seed=1)))
    loss = kddp_ext.fused_kd_l1_loss(model(x), teacher, labels, pruner.activations)
    loss.backward(retain_graph=True)
    pruner.prune()
    failed = error_of(loss.backward) is not None
    for batch in batches(3, seed=2):
        train_step(rank, model, optimizer, pruner, batch)
    return {"failed": failed, "student": tensors_of(student)}


def samples_of_different_number(rank):
    """Only rank 1 sees neuron 3 of the first layer active, in its third of all rows."""
    prepared = Prepared(rank, criterion="dead")
    prepared.pruner.reset()
    with torch.no_grad():
        prepared.student[0].weight[[3, 5]] = 0
        prepared.student[0].bias[[3, 5]] = -1
        prepared.student[0].weight[3, 0] = 100
    rows = example(6)
    rows[:, 0] = rows[:, 0].abs() * (1 if rank == 1 else -1)
    rows = rows[: (4, 2)[rank]]
    prepared.model(rows)
    prepared.pruner.activations.observe()
    return prepared.pruner.prune().layers[0].pruned


def an_average_on_rank_0_only(rank):
    student = make_student()
    model = DistributedDataParallel(student)
    # An average of the wrapper contains its own wrapper.
    average = AveragedModel(model) if rank == 0 else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = DynamicPruner(
        model, optimizer, example_inputs=(example(),), threshold=THRESHOLD, patience=1, copies=[average] * (rank == 0)
    )
    for batch in batches(2, seed=1):
        train_step(rank, model, optimizer, pruner, batch)
    pruner.prune()
    train_step(rank, model, optimizer, pruner, next(batches(1, seed=2)))
    if average is not None:
        average.update_parameters(model)
        with torch.no_grad():
            assert average.module.module(example()).shape == (4, CLASSES)
        assert average.module.module[0].out_features == student[0].out_features
    return {"student": tensors_of(student), "widths": pruner.widths}


def each_by_itself(rank):
    """Each rank has its own student with other weights."""
    student = make_student()
    with torch.no_grad():
        student[0].bias.add_(rank)
    apart, together = make_pruner(student, False), make_pruner(copy.deepcopy(student), None)
    for pruner in (apart, together):
        pruner.model(example(4 + rank))
        pruner.activations.observe()
    error = error_of(together.prune)
    return error, apart.prune().neurons_pruned if rank == 0 else None  # rank 1 does not take part


def a_group_of_one(rank):
    """Each rank in its own group, and the errors of wrong groups."""
    groups = [dist.new_group([each]) for each in range(2)]
    pruner = make_pruner(make_student(), groups[rank])
    pruner.model(example(4 + rank))
    pruner.activations.observe()
    pruned = pruner.prune().neurons_pruned if rank == 0 else None
    wrapped = DistributedDataParallel(make_student())
    wrong = [(make_student(), groups[1 - rank]), (make_student(), "gloo"), (wrapped, False)]
    return pruned, [error_of(partial(make_pruner, model, group)) for model, group in wrong]


def make_pruner(model, group):
    return DynamicPruner(model, example_inputs=(example(),), threshold=THRESHOLD, patience=1, process_group=group)
