"""benchmarks/classic_loop: both loops minimise the same loss, and ours computes what the workflow's does."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.classic_loop import __main__ as main
from benchmarks.classic_loop import child, ours, processes
from benchmarks.classic_loop.pairs import PAIRS, build_networks, load_images
from kddp_ext.workflow.runtime import Runtime
from kddp_ext.workflow.train import Training, student_recipe, train_epoch

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def make(pair="cnn5"):
    """A pair's tiny config, images, teacher and student."""
    config = PAIRS[pair].config(smoke=True)
    torch.manual_seed(0)
    return config, load_images(config, None, smoke=True), *build_networks(config)


def test_both_loops_minimise_the_same_function(monkeypatch):
    main.require_same_loss()
    monkeypatch.setattr(main.kddp_ext, "fused_kd_l1_loss", lambda *inputs, **options: torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="the losses differ"):
        main.require_same_loss()


@pytest.mark.parametrize("pair", list(PAIRS))
@pytest.mark.parametrize("cached", [True, False])
def test_our_loop_trains_as_the_workflow_does(pair, cached, tmp_path):
    """An epoch of the benchmark's loop and one of the workflow give the same weights and the same loss."""
    config, data, teacher, student = make(pair)
    runtime, path = Runtime("cpu", "float32"), tmp_path / "logits.safetensors"
    runtime.place(teacher)
    batches = list(data.batches(0, config.student.batch_size, config.seed))
    answers = torch.zeros(len(data.train), 10)
    with torch.no_grad():
        for indices in batches:
            answers[indices] = teacher(data.training_images(indices, 0, config.student.shift))
    ours.safetensors.torch.save_file({"logits": answers}, path)
    loop = ours.OurLoop(config, teacher, student, data, path if cached else None, runtime)
    loss = loop.train(len(batches))

    other = runtime.place(make(pair)[3])
    recipe = student_recipe(config, "kd")
    training = Training(other, other, recipe.optimizers(other), None, epochs=[])
    cache = SimpleNamespace(view=lambda view: answers)
    metrics = train_epoch(training, recipe, data, cache, runtime, 0)
    assert loss == pytest.approx(metrics["loss"], rel=1e-6)
    for found, expected in zip(student.parameters(), other.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_the_error_names_a_loop_whose_process_ends(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)  # its process imports benchmarks
    task = child.Task("cnn5", "classic", str(tmp_path), 1, 0, 0, 1, True)
    with pytest.raises(RuntimeError, match="cnn5, classic: ended with status 1"), processes.Loop(task):
        pass
    assert str(tmp_path) in capfd.readouterr().err  # no CIFAR-10 in there


def test_the_command_measures_and_writes(tmp_path):
    files = [tmp_path / name for name in ("figures.json", "tables.md")]
    options = ["--smoke", "--pairs", "cnn5", "--steps", "3", "--warm-up", "1", "--rounds", "1", "--threads", "1"]
    options += ["--json", str(files[0]), "--markdown", str(files[1])]
    subprocess.run([sys.executable, "-m", "benchmarks.classic_loop", *options], cwd=ROOT, check=True)
    content = json.loads(files[0].read_text())
    found = content["pairs"]["cnn5"]
    assert found["images"] == 3 * 8
    assert found["images_per_second"].keys() == {"classic", "cached", "teacher every step"}
    assert found["times_classic"].keys() == {"cached", "teacher every step"}
    text = files[1].read_text()
    assert text.startswith("<!-- table classic-loop-machine -->\n")
    assert "Random images of CIFAR-10's shape" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [row.count("|") for row in rows] == [7, 7, 7]
