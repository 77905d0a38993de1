"""`fused_linear_kd_loss` has the value and the gradients of the layers multiplied out and `fused_kd_l1_loss`."""

import copy
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from loss_cases import each_divergence, each_form
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import kddp_ext
from kddp_ext.loss import fused_linear

linear_kd_loss = sys.modules["kddp_ext.ops.linear_kd_loss"]  # the package's attribute of this name is the function

D, D_TEACHER, CLASSES = 9, 5, 23
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def batch(rows=37, dtype=torch.float64, classes=CLASSES, leading=None):
    """The arguments by name; the student's require a gradient."""
    generator = torch.Generator().manual_seed(rows)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    leading = (rows,) if leading is None else leading
    labels = torch.randint(0, classes, leading, generator=generator)
    labels.reshape(-1)[::5] = -100
    return {
        "student_hidden": normal(*leading, D).requires_grad_(),
        "student_weight": normal(classes, D).requires_grad_(),
        "teacher_hidden": normal(*leading, D_TEACHER),
        "teacher_weight": normal(classes, D_TEACHER),
        "labels": labels,
        "student_bias": normal(classes).requires_grad_(),
        "teacher_bias": normal(classes),
    }


def chunked(inputs, **options):
    return kddp_ext.fused_linear_kd_loss(**inputs, **{"chunk_rows": 8, **options})


def all_logits(inputs, activations=(), **options):
    student = F.linear(*(inputs[f"student_{part}"] for part in ("hidden", "weight")), inputs.get("student_bias"))
    teacher = None
    if inputs["teacher_hidden"] is not None:
        teacher = F.linear(inputs["teacher_hidden"], inputs["teacher_weight"], inputs.get("teacher_bias"))
    return kddp_ext.fused_kd_l1_loss(student, teacher, inputs["labels"], activations, **options)


def leaves_of(inputs):
    return [x for x in inputs.values() if x is not None and x.requires_grad]


def assert_same(inputs, *extra_leaves, tolerance=1e-10, **options):
    """The same loss, terms and gradients."""
    leaves = [*leaves_of(inputs), *extra_leaves]
    results = []
    for loss_of in (chunked, all_logits):
        loss, terms = loss_of(inputs, return_terms=True, **options)
        weights = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
        results.append((loss, *terms, *torch.autograd.grad(loss, leaves, weights)))
    for ours, theirs in zip(*results, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        largest = theirs.detach().abs().max() if theirs.numel() else 0
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=float(tolerance * largest))


@each_form
@each_reduction
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_values_and_gradients(form, reduction, dtype):
    assert_same(batch(dtype=dtype), reduction=reduction, tolerance=TOLERANCES[dtype], **form)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@each_reduction
def test_labels(alpha, label_smoothing, reduction):
    inputs, options = batch(), {"alpha": alpha, "label_smoothing": label_smoothing, "reduction": reduction}
    assert_same(inputs, **options)
    assert_same({**inputs, "labels": inputs["labels"].to(torch.int16)}, **options)
    probabilities = torch.rand(37, CLASSES, generator=torch.Generator().manual_seed(2)).softmax(1)
    class_weights = torch.linspace(0, 2, CLASSES)
    assert_same({**inputs, "labels": probabilities}, **options)
    assert_same({**inputs, "labels": probabilities}, class_weights=class_weights, **options)
    assert_same(inputs, class_weights=class_weights, **options)
    if alpha == 1:
        assert_same({**inputs, "labels": None}, **options)
    if alpha == 0:
        without = dict.fromkeys(("teacher_hidden", "teacher_weight", "teacher_bias"))
        assert_same(inputs | without, **options)
    inputs["labels"].fill_(-100)
    assert_same(inputs, **options)


@pytest.mark.parametrize("weights", ["samples", "classes", "both"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "normalizer"])
def test_weights_and_normalizer(weights, reduction):
    options = {"normalizer": torch.tensor(7.0)} if reduction == "normalizer" else {"reduction": reduction}
    if weights != "classes":
        options["sample_weights"] = torch.linspace(0, 2, 37, dtype=torch.float64)
    if weights != "samples":
        options["class_weights"] = torch.linspace(0.5, 3, CLASSES, dtype=torch.float64)
    assert_same(batch(), **options)


@each_reduction
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 37])
@pytest.mark.parametrize("chunk_rows", [1, 8, 100, None])
def test_rows_and_chunks(rows, chunk_rows, reduction):
    inputs = batch(rows)
    wanted = all_logits(inputs, reduction=reduction)
    loss = chunked(inputs, reduction=reduction, chunk_rows=chunk_rows)
    torch.testing.assert_close(loss, wanted)
    gradients = [torch.autograd.grad(x, leaves_of(inputs), torch.ones_like(x)) for x in (loss, wanted)]
    torch.testing.assert_close(*gradients)


