"""Every import and include follows the table of layers in docs/architecture.md."""

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


def layers() -> list[str]:
    """The names in the table, from top to bottom and from left to right."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = re.search(r"```\w*\nkddp_ext/\n((?:  .*\n)+)", text)
    assert table is not None
    return [name for line in table[1].splitlines() for name in re.split(r"\s{2,}", line.strip())[0].split(", ")]


def layer(module: str) -> str:
    """The name of a module, or of its folder, in the table."""
    if module in NATIVE:
        return module.rpartition(".")[2]
    parts = MODULES[module].relative_to(PACKAGE).parts
    return parts[0] if len(parts) == 1 else f"{parts[0]}/"


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imported(node: ast.AST) -> Iterator[str]:
    """The modules of this package that an import statement names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "kddp_ext")
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        if node.module is not None and node.module.partition(".")[0] == "kddp_ext":
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES or submodule in NATIVE else node.module


def imports(module: str) -> set[str]:
    """All modules of this package that a module imports, also inside functions."""
    return {name for node in ast.walk(tree(module)) for name in imported(node)}


def test_the_table_names_every_file():
    names = layers()
    assert len(names) == len(set(names))
    assert set(names) == {layer(module) for module in [*MODULES, *NATIVE]}


def test_a_file_imports_only_from_lower_layers():
    place = {name: number for number, name in enumerate(layers())}
    upward = [
        f"{module} imports {name}"
        for module in MODULES
        for name in imports(module)
        if place[layer(name)] <= place[layer(module)]
        and not (layer(name) == layer(module) and layer(name).endswith("/"))
    ]
    assert upward == []


def test_imports_have_no_cycle():
    """At the top level of modules, where imports run first. Raises a CycleError that names the cycle."""
    at_import = {module: {name for node in tree(module).body for name in imported(node)} for module in MODULES}
    order = TopologicalSorter(at_import).static_order()
    assert set(order) >= MODULES.keys()


def test_the_workflow_uses_only_public_names():
    for module in (name for name in MODULES if layer(name) == "workflow/"):
        others = {name for name in imports(module) if not name.startswith("kddp_ext.workflow")}
        assert others <= {"kddp_ext", "kddp_ext.files"}, module
        names = {
            node.attr
            for node in ast.walk(tree(module))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "kddp_ext"
        }
        assert names <= set(kddp_ext.__all__), module


def test_only_ops_takes_addresses():
    takers = {
        layer(module)
        for module in MODULES
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Attribute) and node.attr == "data_ptr"
    }
    assert takers == {"ops/"}


def included(folder: str) -> Iterator[tuple[Path, str]]:
    """Each file of a folder with each of its includes, such as `<vector>` or `"row_math.h"`."""
    for path in sorted((ROOT / folder).rglob("*.*")):
        for include in re.findall(r"^\s*#\s*include\s+(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            yield path, include


# For each folder of csrc, what its files may include.
SHARED = r"kddp/|(row_math|workspace)\.h$"
OF_CSRC = {"cpu": rf"cpu/|{SHARED}", "cuda": rf"cuda/|{SHARED}", "include": r"kddp/", "": r"kddp/"}
SYSTEM = r"<([a-z_]+|cuda_\w+\.h|immintrin\.h|omp\.h|sys/mman\.h)>$"


def test_kernels_include_neither_python_nor_torch():
    for path, include in included("csrc"):
        folder = path.relative_to(ROOT / "csrc").parts[0] if path.parent != ROOT / "csrc" else ""
        if path.name == "platform.cuh" and include == '"emulator.h"':  # instead of the CUDA runtime
            continue
        own = include.startswith('"') and re.match(OF_CSRC[folder], include.strip('"'))
        assert own or re.match(SYSTEM, include), f"{path}: {include}"


def test_bindings_include_only_kernels_and_pybind11():
    for path, include in included("python_bindings"):
        name = include.strip('"<>')
        own = include.startswith('"') and any((ROOT / place / name).is_file() for place in (
            "python_bindings", "csrc", "csrc/include",
        ))  # fmt: skip
        system = r"<(pybind11/\w+\.h|cuda_runtime\.h|[a-z_]+)>$"
        assert own or re.match(system, include), f"{path}: {include}"


def test_every_module_has_a_docstring():
    paths = [*MODULES.values(), *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    paths += (ROOT / "tests" / "helpers").glob("*.py")
    silent = [path for path in paths if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert silent == []


def test_every_entry_of_the_quick_tests_matches_a_file(request):
    conftest = request.config.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    assert [pattern for pattern in conftest.QUICK if not list((ROOT / "tests").glob(pattern))] == []
