"""Every public name stands in the reference and says what it is, down to its arguments and attributes."""

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

REFERENCE = ROOT / "docs" / "api.md"
# Each needs its library, which may be missing here.
INTEGRATIONS = {
    "kddp_ext.integrations.lightning.DynamicPruning": "lightning",
    "kddp_ext.integrations.transformers.DynamicPruning": "transformers",
}
# Names that are neither classes nor functions: where they are assigned, a string behind that says what they are.
ASSIGNED = {"Criterion": ("pruning/criteria.py", "Criterion"), "gradient_pool": ("ops/gradient_pool.py", "pool")}
# What public names are instances of.
BEHIND = ["kddp_ext.ops.GradientPool"]
CLASSES = [getattr(kddp_ext, name) for name in kddp_ext.__all__ if inspect.isclass(getattr(kddp_ext, name))]
FUNCTIONS = [getattr(kddp_ext, name) for name in kddp_ext.__all__ if inspect.isfunction(getattr(kddp_ext, name))]


def own_classes(kind: type) -> list[type]:
    """A class and those of its bases that are of this package."""
    return [each for each in kind.__mro__ if each.__module__ == __name__ or each.__module__.startswith("kddp_ext.")]


def attributes_of(kind: type) -> Iterator[str]:
    """What a class declares as fields, and what its constructors assign to `self`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(tree, ast.ClassDef)
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        if isinstance(node, ast.FunctionDef) and node.name in ("__init__", "__new__"):
            for each in ast.walk(node):
                of_self = isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store)
                if of_self and isinstance(each.value, ast.Name) and each.value.id == "self":
                    yield each.attr


def is_named(name: str, text: str) -> bool:
    """Whether a docstring explains a name: in a section of its own, or between backticks."""
    return re.search(rf"^\s*\*{{0,2}}{name}:|`{name}`", text, re.MULTILINE) is not None


def parameters_missing(where: str, function: Any, text: str) -> list[str]:
    names = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    return [f"{where}: its argument {name}" for name in names if not is_named(name, text)]


def undocumented(kind: type) -> list[str]:
    """What a class leaves unsaid of itself, its methods, properties and attributes."""
    if not kind.__doc__:
        return [kind.__name__]
    found = []
    text = "\n".join(each.__doc__ or "" for each in own_classes(kind))
    for each in own_classes(kind):
        public = sorted({name for name in attributes_of(each) if not name.startswith("_")})
        found += [f"{kind.__name__}.{name}" for name in public if not is_named(name, text)]
        for name, value in vars(each).items():
            member = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            documentable = inspect.isfunction(member) or isinstance(member, property)
            if documentable and not name.startswith("_") and not inspect.getdoc(getattr(each, name)):
                found.append(f"{kind.__name__}.{name}")
        if "__init__" in vars(each):
            found += parameters_missing(kind.__name__, vars(each)["__init__"], text)
    return found


def test_the_reference_has_every_public_name_once() -> None:
    shown = re.findall(r"^::: (\S+)$", REFERENCE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(shown) == sorted([*(f"kddp_ext.{name}" for name in kddp_ext.__all__), *INTEGRATIONS, *BEHIND])


def test_public_names_are_classes_functions_or_assigned() -> None:
    named = {each.__name__ for each in [*CLASSES, *FUNCTIONS]}
    assert named | set(ASSIGNED) == set(kddp_ext.__all__)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_classes_are_documented(kind: type) -> None:
    assert undocumented(kind) == []


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_functions_are_documented(function: Any) -> None:
    text = inspect.getdoc(function)
    assert text
    assert parameters_missing(function.__name__, function, text) == []


@pytest.mark.parametrize("name", INTEGRATIONS)
def test_integrations_are_documented(name: str) -> None:
    pytest.importorskip(INTEGRATIONS[name], reason=f"{INTEGRATIONS[name]} is not installed")
    module, _, kind = name.rpartition(".")
    assert undocumented(getattr(importlib.import_module(module), kind)) == []


@pytest.mark.parametrize("name", ASSIGNED)
def test_assigned_names_are_documented(name: str) -> None:
    path, assigned = ASSIGNED[name]
    body = ast.parse((ROOT / "kddp_ext" / path).read_text(encoding="utf-8")).body
    (at,) = [
        number
        for number, node in enumerate(body)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == assigned
    ]
    said = body[at + 1]
    assert isinstance(said, ast.Expr)
    assert isinstance(said.value, ast.Constant)
    assert isinstance(said.value.value, str)
    assert undocumented(type(getattr(kddp_ext, name))) == [] or name == "Criterion"


class Silent:
    """Says nothing of what it has but for `told`.

    Args:
        told: this.
    """

    field: int

    def __init__(self, told: int, untold: int) -> None:
        self.told, self.also, self._private = told, untold, 0

    def method(self) -> None:
        pass

    @property
    def number(self) -> int:
        return 0


def test_what_is_not_said_is_found() -> None:
    missing = ["Silent.also", "Silent.field", "Silent.method", "Silent.number", "Silent: its argument untold"]
    assert undocumented(Silent) == missing
