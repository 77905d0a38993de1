"""Bad arguments: each gives an error that names the argument, what was expected and what came."""

import pytest
import torch

import kddp_ext

LOGITS = torch.zeros(4, 3)
LABELS = torch.tensor([0, 1, 2, 0])
ACTIVATION = torch.zeros(4, 5)


def call(**changes):
    arguments = {"student": LOGITS, "teacher": LOGITS, "labels": LABELS, "activations": [ACTIVATION]} | changes
    positional = [arguments.pop(name) for name in ("student", "teacher", "labels", "activations")]
    return kddp_ext.fused_kd_l1_loss(*positional, **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student": [[1.0]]}, TypeError, "student_logits: expected a tensor, got list"),
        ({"student": torch.zeros(4)}, ValueError, r"student_logits: expected 2 dimensions, got shape \(4,\)"),
        ({"student": LABELS}, TypeError, "student_logits: expected dtype float32, .* got torch.int64"),
        ({"student": torch.zeros(4, 0)}, ValueError, "student_logits: expected at least one class"),
        ({"teacher": torch.zeros(4, 2)}, ValueError, r"teacher_logits: expected the student's shape \(4, 3\), got"),
        ({"teacher": LOGITS.int()}, TypeError, "teacher_logits: expected dtype"),
        ({"teacher": LOGITS.to("meta")}, ValueError, "teacher_logits: expected device cpu .* got meta"),
        ({"teacher": None}, ValueError, "teacher_logits: expected a tensor, since alpha is 0.9 and not 0, got None"),
        ({"labels": None}, ValueError, "labels: expected a tensor, since alpha is 0.9 and not 1, got None"),
        ({"labels": [0, 1, 2, 0]}, TypeError, "labels: expected a tensor, got list"),
        ({"labels": LABELS.float()}, TypeError, "labels: expected an integer dtype .* got torch.float32"),
        ({"labels": LABELS[:3]}, ValueError, r"labels: expected shape \(4,\), got \(3,\)"),
        ({"labels": LABELS.to("meta")}, ValueError, "labels: expected device cpu"),
        ({"labels": LABELS + 1}, ValueError, "labels: expected values from 0 to 2 .* got 3 in row 2"),
        (
            {"labels": LABELS - 1},
            ValueError,
            "labels: expected values from 0 to 2 or ignore_index=-100, got -1 in row 0",
        ),
        ({"activations": ACTIVATION}, TypeError, "activations: expected a sequence of tensors, got Tensor"),
        ({"activations": [ACTIVATION, 3]}, TypeError, r"activations\[1\]: expected a tensor, got int"),
        ({"activations": [ACTIVATION[:2]]}, ValueError, r"activations\[0\]: expected 4 rows .* got shape \(2, 5\)"),
        ({"activations": [ACTIVATION.to("meta")]}, ValueError, r"activations\[0\]: expected device cpu"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number above 0, got 0.0"),
        ({"temperature": float("nan")}, ValueError, "temperature: expected a finite number above 0, got nan"),
        ({"temperature": float("inf")}, ValueError, "temperature: expected a finite number above 0, got inf"),
        ({"alpha": 1.1}, ValueError, "alpha: expected a number from 0 to 1, got 1.1"),
        ({"alpha": float("nan")}, ValueError, "alpha: expected a number from 0 to 1, got nan"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing: expected a number from 0 to 1, got -0.1"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index: expected an integer, got float"),
        ({"l1_weight": -1e-4}, ValueError, "l1_weight: expected a finite number of at least 0, got -0.0001"),
        ({"l1_weight": float("inf")}, ValueError, "l1_weight: expected a finite number of at least 0, got inf"),
        ({"l1_weight": [1.0, 2.0]}, ValueError, "l1_weight: expected one weight for each of 1 activations, got 2"),
        (
            {"divergence": "kl"},
            ValueError,
            "divergence: expected one of forward_kl, reverse_kl, jsd, dkd, got 'kl'",
        ),
        ({"jsd_beta": 0.0}, ValueError, "jsd_beta: expected a number between 0 and 1 .*, got 0.0"),
        ({"jsd_beta": 1.0}, ValueError, "jsd_beta: expected a number between 0 and 1 .*, got 1.0"),
        ({"jsd_beta": float("nan")}, ValueError, "jsd_beta: expected a number between 0 and 1 .*, got nan"),
        (
            {"dkd_target_weight": -1.0},
            ValueError,
            "dkd_target_weight: expected a finite number of at least 0, got -1.0",
        ),
        ({"dkd_non_target_weight": float("inf")}, ValueError, "dkd_non_target_weight: expected a finite .*, got inf"),
        ({"dkd_non_target_weight": float("nan")}, ValueError, "dkd_non_target_weight: expected a finite .*, got nan"),
        ({"standardize_logits": 1}, TypeError, "standardize_logits: expected a bool, got int"),
        (
            {"divergence": "dkd", "labels": None, "alpha": 1.0},
            ValueError,
            "labels: expected a tensor, since divergence is 'dkd', got None",
        ),
        ({"backend": "fast"}, ValueError, "backend: expected 'auto', 'native' or 'reference', got 'fast'"),
    ],
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"divergence": "kl"}, "divergence"),
        ({"jsd_beta": 2.0}, "jsd_beta"),
        ({"l1_weight": -1.0}, "l1_weight"),
        ({"l1_weight": [0.1, float("nan")]}, "l1_weight"),
        ({"backend": "fast"}, "backend"),
    ],
)
def test_a_module_refuses_bad_settings_when_it_is_made(settings, name):
    with pytest.raises(ValueError, match=name):
        kddp_ext.FusedKDL1Loss(**settings)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.int8])
def test_labels_of_any_integer_type(dtype):
    student = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(call(student=student, labels=LABELS.to(dtype)), call(student=student))


def test_a_weight_for_each_layer():
    ones = torch.ones(4, 5)
    separate = call(activations=[ones, ones], l1_weight=[0.1, 0.2]) - call(activations=[ones, ones])
    torch.testing.assert_close(separate, torch.tensor(5 * 0.3))


def test_devices_without_kernels_run_the_reference_and_say_so_once():
    student = LOGITS.to("meta")
    arguments = {"student": student, "teacher": student, "labels": LABELS.to("meta"), "activations": []}
    with pytest.warns(UserWarning, match="no native kernels for 'meta'"):
        assert call(**arguments).shape == ()
    call(**arguments)  # a second warning would be an error here
    with pytest.raises(ValueError, match=r"backend: .* this build of kddp_ext has no native kernels for 'meta'"):
        call(**arguments, backend="native")