@each_reduction
@pytest.mark.parametrize("leading", [(), (3, 4), (2, 3, 2)], ids=str)
def test_leading_dimensions(leading, reduction):
    assert_same(batch(12, leading=leading), reduction=reduction)


@each_divergence
@pytest.mark.parametrize("classes", [1, 2, 16, 1031, 9001])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_class_counts(divergence, classes, dtype):
    """The kernel overwrites rows of one and of several blocks of classes, aligned and unaligned ones."""
    inputs = batch(11, dtype, classes)
    assert_same(inputs, tolerance=TOLERANCES[dtype], divergence=divergence, standardize_logits=classes == 1031)


@each_form
@pytest.mark.parametrize("classes", [1, 3, 16, 1031, 9001])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_gradients_in_place_of_logits_have_the_same_bits(form, classes, dtype, monkeypatch):
    inputs, results = batch(11, dtype, classes), []
    for in_place in (True, False):
        monkeypatch.setattr(linear_kd_loss, "overwrites_logits", lambda _tensor, flag=in_place: flag)
        loss = chunked(inputs, alpha=0.7, label_smoothing=0.1 if classes == 16 else 0.0, **form)
        results.append([loss, *torch.autograd.grad(loss, leaves_of(inputs))])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("layout", ["transposed", "every other row", "sequence first", "expanded weight"])
@each_reduction
def test_strides(layout, reduction):
    inputs = batch(12, leading=(3, 4))
    for side in ("student", "teacher"):
        hidden, weight = (inputs[f"{side}_{part}"].detach() for part in ("hidden", "weight"))
        if layout == "transposed":
            hidden = hidden.transpose(0, 2).contiguous().transpose(0, 2)
            weight = weight.t().contiguous().t()
        elif layout == "every other row":
            hidden = hidden.repeat_interleave(2, 0)[::2]
        elif layout == "sequence first":
            hidden = hidden.transpose(0, 1).contiguous().transpose(0, 1)
        else:
            weight = weight[:, :1].expand(-1, weight.shape[1])
        inputs |= {f"{side}_hidden": hidden, f"{side}_weight": weight}
    for name in ("student_hidden", "student_weight"):
        inputs[name].requires_grad_()
    assert_same(inputs, reduction=reduction)


@pytest.mark.parametrize("options", [{}, {"normalizer": 11}, {"reduction": "sum"}], ids=str)
def test_the_penalty_counts_once(options):
    hidden, images = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((37, 4), (37, 2, 3, 3)))
    assert_same(batch(), hidden, images, activations=[hidden, images], l1_weight=[0.1, 0.2], **options)


def test_the_pruners_statistics_count_once():
    model = torch.nn.Sequential(torch.nn.Linear(6, D), torch.nn.ReLU(), torch.nn.Linear(D, CLASSES))
    x, inputs = torch.randn(37, 6), batch(dtype=torch.float32)
    found = []
    for loss_of in (chunked, all_logits):
        pruner = kddp_ext.DynamicPruner(model, example_inputs=(x[:2],))
        inputs["student_hidden"] = model[:2](x)
        model(x)
        loss_of(inputs, activations=pruner.activations, l1_weight=0.1).backward()
        found.append([statistics.sum_abs for statistics in pruner.statistics.values()])
        pruner.close()
    torch.testing.assert_close(*found)


@each_reduction
@pytest.mark.parametrize("required", ["student_hidden", "student_weight", "student_bias"])
def test_only_required_gradients_are_computed(required, reduction):
    inputs = {
        name: x.detach().requires_grad_(name == required) if x.is_floating_point() else x for name, x in batch().items()
    }
    assert_same(inputs, reduction=reduction)
    chunked(inputs, reduction=reduction).sum().backward()
    assert [name for name, x in inputs.items() if x.grad is not None] == [required]


def test_the_teacher_is_constant():
    inputs = {name: x.requires_grad_() if x.is_floating_point() else x for name, x in batch().items()}
    chunked(inputs).backward()
    assert [name for name, x in inputs.items() if x.grad is None] == [
        *("teacher_hidden", "teacher_weight", "labels", "teacher_bias")
    ]
    with torch.no_grad():
        assert not chunked(inputs).requires_grad


