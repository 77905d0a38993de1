"""A callback without its library says what to install, and the package needs no library."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kddp_ext


@pytest.mark.parametrize("library", ["lightning", "transformers"])
def test_what_to_install(monkeypatch, library):
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)  # so that it cannot be imported
    monkeypatch.delitem(sys.modules, f"kddp_ext.integrations.{library}", raising=False)
    with pytest.raises(ModuleNotFoundError, match=rf"{library} missing; .* 'kddp_ext\[{library}\]'"):
        importlib.import_module(f"kddp_ext.integrations.{library}")


def test_the_package_imports_none_of_them(tmp_path):
    loaded = "import sys, kddp_ext, kddp_ext.integrations; print(*{name.split('.')[0] for name in sys.modules})"
    environment = {**os.environ, "PYTHONPATH": str(Path(kddp_ext.__file__).parents[1])}
    command = [sys.executable, "-c", loaded]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    names = done.stdout.split()
    assert "kddp_ext" in names
    assert not {"lightning", "transformers", "accelerate", "onnx", "onnxscript", "onnxruntime"} & set(names)
