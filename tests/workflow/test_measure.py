"""Active neurons, and the settings of the process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.measure import count_active
from kddp_ext.workflow.models import PlainStudent
from kddp_ext.workflow.runtime import Runtime


def test_active_neurons_are_those_that_are_active_for_an_image(image_data: Callable[..., ImageData]) -> None:
    data = image_data()
    images = data.train.images
    side, channels = images.shape[1], images.shape[3]
    model = PlainStudent(channels, side, 10, (4,), 8)
    with torch.no_grad():
        model.hidden.weight[:5] = 0
        model.hidden.bias[:5] = torch.tensor([-1.0, 0.0, 1.0, -2.0, 0.5])  # two are always active, three never
        model.eval()
        others = (model.hidden(model.features(data.normalise(images)))[:, 5:] > 0).any(0).sum()
    assert count_active(model, model.hidden, data, Runtime("cpu", "float32")) == 2 + int(others)
    assert not model.hidden._forward_hooks


def test_every_thread_flushes_denormal_numbers_to_zero(tmp_path: Path) -> None:
    program = (
        "from kddp_ext.workflow.runtime import prepare_process; prepare_process();"
        "import torch; torch.set_num_threads(2);"
        "x = torch.full((1 << 22,), 1e-30); assert not (x * 1e-10).any(); assert (x * 1e-7).all()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)