def test_dtypes_of_the_two_sides_may_differ():
    inputs = batch(dtype=torch.bfloat16)
    for name in ("teacher_hidden", "teacher_weight", "teacher_bias"):
        inputs[name] = inputs[name].double()
    assert_same(inputs, tolerance=TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_divergence
def test_errors_are_at_most_twice_pytorchs(dtype, divergence):
    """Here the sum over many chunks matters."""
    inputs = batch(301, dtype, 64)

    def evaluate(loss_of, inputs, **options):
        loss = loss_of(inputs, divergence=divergence, **options)
        return loss.detach(), *torch.autograd.grad(loss, leaves_of(inputs))

    in_double = {
        name: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for name, x in inputs.items()
    }
    truth = evaluate(all_logits, in_double, backend="reference")
    ours = evaluate(chunked, inputs)
    theirs = evaluate(all_logits, inputs, backend="reference")
    for x, y, exact in zip(ours, theirs, truth, strict=True):
        errors = [(value.double() - exact).abs().max() for value in (x, y)]
        assert errors[0] <= 2 * errors[1] + 2 * torch.finfo(x.dtype).eps * exact.abs().max()


@each_reduction
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(reduction, dtype):
    inputs = batch(dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        assert_same(inputs, reduction=reduction, tolerance=TOLERANCES[dtype])
        losses = [loss_of(inputs, reduction=reduction) for loss_of in (chunked, all_logits)]
    found = [torch.autograd.grad(loss, leaves_of(inputs), torch.ones_like(loss)) for loss in losses]
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0, atol=float(TOLERANCES[dtype] * theirs.abs().max()))


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@each_reduction
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_without_a_graph_break(reduction, dynamic):
    activation = torch.randn(37, 4, dtype=torch.float64, requires_grad=True)
    options = {"reduction": reduction, "l1_weight": 0.0 if reduction == "none" else 0.1}
    compiled = torch.compile(lambda inputs: chunked(inputs, activations=activation, **options), fullgraph=True)
    for rows in (37,) if dynamic is None else (37, 9, 12):
        inputs, activation = batch(rows), torch.randn(rows, 4, dtype=torch.float64, requires_grad=True)
        losses = [compiled(inputs), all_logits(inputs, activations=activation, **options)]
        torch.testing.assert_close(*losses)
        leaves = leaves_of(inputs) if reduction == "none" else [*leaves_of(inputs), activation]
        torch.testing.assert_close(*(torch.autograd.grad(loss, leaves, torch.ones_like(loss)) for loss in losses))


@pytest.mark.parametrize("by_row", [False, True])
def test_the_operator_is_registered_rightly(by_row):
    *tensors, labels, student_bias, teacher_bias = batch().values()
    layers = *tensors[:2], student_bias, *tensors[2:], teacher_bias
    inputs = [*layers, labels, torch.rand(len(student_bias)), torch.rand(2, 37, dtype=torch.float64)]
    scalars = torch.tensor([2.0, 0.5, 37.0], dtype=torch.float64)
    constants = kddp_ext.LossSettings(reduction="none" if by_row else "mean").constants()
    opcheck(torch.ops.kddp.linear_kd_loss.default, (*inputs, scalars, 8, *constants, *[not by_row] * 3))


# ------------------------------------------------------------------------------------------------ other derivatives


@each_reduction
def test_second_derivatives(reduction):
    inputs, results = batch(), []
    for loss_of in (chunked, all_logits):
        loss = loss_of(inputs, reduction=reduction).sum()
        first = torch.autograd.grad(loss, leaves_of(inputs), create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves_of(inputs)))
    torch.testing.assert_close(*results)


@each_reduction
def test_many_gradients_at_once(reduction):
    inputs, results = batch(), []
    for loss_of in (chunked, all_logits):
        loss = loss_of(inputs, reduction=reduction)
        weights = torch.linspace(-1, 1, 3 * loss.numel(), dtype=torch.float64).reshape(3, *loss.shape)
        results.append(torch.autograd.grad(loss, leaves_of(inputs), weights, is_grads_batched=True))
    torch.testing.assert_close(*results)


@each_reduction
def test_forward_mode_and_transforms(reduction):
    inputs, results = batch(), []
    hidden = inputs.pop("student_hidden").detach()
    for loss_of in (chunked, all_logits):

        def of_hidden(h, loss_of=loss_of):
            return loss_of({"student_hidden": h, **inputs}, reduction=reduction)

        with forward_ad.dual_level():
            dual = of_hidden(forward_ad.make_dual(hidden, hidden.cos()))
            tangent = forward_ad.unpack_dual(dual).tangent
        many = torch.stack([hidden, hidden.sin()])
        gradient = torch.func.grad(lambda h, f=of_hidden: f(h).sum())(hidden)
        results.append([tangent, torch.func.vmap(of_hidden)(many), gradient])
    torch.testing.assert_close(*results)


