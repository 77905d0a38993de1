"""docs/api.md has every public name, and every public name documents its arguments and attributes."""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
from docs.blocks import ROOT

import kddp_ext

INTEGRATIONS = ("kddp_ext.integrations.lightning", "kddp_ext.integrations.transformers")
# Names that are neither classes nor functions; a string after the assignment documents them.
ASSIGNED = {"Criterion", "Resource"}
PUBLIC = {name: getattr(kddp_ext, name) for name in kddp_ext.__all__}
CLASSES = [value for name, value in PUBLIC.items() if inspect.isclass(value) and name not in ASSIGNED]
FUNCTIONS = [value for value in PUBLIC.values() if inspect.isfunction(value)]


def own_classes(kind: type) -> list[type]:
    """A class and its bases in this package."""
    return [each for each in kind.__mro__ if each.__module__.startswith("kddp_ext.")]


def attributes_of(kind: type) -> Iterator[str]:
    """The fields that a class declares, and the attributes that its methods set."""
    yield from vars(kind).get("__annotations__", {})
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(kind)))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def is_named(name: str, text: str) -> bool:
    return re.search(rf"^\s*\*{{0,2}}{name}:|`{name}`", text, re.MULTILINE) is not None


def missing_parameters(where: str, function: Any, text: str) -> list[str]:
    names = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    return [f"{where}: its argument {name}" for name in names if not is_named(name, text)]


def undocumented(kind: type) -> list[str]:
    """The methods, properties, attributes and arguments of a class without documentation."""
    text = "\n".join(each.__doc__ or "" for each in own_classes(kind))
    found = [] if kind.__doc__ else [kind.__name__]
    for each in own_classes(kind):
        public = sorted({name for name in attributes_of(each) if not name.startswith("_")})
        found += [f"{kind.__name__}.{name}" for name in public if not is_named(name, text)]
        for name, value in vars(each).items():
            member = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            documentable = inspect.isfunction(member) or isinstance(member, property)
            if documentable and not name.startswith("_") and not inspect.getdoc(getattr(each, name)):
                found.append(f"{kind.__name__}.{name}")
        if "__init__" in vars(each):
            found += missing_parameters(kind.__name__, vars(each)["__init__"], text)
    return found


def test_the_reference_has_every_public_name_once() -> None:
    shown = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    integrations = [f"{module}.DynamicPruning" for module in INTEGRATIONS]
    assert sorted(shown) == sorted([*(f"kddp_ext.{name}" for name in PUBLIC), *integrations])
    assert {each.__name__ for each in [*CLASSES, *FUNCTIONS]} | ASSIGNED == set(PUBLIC)


def test_public_names_are_documented() -> None:
    for kind in CLASSES:
        assert undocumented(kind) == []
    for function in FUNCTIONS:
        assert missing_parameters(function.__name__, function, inspect.getdoc(function) or "") == []


@pytest.mark.parametrize("module", INTEGRATIONS)
def test_integrations_are_documented(module: str) -> None:
    pytest.importorskip(module.rpartition(".")[2])
    assert undocumented(importlib.import_module(module).DynamicPruning) == []
