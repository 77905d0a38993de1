"""Invalid arguments raise errors that name the argument, what was expected and what came; settings check themselves."""

import dataclasses
import math

import pytest
import torch

import kddp_ext

LOGITS = torch.zeros(4, 3)
LABELS = torch.tensor([0, 1, 2, 0])
ACTIVATION = torch.zeros(4, 5)
META = torch.device("meta")


def call(**changes):
    arguments = {"student": LOGITS, "teacher": LOGITS, "labels": LABELS, "activations": [ACTIVATION]} | changes
    positional = [arguments.pop(name) for name in ("student", "teacher", "labels", "activations")]
    return kddp_ext.fused_kd_l1_loss(*positional, **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student": [[1.0]]}, TypeError, "student_logits: expected a tensor, got list"),
        ({"student": torch.zeros(())}, ValueError, r"student_logits: expected at least 1 dimension, got shape \(\)"),
        ({"class_dim": 2}, ValueError, r"class_dim: expected a dimension of student_logits, .* \(4, 3\), got 2"),
        ({"student": LABELS}, TypeError, "student_logits: expected dtype float32, .* got torch.int64"),
        ({"student": torch.zeros(4, 0)}, ValueError, "student_logits: expected at least one class"),
        ({"teacher": torch.zeros(4, 2)}, ValueError, r"teacher_logits: expected the student's shape \(4, 3\), got"),
        ({"teacher": LOGITS.int()}, TypeError, "teacher_logits: expected dtype"),
        ({"teacher": LOGITS.to(META)}, ValueError, "teacher_logits: expected device cpu .* got meta"),
        ({"teacher": None}, ValueError, "teacher_logits: expected a tensor, since alpha is 0.9 and not 0, got None"),
        ({"labels": None}, ValueError, "labels: expected a tensor, since alpha is 0.9 and not 1, got None"),
        (
            {"divergence": "dkd", "labels": None, "alpha": 1.0},
            ValueError,
            "labels: expected a tensor, since divergence is 'dkd', got None",
        ),
        ({"labels": [0, 1, 2, 0]}, TypeError, "labels: expected a tensor, got list"),
        ({"labels": LABELS.bool()}, TypeError, "labels: expected an integer dtype .* got torch.bool"),
        ({"labels": LABELS.float()}, ValueError, r"labels: expected shape \(4, 3\), got \(4,\)"),
        ({"labels": LOGITS, "divergence": "dkd"}, ValueError, "labels: expected classes, .*'dkd', got probabilities"),
        ({"labels": LABELS[:3]}, ValueError, r"labels: expected shape \(4,\), got \(3,\)"),
        ({"labels": LABELS.to(META)}, ValueError, "labels: expected device cpu"),
        ({"labels": LABELS + 1}, ValueError, "labels: expected values from 0 to 2 .* got 3 in row 2"),
        ({"labels": LABELS - 1}, ValueError, "labels: expected .* 0 to 2 or ignore_index=-100, got -1 in row 0"),
        ({"activations": {ACTIVATION}}, TypeError, "activations: expected a tensor or a sequence of tensors, got set"),
        ({"activations": [ACTIVATION, 3]}, TypeError, r"activations\[1\]: expected a tensor, got int"),
        ({"activations": [ACTIVATION[:2]]}, ValueError, r"activations\[0\]: expected 4 rows .* got shape \(2, 5\)"),
        ({"activations": [ACTIVATION[:, 0]]}, ValueError, r"activations\[0\]: expected .*got shape \(4,\)"),
        ({"activations": [ACTIVATION.to(META)]}, ValueError, r"activations\[0\]: expected device cpu"),
        ({"l1_weight": [1.0, 2.0]}, ValueError, "l1_weight: expected one weight for each of 1 activations, got 2"),
        ({"reduction": "none", "l1_weight": 0.1}, ValueError, "reduction: expected 'mean' or 'sum' with an l1_weight"),
        ({"reduction": "max"}, ValueError, "reduction: expected one of mean, sum, none, got 'max'"),
        ({"normalizer": 0.0}, ValueError, "normalizer: expected a finite number above 0, got 0.0"),
        ({"normalizer": 3, "reduction": "sum"}, ValueError, "normalizer: expected None with reduction 'sum', got 3"),
        ({"sample_weights": torch.ones(3)}, ValueError, r"sample_weights: expected shape \(4,\), got \(3,\)"),
        (
            {"sample_weights": -torch.ones(4)},
            ValueError,
            "sample_weights: expected finite numbers of at least 0, got -1",
        ),
        ({"class_weights": torch.ones(4)}, ValueError, r"class_weights: expected shape \(3,\), got \(4,\)"),
        ({"class_weights": [1, 1, 1]}, TypeError, "class_weights: expected a tensor or None, got list"),
        ({"backend": "fast"}, ValueError, "backend: expected 'auto', 'native' or 'reference', got 'fast'"),
    ],
)
def test_invalid_tensors_raise(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


WEIGHT = "expected a finite number of at least 0, got"
FRACTION = "expected a number from 0 to 1, got"
BETA = r"expected a number between 0 and 1 \(use 'forward_kl' instead of 0, 'reverse_kl' instead of 1\), got"
SKEW = r"expected a number between 0 and 1 \(use 'forward_kl' or 'reverse_kl' instead of 0; .* 0 with 1\), got"
DIVERGENCE = "expected one of forward_kl, reverse_kl, jsd, dkd, skew_kl, skew_reverse_kl, symmetric_kl, got"


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        *[("temperature", x, ValueError, f"expected a finite number above 0, got {x}") for x in (0.0, -1.0, math.inf)],
        ("temperature", math.nan, ValueError, "expected a finite number above 0, got nan"),
        *[(name, x, ValueError, f"{FRACTION} {x}") for name in ("alpha", "label_smoothing") for x in (-0.1, 1.1)],
        ("alpha", math.nan, ValueError, f"{FRACTION} nan"),
        ("temperature", 10**400, ValueError, "expected a number that a float can hold, got a larger one"),
        ("ignore_index", 1.5, TypeError, "expected an integer, got float"),
        *[
            (name, x, ValueError, f"{WEIGHT} {x}")
            for name in ("l1_weight", "dkd_target_weight", "dkd_non_target_weight")
            for x in (-1.0, math.inf, math.nan)
        ],
        ("l1_weight", [0.1, math.nan], ValueError, f"{WEIGHT} nan"),
        ("divergence", "kl", ValueError, f"{DIVERGENCE} 'kl'"),
        *[("jsd_beta", x, ValueError, f"{BETA} {x}") for x in (0.0, 1.0, math.nan)],
        *[("skew", x, ValueError, f"{SKEW} {x}") for x in (0.0, 1.0, math.nan)],
        ("standardize_logits", 1, TypeError, "expected a bool, got int"),
    ],
)
def test_invalid_settings_raise_in_function_settings_and_module(name, value, error, message):
    criterion = kddp_ext.FusedKDL1Loss()
    before = criterion.settings
    for use in (
        call,
        kddp_ext.LossSettings,
        kddp_ext.FusedKDL1Loss,
        lambda **setting: setattr(criterion, *setting.copy().popitem()),
    ):
        with pytest.raises(error, match=f"^{name}: {message}"):
            use(**{name: value})
    assert criterion.settings == before


