"""Arbitrary arguments of the loss and the pruner: a result or an error that names the argument, on both backends."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import fields
from fractions import Fraction
from typing import Any

import loss_cases
import numpy as np
import pytest
import torch
from fuzzing.targets import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import kddp_ext
from kddp_ext.pruning.settings import PruningSettings, Schedule

ROWS, CLASSES = 3, 4
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHERS = (torch.bool, torch.complex64, torch.int64, torch.int8, torch.float8_e4m3fn, torch.uint8)
POSITIONAL = ("student_logits", "teacher_logits", "labels", "activations")
KEYWORDS = (*(field.name for field in fields(kddp_ext.LossSettings)), "return_terms", "backend")

ODD = st.sampled_from(
    [
        None, True, False, 0, 1, -1, 2**63, -(2**63) - 1, 10**400, -(10**400),
        0.0, -0.0, 0.5, 1.0, 5e-324, 1e308,
        math.nan, math.inf, -math.inf, 1j, "0.5", b"1", "", (), [], [0.5], [0.5, "x"], {}, Fraction(1, 3),
        Fraction(10**400), np.float32(0.5), np.int64(1), np.array([1.0, 2.0]), torch.tensor(0.5), torch.zeros(2),
        object(), len,
    ]
)  # fmt: skip


@st.composite
def tensors(draw: st.DrawFn, shapes: list[tuple[int, ...]]) -> Any:
    """Mostly a valid tensor; else another shape, dtype, layout or device, or no tensor."""
    if not draw(st.integers(0, 11)):
        return draw(ODD)
    shape = draw(st.sampled_from([*shapes * 6, (), (0,), (0, CLASSES), (ROWS, 0), (1, 1), (2, 3, 4), (ROWS,)]))
    dtype = draw(st.sampled_from(FLOATS * 4 + OTHERS))
    tensor = torch.arange(math.prod(shape)).reshape(shape).remainder(7).to(dtype)
    if dtype in FLOATS:
        first = tensor[..., :1] if shape else tensor
        first.fill_(draw(st.sampled_from([0.0, 1.0, -3.0, math.nan, math.inf, -math.inf, 1e4])))
        tensor.requires_grad_(draw(st.booleans()))
    if dtype == torch.float8_e4m3fn:  # PyTorch supports few operations of it
        return tensor
    changes: list[Callable[[Tensor], Any]] = [
        lambda x: x.t().contiguous().t() if x.dim() == 2 else x,
        lambda x: x[:1].expand(x.shape) if x.dim() and len(x) else x,
        lambda x: torch.cat([x, x], -1)[..., ::2] if x.dim() else x,
        lambda x: x.detach().flatten().as_strided(x.shape, (1,) * x.dim()) if x.numel() else x,
        lambda x: x * 2,
        lambda x: torch._neg_view(x.detach()) if x.is_floating_point() and x.dtype in FLOATS else x,
        lambda x: nn.Parameter(x.detach()) if x.dtype in FLOATS else x,
        lambda x: x.to("meta"),
        lambda x: x.detach().to_sparse() if x.dim() and x.dtype in FLOATS[:2] else x,
        lambda x: x.detach().float().to_sparse_csr() if x.dim() == 2 and x.dtype in FLOATS else x,
        lambda x: x.detach().float().to_mkldnn() if x.dim() and x.numel() and x.dtype in FLOATS else x,
        lambda x: torch.nested.nested_tensor([x.detach()]) if x.dim() and x.dtype in FLOATS[:2] else x,
        lambda x: x.tolist(),
        lambda x: x.detach().to(torch.float32).numpy() if x.dtype in FLOATS else x,
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns about layouts
        return draw(st.sampled_from([*[lambda x: x] * len(changes), *changes]))(tensor)


@st.composite
def label_tensors(draw: st.DrawFn) -> Any:
    if not draw(st.integers(0, 5)):
        return draw(tensors([(ROWS,)]))
    values = st.sampled_from([0, 1, CLASSES - 1, -100, CLASSES, -1, 2**31, -(2**63), 2**63 - 1])
    right = st.integers(0, CLASSES - 1)
    labels = draw(st.lists(right, min_size=ROWS, max_size=ROWS) | st.lists(values, min_size=ROWS, max_size=ROWS))
    return torch.tensor(labels)


def outcome(call: Callable[[], Any]) -> Any:
    """The result of `call`, or the type of its error and the argument that the error names."""
    try:
        result = call()
    except (TypeError, ValueError) as error:
        message = str(error)
        message.encode()
        return type(error), message.partition(":")[0].partition("[")[0]
    return result


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Any], dict[str, Any]]:
    activations = st.lists(tensors([(ROWS, 2), (ROWS, 2, 3)]), max_size=2) | st.just([]) | ODD
    logits = tensors([(ROWS, CLASSES)])
    positional = [draw(each) for each in (logits, logits, label_tensors(), activations)]
    optional = {
        "divergence": st.sampled_from(loss_cases.DIVERGENCES),
        "standardize_logits": st.booleans(),
        "alpha": st.sampled_from([0.0, 0.5, 1.0]),
        "l1_weight": st.sampled_from([0.0, 0.1, [0.1], [0.1, 0.0]]),
        "ignore_index": st.sampled_from([-100, 0, -(2**63), 2**63 - 1]),
    }
    keywords: dict[str, Any] = draw(st.fixed_dictionaries({}, optional=optional))
    if draw(st.booleans()):
        keywords[draw(st.sampled_from(KEYWORDS[:-1]))] = draw(ODD)
    return positional, keywords


def is_error(result: Any) -> bool:
    return isinstance(result, tuple) and isinstance(result[0], type)


@examples(250)
@given(call=calls())
def test_the_loss_gives_a_result_or_names_the_argument_on_both_backends_alike(
    call: tuple[list[Any], dict[str, Any]],
) -> None:
    positional, keywords = call
    results = [
        outcome(lambda b=backend: kddp_ext.fused_kd_l1_loss(*positional, **keywords, backend=b))
        for backend in ("native", "reference")
    ]
    native, reference = (result if is_error(result) else "a result" for result in results)
    for result in (native, reference):
        assert result == "a result" or result[1] in {*POSITIONAL, *KEYWORDS}, results
    meta = any(isinstance(each, Tensor) and each.is_meta for each in positional)
    if not (meta and native == (ValueError, "backend")):  # there are no kernels for meta tensors
        assert native == reference, results


@pytest.mark.parametrize("which", ["student", "teacher", "activation", "narrow"])
def test_a_negative_view_has_the_values_that_it_shows(which: str) -> None:
    """Its memory contains the negative of its values; conj().imag makes such views."""
    base = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    view = torch._neg_view(base) if which != "narrow" else torch.complex(base, base)[:, :1].conj().imag
    assert view.is_neg()
    results = []
    for tensor in (view, view.clone()):
        inputs = {name: base[:, : tensor.shape[1]].clone() for name in ("student", "teacher", "activation")}
        inputs[which.replace("narrow", "student")] = tensor
        student, teacher, activation = (each.detach().requires_grad_() for each in inputs.values())
        arguments = (teacher.detach(), torch.zeros(5, dtype=torch.int64), [activation])
        loss = kddp_ext.fused_kd_l1_loss(student, *arguments, alpha=0.5, l1_weight=0.1)
        gradients = torch.autograd.grad(loss, [student, activation])
        results.append((loss.detach(), *(gradient.resolve_neg() for gradient in gradients)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@examples(200)
@given(name=st.sampled_from(KEYWORDS), value=ODD)
def test_the_module_accepts_or_names_its_settings(name: str, value: Any) -> None:
    def use() -> Any:
        module = kddp_ext.FusedKDL1Loss(**{name: value})
        return module(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 1]), [torch.zeros(2, 5)])

    found = outcome(use)
    if is_error(found):
        # With the classes in dimension 0, the labels have another shape.
        assert found[1] == name or (name, found[1]) == ("class_dim", "labels"), found


@examples(200)
@given(kind=st.sampled_from([PruningSettings, Schedule]), data=st.data(), value=ODD)
def test_the_pruner_accepts_or_names_its_settings(kind: Any, data: st.DataObject, value: Any) -> None:
    name = data.draw(st.sampled_from([field.name for field in fields(kind)]))
    found = outcome(lambda: kind(**{name: value}))
    if isinstance(found, tuple):
        assert found[1] == name, found


def test_a_pruner_with_the_largest_settings_prunes() -> None:
    largest = 2**63 - 1
    for name in ("patience", "minimum_width", "round_to", "target_parameters", "target_macs", "interval", "l1_warmup"):
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        options = {name: largest} | ({"l1_weight": 1.0} if name == "l1_warmup" else {})
        pruner = kddp_ext.DynamicPruner(model, example_inputs=(torch.zeros(2, 3),), **options)
        for _ in range(3):
            model(torch.randn(8, 3))
            pruner.activations.observe()
            assert pruner.prune() is not None
        assert pruner.step() is None
