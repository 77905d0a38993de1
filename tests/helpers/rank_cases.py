"""Functions that the ranks of test_distributed.py run, each in its own process."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
from pruner_cases import observed_pruner, state_of
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


class Residual(nn.Module):
    """A stream of 12 neurons that two layers write and two read."""

    def __init__(self):
        super().__init__()
        self.first, self.up, self.down = nn.Linear(INPUTS, 12), nn.Linear(12, 10), nn.Linear(10, 12)
        self.last = nn.Linear(12, CLASSES)

    def forward(self, x):
        h = self.first(x)
        return self.last(h + self.down(self.up(h).relu()))


def make_residual():
    torch.manual_seed(0)
    return Residual().double()


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


class Training:
    """A student in training, with a moving average; rank None is a single process, whose batches are not shared."""

    def __init__(
        self,
        rank,
        *,
        make=make_student,
        ddp_options=None,
        wrapped_after=False,
        inner=False,
        compiled=False,
        average_of_wrapper=False,
        **options,
    ):
        self.rank, self.student = rank, make()
        self.model = self.student
        if rank is not None and not wrapped_after:
            self.model = DistributedDataParallel(self.student, **(ddp_options or {}))
        average_of = self.model if average_of_wrapper else self.student
        self.average = AveragedModel(average_of, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=0.01, amsgrad=True)
        if compiled:
            self.model = torch.compile(self.model, backend="aot_eager")
        settings = {"threshold": THRESHOLD, "patience": 1, "copies": [self.average], "reconstruction_samples": 0}
        model = self.student if inner else self.model
        self.pruner = DynamicPruner(model, self.optimizer, example_inputs=(example(),), **{**settings, **options})
        if wrapped_after and rank is not None:
            self.model = DistributedDataParallel(self.student)

    def step(self, seed, steps=1, *, accumulate=False):
        for batch in batches(steps, seed):
            self.optimizer.zero_grad()
            parts = [tuple(each[half::2] for each in batch) for half in (0, 1)] if accumulate else [batch]
            for part in parts:
                last = part is parts[-1]
                with self.model.no_sync() if self.rank is not None and not last else nullcontext():
                    (self.loss(part) / len(parts)).backward()
            self.optimizer.step()
            self.average.update_parameters(self.student)

    def loss(self, batch):
        x, teacher, labels = share_of(self.rank, batch)
        return kddp_ext.fused_kd_l1_loss(self.model(x), teacher, labels, self.pruner.activations, l1_weight=1e-3)

    def tensors(self):
        parameters = dict(self.student.named_parameters())
        return {
            "student": tensors_of(self.student),
            "average": tensors_of(self.average.module),
            "gradients": {name: p.grad.clone() for name, p in parameters.items()},
            "optimizer": {
                f"{name} {key}": value.clone()
                for name, p in parameters.items()
                for key, value in self.optimizer.state[p].items()
            },
        }


def train(rank, options):
    """Train for some rounds, each with a prune; rank None is a single process with the joined batches."""
    options = dict(options)
    comm_hook, accumulate, rounds = (options.pop(name, None) for name in ("comm_hook", "accumulate", "rounds"))
    training, calls = Training(rank, **options), []
    if comm_hook:
        training.model.register_comm_hook(calls, all_reduce_and_count)
    widths, calls_per_round = [], []
    for round_ in range(rounds or 3):
        calls.clear()
        training.step(round_, 4, accumulate=accumulate)
        calls_per_round.append(len(calls))
        training.pruner.prune()
        widths.append(tuple(training.pruner.widths.values()))
    training.step(99, accumulate=accumulate)
    history = training.pruner.history.to_json()
    return {**training.tensors(), "widths": widths, "history": history, "communication hook": calls_per_round}


def all_reduce_and_count(calls, bucket):
    calls.append(bucket.index())
    buffer = bucket.buffer().div_(dist.get_world_size())
    return dist.all_reduce(buffer, async_op=True).get_future().then(lambda done: done.value()[0])


def tensors_of(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


class Prepared(Training):
    """A student that is about to be pruned."""

    def __init__(self, rank, **options):
        super().__init__(rank, **options)
        self.step(3)
        self.saved_settings = self.pruner.settings
        self.saved = copy.deepcopy([each.state_dict() for each in (self.student, self.optimizer, self.pruner)])

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
    prepared.step(4)  # gradients are still averaged
    prepared.pruner.prune()
    prepared.step(5)
    widths, student = prepared.pruner.widths, tensors_of(prepared.student)
    return {"error": error, "unchanged": unchanged, "repaired": repaired, "widths": widths, "student": student}


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
    # Without compensation the last bias keeps its data and its gradient accumulator.
    training = Training(rank, ddp_options=ddp_options, compensate=False)
    training.step(0, 2)
    loss = training.loss(next(batches(1, seed=1)))
    loss.backward(retain_graph=True)
    training.pruner.prune()
    failed = error_of(loss.backward) is not None
    training.step(2, 3)
    return {"failed": failed, "student": tensors_of(training.student)}


def samples_of_different_number(rank):
    """Only rank 1 sees neuron 3 of the first layer active, in its third of all rows."""
    prepared = Prepared(rank, criterion="dead")
    prepared.pruner.reset()
    with torch.no_grad():
        prepared.student[0].bias.add_(3)
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
    """The average of the wrapper contains its own wrapper."""
    training = Training(rank, average_of_wrapper=True, **({} if rank == 0 else {"copies": []}))
    training.step(1, 2)
    training.pruner.prune()
    widths = [each[0].out_features for each in (training.student, training.average.module.module)]
    return {"student": tensors_of(training.student), "widths": widths}


def each_by_itself(rank):
    """Each rank has its own student with other weights."""
    student = make_student()
    with torch.no_grad():
        student[0].bias.add_(rank)
    together, apart = observed(copy.deepcopy(student), 4 + rank), observed(student, 4 + rank, process_group=False)
    error = error_of(together.prune)
    return error, apart.prune().neurons_pruned if rank == 0 else None  # rank 1 does not take part


def a_group_of_one(rank):
    """Each rank in its own group, and the errors of wrong groups."""
    groups = [dist.new_group([each]) for each in range(2)]
    pruner = observed(make_student(), 4 + rank, process_group=groups[rank])
    pruned = pruner.prune().neurons_pruned if rank == 0 else None
    wrapped = DistributedDataParallel(make_student())
    wrong = [(make_student(), groups[1 - rank]), (make_student(), "gloo"), (wrapped, False)]
    return pruned, [error_of(partial(observed, model, process_group=group)) for model, group in wrong]


def observed(model, rows=4, **options):
    """A pruner of `model` with statistics, which is about to prune."""
    return observed_pruner(model, example(rows), threshold=THRESHOLD, **options)