def test_settings_of_a_module_can_be_read_and_assigned():
    criterion = kddp_ext.FusedKDL1Loss(alpha=0.6, divergence="jsd")
    assert criterion.settings == kddp_ext.LossSettings(alpha=0.6, divergence="jsd")
    criterion.alpha, criterion.l1_weight = 0.5, [0.1, 0.2]
    assert criterion.settings == kddp_ext.LossSettings(alpha=0.5, divergence="jsd", l1_weight=[0.1, 0.2])
    for field in dataclasses.fields(kddp_ext.LossSettings):
        value = getattr(criterion, field.name)
        assert value == getattr(criterion.settings, field.name)
        assert f"{field.name}={value!r}" in repr(criterion)
    with pytest.raises(ValueError, match="backend"):
        kddp_ext.FusedKDL1Loss(backend="fast")
    with pytest.raises(AttributeError, match="beta"):
        _ = criterion.beta


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.int8])
def test_labels_of_any_integer_dtype_are_accepted(dtype):
    student = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(call(student=student, labels=LABELS.to(dtype)), call(student=student))


def test_each_layer_can_have_its_own_weight():
    ones = torch.ones(4, 5)
    penalty = call(activations=[ones, ones], l1_weight=[0.1, 0.2]) - call(activations=[ones, ones])
    torch.testing.assert_close(penalty, torch.tensor(5 * 0.3))


def test_a_device_without_kernels_uses_the_reference_and_warns_once():
    student = LOGITS.to(META)
    arguments = {"student": student, "teacher": student, "labels": LABELS.to(META), "activations": []}
    with pytest.warns(UserWarning, match="no native kernels for 'meta'"):
        assert call(**arguments).shape == ()
    call(**arguments)  # a second warning would be an error here
    with pytest.raises(ValueError, match=r"backend: .* this build of kddp_ext has no native kernels for 'meta'"):
        call(**arguments, backend="native")