@pytest.mark.filterwarnings("ignore")  # torch.jit's own
def test_jit_trace_is_an_error_that_names_the_way_out():
    inputs = {name: x.detach() for name, x in batch().items()}
    hidden = inputs.pop("student_hidden")
    with pytest.raises(RuntimeError, match=r"fused_linear_kd_loss: .* use backend='reference'"):
        torch.jit.trace(lambda h: chunked({"student_hidden": h, **inputs}), hidden)
    traced = torch.jit.trace(lambda h: chunked({"student_hidden": h, **inputs}, backend="reference"), hidden)
    torch.testing.assert_close(traced(2 * hidden), chunked({"student_hidden": 2 * hidden, **inputs}))


# ------------------------------------------------------------------------------------------------ ownership


def from_grad(loss_of, leaves):
    loss = loss_of()
    return loss, torch.autograd.grad(loss, leaves, retain_graph=True)


def from_hooks(loss_of, leaves):
    seen = [[] for _ in leaves]
    handles = [leaf.register_hook(of.append) for leaf, of in zip(leaves, seen, strict=True)]
    loss = loss_of()
    torch.autograd.backward(loss, retain_graph=True, inputs=leaves)
    for handle, leaf in zip(handles, leaves, strict=True):
        handle.remove()
        leaf.grad = None
    return loss, [of[0] for of in seen]


def from_thread(loss_of, leaves):
    found = []
    thread = threading.Thread(target=lambda: found.extend(from_grad(loss_of, leaves)))
    thread.start()
    thread.join()
    return tuple(found)


def from_checkpoint(loss_of, leaves):
    return from_grad(lambda: checkpoint(loss_of, use_reentrant=False), leaves)


def from_pack_hooks(loss_of, leaves):
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (tensor,), lambda packed: packed[0]):
        return from_grad(loss_of, leaves)


@pytest.mark.parametrize("source", [from_grad, from_hooks, from_thread, from_checkpoint, from_pack_hooks])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_gradient_that_was_handed_out_is_never_written_again(source, dtype, reduction):
    inputs = batch(dtype=dtype)
    leaves = leaves_of(inputs)
    loss, gradients = source(lambda: chunked(inputs, reduction=reduction).sum(), leaves)
    before = copy.deepcopy(gradients)
    tripled = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    for first, second, kept in zip(gradients, tripled, before, strict=True):
        assert torch.equal(first, kept)
        torch.testing.assert_close(second, 3 * kept, rtol=0, atol=float(TOLERANCES[dtype] * second.abs().max()))
        first.zero_()
    last = torch.autograd.grad(loss, leaves)
    kept = copy.deepcopy(last)
    torch.testing.assert_close(last, tuple(before))
    chunked(inputs, reduction=reduction).sum().backward()
    torch.testing.assert_close(last, kept, rtol=0, atol=0)


@each_reduction
def test_a_freed_graph_says_so(reduction):
    loss = chunked(batch(), reduction=reduction).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_an_input_that_changes_before_backward_does_not_change_gradients():
    inputs = batch()
    wanted = torch.autograd.grad(chunked(inputs), leaves_of(inputs))
    loss, by_row = chunked(inputs), chunked(inputs, reduction="none").sum()
    with torch.no_grad():
        inputs["student_weight"] += 1
    torch.testing.assert_close(torch.autograd.grad(loss, leaves_of(inputs)), wanted)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        by_row.backward()


@each_reduction
def test_a_teachers_inference_tensors(reduction):
    inputs = batch()
    with torch.inference_mode():
        inference = inputs | {name: x.clone() for name, x in inputs.items() if name.startswith("teacher")}
    losses = [chunked(each, reduction=reduction).sum() for each in (inference, inputs)]
    firsts = [torch.autograd.grad(loss, leaves_of(inputs), create_graph=True) for loss in losses]
    torch.testing.assert_close(*firsts)
    torch.testing.assert_close(*[torch.autograd.grad(loss, leaves_of(inputs)) for loss in losses])


# ------------------------------------------------------------------------------------------------ arguments


