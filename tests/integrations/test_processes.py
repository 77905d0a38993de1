"""Integrations in processes of their own: two that a library launches prune alike (processes.py); none is required."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kddp_ext

SCRIPT = Path(__file__).with_name("processes.py")
LAUNCHER = {
    "lightning": [],  # it starts the other process itself
    "transformers": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
}


def output_of(folder, *arguments):
    """The standard output of Python with these arguments; an error if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(Path(kddp_ext.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("library", LAUNCHER)
def test_both_processes_end_with_the_same_smaller_student(library, tmp_path):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    output = output_of(tmp_path, *LAUNCHER[library], str(SCRIPT), library)
    results = [line.split()[1:] for line in output.splitlines() if line.startswith("RESULT")]
    assert len(results) == 2, output
    assert results[0] == results[1]
    width, steps, same = results[0]
    assert int(width) < 16
    assert steps == "2"
    assert same == "True"


def test_the_package_imports_no_library(tmp_path):
    loaded = "import sys, kddp_ext, kddp_ext.integrations; print(*{name.split('.')[0] for name in sys.modules})"
    names = output_of(tmp_path, "-c", loaded).split()
    assert "kddp_ext" in names
    assert not {"lightning", "transformers", "accelerate", "onnx", "onnxscript", "onnxruntime"} & set(names)


@pytest.mark.parametrize("library", ["lightning", "transformers"])
def test_a_missing_library_is_named_with_what_to_install(monkeypatch, library):
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)  # so that it cannot be imported
    monkeypatch.delitem(sys.modules, f"kddp_ext.integrations.{library}", raising=False)
    with pytest.raises(ModuleNotFoundError, match=rf"{library} missing; .* 'kddp_ext\[{library}\]'"):
        importlib.import_module(f"kddp_ext.integrations.{library}")
