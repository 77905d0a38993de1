"""Which calls the kernels of usual calls serve. What they compute is tested with that of all kernels, in tests/loss."""

import backends
import pytest
import torch

import kddp_ext

USUAL = {
    "the default": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "without a power of the exponential": {"temperature": 1.0},
    "its square": {"temperature": 2.0},
    "label smoothing": {"label_smoothing": 0.1},
}
OTHERS = {
    "float64": {"dtype": torch.float64},
    "a teacher of another type": {"teacher_dtype": torch.bfloat16},
    "no teacher": {"teacher_dtype": None, "alpha": 0.0},
    "no labels": {"labels": None, "alpha": 1.0},
    "soft labels": {"labels": "soft"},
    "class weights and smoothing": {"class_weights": torch.ones(40), "label_smoothing": 0.1},
    "standardized logits": {"standardize_logits": True},
    "a temperature that is no power of two": {"temperature": 3.0},
    "a temperature whose powers are too high": {"temperature": 8.0},
    "no cross entropy": {"alpha": 1.0},
    "no divergence": {"alpha": 0.0},
    "dkd": {"divergence": "dkd"},
    "reverse_kl": {"divergence": "reverse_kl"},
}


def kernel_of(emulated, *, dtype=torch.float32, teacher_dtype=..., labels="integers", **settings):
    student = torch.randn(6, 40, dtype=dtype)
    teacher_dtype = dtype if teacher_dtype is ... else teacher_dtype
    teacher = None if teacher_dtype is None else torch.randn(6, 40, dtype=teacher_dtype)
    if labels is not None:
        labels = torch.arange(6) if labels == "integers" else torch.randn(6, 40).softmax(1)
    emulated.emulator.clear()
    with emulated.serves():
        kddp_ext.fused_kd_l1_loss(student, teacher, labels, **settings)
    _, report = emulated.emulator.reports()
    return report["kernel"]


@pytest.mark.parametrize("case", [*USUAL, *OTHERS])
def test_usual_calls_have_kernels_of_their_own(request, case):
    kernel = kernel_of(backends.emulated(request.config), **{**USUAL, **OTHERS}[case])
    assert (", true>, " in kernel) == (case in USUAL), kernel
