"""The examples: five lines are enough, and networks become smaller at about the same accuracy."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_five_lines_are_enough():
    lines = (EXAMPLES / "quickstart_kddp.py").read_text().splitlines()
    added = [line for line in lines if line.endswith("# kddp")]
    assert len(added) == 5
    plain = (EXAMPLES / "quickstart.py").read_text()
    assert not [line for line in added if line.removesuffix("# kddp").strip() in plain]


def accuracies(output):
    return [float(number) for number in re.findall(r"Accuracy: ([\d.]+)%", output)]


def parameters(output):
    """Of the model before each prune that was reported."""
    return [int(number.replace(",", "")) for number in re.findall(r"parameters ([\d,]+)", output)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def plain(folder):
    """The accuracy of the model that quickstart.py trained and saved in the folder of all examples."""
    program = [sys.executable, EXAMPLES / "quickstart.py"]
    output = subprocess.run(program, cwd=folder, capture_output=True, text=True, check=True).stdout
    assert accuracies(output)[-1] > 95
    return accuracies(output)[-1]


@pytest.fixture
def run(plain, folder, monkeypatch, capsys):
    """Run an example as a program in the folder where quickstart.py saved its model; returns what it printed."""

    def run_example(name):
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.setattr(sys, "argv", [name])
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        finally:
            torch.set_num_threads(threads)
        return capsys.readouterr().out

    return run_example


@pytest.mark.timeout(600)
def test_the_student_is_smaller_and_at_most_one_point_worse(run, plain):
    output = run("quickstart_kddp.py")
    assert accuracies(output)[-1] >= plain - 1
    before, *_, after = parameters(output)
    assert after < before / 2


@pytest.mark.timeout(600)
def test_a_tenth_of_the_network_is_at_most_one_and_a_half_points_worse(run, plain, folder):
    output = run("shrink.py")
    first, last = accuracies(output)
    assert first == plain
    assert last >= plain - 1.5
    weights = [each for each in load_file(folder / "student.safetensors").values() if each.dim() == 2]
    assert sum(each.numel() for each in weights) <= 0.1 * (64 * 512 + 512 * 512 + 512 * 10)  # MACs
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert accuracies(run("onnx_inference.py")) == [last, last]


@pytest.mark.timeout(600)
def test_images_in_folders(run):
    output = run("folder_of_images.py")
    teacher, student = accuracies(output)
    assert min(teacher, student) > 90
    first, second = map(int, re.search(r"DynamicPruner\(0 (\d+), 3 (\d+);", output).groups())
    assert first * second < 16 * 32 / 2


@pytest.mark.timeout(600)
def test_a_residual_network(run):
    output = run("resnet_shrink.py")
    before, after = accuracies(output)
    assert before > 95
    assert after > before - 2
    assert parameters(output)[-1] < parameters(output)[0] / 2


@pytest.mark.timeout(600)
def test_a_vision_transformer(run):
    pytest.importorskip("transformers")
    output = run("vit_transformers.py")
    before, after = accuracies(output)
    assert before > 80
    assert after > before - 3
    assert "→" in output


@pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")
@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
@pytest.mark.timeout(600)
def test_a_lightning_module(run):
    pytest.importorskip("lightning")
    output = run("lightning_module.py")
    teacher, student = accuracies(output)
    assert student > teacher - 2
    before, after = map(int, re.search(r"linear_relu_stack.0 (\d+)→(\d+)", output).groups())
    assert after < before