def test_the_default_chunk_has_64_mebibytes_of_logits(monkeypatch):
    chunks = []
    monkeypatch.setattr(
        fused_linear.ops,
        "linear_kd_loss",
        lambda *_, chunk_rows, **__: chunks.append(chunk_rows) or (None, *[None] * 2),
    )
    for dtype, classes, rows in ((torch.float32, 32000, 524), (torch.bfloat16, 128256, 261), (torch.float32, 2, 2**23)):
        inputs = {
            "student_hidden": torch.empty(1, 1, dtype=dtype),
            "student_weight": torch.empty(classes, 1, dtype=dtype),
            **dict.fromkeys(("teacher_hidden", "teacher_weight")),
            "labels": torch.zeros(1, dtype=torch.int64),
        }
        with pytest.raises(AttributeError):  # nothing is computed
            kddp_ext.fused_linear_kd_loss(**inputs, alpha=0.0)
        assert chunks.pop() == rows


WRONG = {
    "student_hidden: expected a tensor, got list": {"student_hidden": [1.0]},
    "student_hidden: expected at least 1 dimension": {"student_hidden": torch.tensor(1.0).double()},
    "student_hidden: expected dtype float32, float64, bfloat16 or float16, got torch.int64": {
        "student_hidden": torch.zeros(37, D, dtype=torch.int64)
    },
    "student_weight: expected a tensor, got NoneType": {"student_weight": None},
    "student_weight: expected dtype torch.float64 as student_hidden, got torch.float32": {
        "student_weight": torch.zeros(CLASSES, D)
    },
    r"student_weight: expected shape \(classes, 9\), with at least one class, got \(23, 8\)": {
        "student_weight": torch.zeros(CLASSES, 8).double()
    },
    r"student_weight: expected shape \(classes, 9\), with at least one class, got \(0, 9\)": {
        "student_weight": torch.zeros(0, 9).double()
    },
    r"student_bias: expected shape \(23,\), got \(22,\)": {"student_bias": torch.zeros(22).double()},
    "student_weight: expected device cpu as student_hidden, got meta": {
        "student_weight": torch.zeros(CLASSES, D, device="meta").double()
    },
    "student_weight: expected a dense tensor, got layout torch.sparse_coo": {
        "student_weight": torch.zeros(CLASSES, D).double().to_sparse()
    },
    r"teacher_hidden: expected the leading dimensions \(37,\) of student_hidden, got \(36,\)": {
        "teacher_hidden": torch.zeros(36, D_TEACHER).double()
    },
    "teacher_weight: expected 23 classes as in student_weight, got 22": {
        "teacher_weight": torch.zeros(22, D_TEACHER).double(),
        "teacher_bias": None,
    },
    "teacher_weight: expected a tensor, got NoneType": {"teacher_weight": None},
    "teacher_weight: expected None without teacher_hidden, got a Tensor": {"teacher_hidden": None, "alpha": 0.0},
    "teacher_hidden: expected a tensor, since alpha is 0.9 and not 0, got None": dict.fromkeys(
        ("teacher_hidden", "teacher_weight", "teacher_bias")
    ),
    "labels: expected a tensor, since alpha is 0.9 and not 1, got None": {"labels": None},
    r"labels: expected shape \(37,\), got \(36,\)": {"labels": torch.zeros(36, dtype=torch.int64)},
    "labels: expected values from 0 to 22 or ignore_index=-100, got 23 in row 36": {
        "labels": torch.tensor([0] * 36 + [23])
    },
    r"sample_weights: expected shape \(37,\), got \(3,\)": {"sample_weights": torch.ones(3).double()},
    "sample_weights: expected a constant": {"sample_weights": torch.ones(37).double().requires_grad_()},
    r"activations\[0\]: expected 37 rows": {"activations": torch.ones(3, 4).double()},
    "reduction: expected 'mean' or 'sum' with an l1_weight": {
        "reduction": "none",
        "l1_weight": 0.1,
        "activations": torch.ones(37, 4).double(),
    },
    "class_dim: expected -1, since hidden states end with features, got 1": {"class_dim": 1},
    "chunk_rows: expected an integer or None, got float": {"chunk_rows": 8.0},
    "chunk_rows: expected at least 1, got 0": {"chunk_rows": 0},
    "backend: expected 'auto', 'native' or 'reference', got 'cuda'": {"backend": "cuda"},
    "temperature: expected a finite number above 0": {"temperature": torch.tensor(-1.0)},
}


@pytest.mark.parametrize(("message", "changed"), WRONG.items(), ids=WRONG)
def test_wrong_arguments(message, changed):
    with pytest.raises((TypeError, ValueError), match=message):
        kddp_ext.fused_linear_kd_loss(**{**batch(), **changed})
