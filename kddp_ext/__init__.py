"""Knowledge distillation with dynamic pruning: one fused native loss, neurons removed while the student trains.

Names are imported when they are first used, so that `import kddp_ext` and `kddp --help` do not load torch. If torch is
loaded already, this import also registers the package's operators, which programs from `torch.export` need. If torch is
imported later and no name is used, `import kddp_ext.ops` registers them.
"""

import ast
import importlib
import sys
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# __init__.pyi lists the public names, for this file as for type checkers and editors.
_SOURCES = {
    alias.asname or alias.name: (str(node.module), alias.name)
    for node in ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
__all__ = sorted(_SOURCES)


def __getattr__(name: str) -> Any:
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _SOURCES[name]
    value = globals()[name] = getattr(importlib.import_module(module), attribute)
    _register_operators()
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_operators() -> None:
    if "torch" in sys.modules:
        importlib.import_module("kddp_ext.ops")


_register_operators()
