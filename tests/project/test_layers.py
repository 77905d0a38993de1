"""Arrows between files point one way: the table of rooms in docs/architecture.md, held against every import."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import kddp_ext

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kddp_ext"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
NATIVE = ("kddp_ext._core", "kddp_ext._cuda")


def rows() -> list[str]:
    """The names of the table in docs/architecture.md, from above to below and left to right."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = re.search(r"```\w*\nkddp_ext/\n((?:  .*\n)+)", text)
    assert table is not None
    return [name for line in table[1].splitlines() for name in re.split(r"\s{2,}", line.strip())[0].split(", ")]


def room(module: str) -> str:
    """The name that a module has in the table, or that of its folder."""
    if module in NATIVE:
        return module.rpartition(".")[2]
    parts = MODULES[module].relative_to(PACKAGE).parts
    return parts[0] if len(parts) == 1 else f"{parts[0]}/"


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imported(node: ast.AST) -> Iterator[str]:
    """The modules of this package that an import names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "kddp_ext")
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        if node.module is not None and node.module.partition(".")[0] == "kddp_ext":
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES or submodule in NATIVE else node.module


def imports(module: str) -> set[str]:
    """All that a module imports of this package, wherever in its text."""
    return {name for node in ast.walk(tree(module)) for name in imported(node)}


def imports_at_once(module: str) -> set[str]:
    """What it imports when it is imported itself: outside of functions and of what only a type checker reads."""
    found, left = set(), list(tree(module).body)
    while left:
        node = left.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            left += node.orelse
            continue
        found.update(imported(node))
        left += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.ExceptHandler)]
    return found


def test_the_table_names_every_file():
    names = rows()
    assert len(names) == len(set(names))
    assert set(names) == {room(module) for module in [*MODULES, *NATIVE]}


def test_a_file_imports_from_below():
    place = {name: number for number, name in enumerate(rows())}
    upward = [
        f"{module} imports {name}"
        for module in MODULES
        for name in imports(module)
        if place[room(name)] <= place[room(module)] and not (room(name) == room(module) and room(name).endswith("/"))
    ]
    assert upward == []


def test_no_module_needs_itself():
    """Raises a CycleError, which names the way around."""
    order = TopologicalSorter({module: imports_at_once(module) for module in MODULES}).static_order()
    assert set(order) >= MODULES.keys()


def test_the_workflow_uses_public_names():
    for module in (name for name in MODULES if room(name) == "workflow/"):
        others = {name for name in imports(module) if not name.startswith("kddp_ext.workflow")}
        assert others <= {"kddp_ext", "kddp_ext.files"}, module
        names = {
            node.attr
            for node in ast.walk(tree(module))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "kddp_ext"
        }
        assert names <= set(kddp_ext.__all__), module


def test_operators_alone_take_addresses():
    takers = {
        room(module)
        for module in MODULES
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Attribute) and node.attr == "data_ptr"
    }
    assert takers == {"ops/"}


def included(folder: str) -> Iterator[tuple[Path, str]]:
    """Each file of a folder of C++ with each of its includes, as it stands there: `<vector>`, `"row_math.h"`."""
    for path in sorted((ROOT / folder).rglob("*.*")):
        for include in re.findall(r"^\s*#\s*include\s+(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            yield path, include


# Of each folder of csrc, which of its files may include: their own folder, the interface, the formulas of a row.
OF_CSRC = {"cpu": r"cpu/|kddp/|row_math\.h$", "cuda": r"cuda/|kddp/|row_math\.h$", "include": r"kddp/", "": r"kddp/"}
SYSTEM = r"<([a-z_]+|cuda_\w+\.h|immintrin\.h|omp\.h|sys/mman\.h)>$"


def test_kernels_know_neither_python_nor_torch():
    for path, include in included("csrc"):
        folder = path.relative_to(ROOT / "csrc").parts[0] if path.parent != ROOT / "csrc" else ""
        if path.name == "platform.cuh" and include == '"emulator.h"':  # in the place of the CUDA runtime
            continue
        own = include.startswith('"') and re.match(OF_CSRC[folder], include.strip('"'))
        assert own or re.match(SYSTEM, include), f"{path}: {include}"


def test_bindings_know_kernels_and_pybind11():
    for path, include in included("python_bindings"):
        name = include.strip('"<>')
        own = include.startswith('"') and any((ROOT / place / name).is_file() for place in (
            "python_bindings", "csrc", "csrc/include",
        ))  # fmt: skip
        system = r"<(pybind11/\w+\.h|cuda_runtime\.h|[a-z_]+)>$"
        assert own or re.match(system, include), f"{path}: {include}"


def test_every_module_says_what_it_is():
    paths = [*MODULES.values(), *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    paths += (ROOT / "tests" / "helpers").glob("*.py")
    silent = [path for path in paths if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert silent == []
