"""Public names, signatures, options and format versions do not change by accident.

`python tests/project/test_public_api.py` writes public_api.txt again; describe the change in CHANGELOG.md.
"""

import contextlib
import dataclasses
import inspect
import io
import os
import re
import textwrap
import typing
from pathlib import Path
from unittest import mock

import kddp_ext
from kddp_ext.pruning import history, state
from kddp_ext.saving.student_file import VERSION as STUDENT_VERSION
from kddp_ext.workflow import cli, config, folder

SNAPSHOT = Path(__file__).parent / "public_api.txt"
STABILITY = Path(__file__).parents[2] / "docs" / "stability.md"
COMMANDS = ("run", "sweep", "shrink", "report", "evaluate", "predict", "export", "info")
LINE = 110


def annotated(name, annotation):
    if annotation is inspect.Parameter.empty:
        return name
    return f"{name}: {annotation if isinstance(annotation, str) else getattr(annotation, '__name__', annotation)}"


def parameter(p):
    star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
    default = "" if p.default is p.empty else f" = {p.default!r}"
    return star + annotated(p.name, p.annotation) + default


def signature(name, function, *, skip_first=False):
    """One line, or a line for each parameter if one would be too long."""
    found = inspect.signature(function)
    parts, keyword_only = [], False
    for p in list(found.parameters.values())[skip_first:]:
        if p.kind is p.KEYWORD_ONLY and not keyword_only:
            parts.append("*")
        keyword_only |= p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        parts.append(parameter(p))
    result = "" if found.return_annotation in (found.empty, "None", None) else f" -> {found.return_annotation}"
    line = f"{name}({', '.join(parts)}){result}"
    if len(line) <= LINE:
        return line
    return "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){result}"])


def members(cls):
    """Public methods and properties of `cls` and its bases in this package, by name."""
    own = [base for base in reversed(cls.__mro__) if base.__module__.startswith("kddp_ext")]
    for name, member in sorted({name: m for base in own for name, m in vars(base).items()}.items()):
        if name.startswith("_"):
            continue
        if isinstance(member, property):
            yield annotated(name, inspect.signature(member.fget).return_annotation)
        elif isinstance(member, classmethod):
            yield signature(name, member.__func__, skip_first=True)
        elif inspect.isfunction(member):
            yield signature(name, member, skip_first=True)


def described(name, value):
    """The text for a public name, with indented members."""
    if inspect.isfunction(value):
        return signature(name, value)
    if not isinstance(value, type) or typing.get_origin(value):  # Python 3.10 takes an alias for a class
        kind = type(value) if type(value).__module__.startswith("kddp_ext") else None
        text = re.sub(r"\bkddp_ext(\.\w+)*\.(?=[A-Z])", "", str(value))  # names are public, their modules are not
        return f"{name} = {text}" if kind is None else indented(f"{name}: {kind.__name__}", members(kind))
    if issubclass(value, Exception):
        return f"class {name}({value.__base__.__name__})"
    if dataclasses.is_dataclass(value):
        return indented(
            f"class {name}", [*(annotated(f.name, f.type) for f in dataclasses.fields(value)), *members(value)]
        )
    if hasattr(value, "_fields"):
        return indented(f"class {name}", value._fields)
    made_by = value.__init__ if "__init__" in vars(value) else value.__new__
    return indented(f"class {signature(name, made_by, skip_first=True)}", members(value))


def indented(head, lines):
    return "\n".join([head, *("    " + line.replace("\n", "\n    ") for line in lines)])


def options(command):
    """The options in the help text of a command."""
    printed, wide = io.StringIO(), mock.patch.dict(os.environ, COLUMNS="200")
    with wide, contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        cli.main([command, "--help"])
    return set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", printed.getvalue())) - {"--help"}


def command_text(command, found):
    return indented(f"kddp {command}", textwrap.wrap(" ".join(sorted(found)), LINE, break_on_hyphens=False))


def public_api():
    """The text of public_api.txt. A sweep has the options of a run and those that are listed."""
    names = [described(name, getattr(kddp_ext, name)) for name in kddp_ext.__all__]
    found = {command: options(command) for command in COMMANDS}
    assert found["run"] <= found["sweep"]
    found["sweep"] -= found["run"]
    return "\n\n".join([*names, *(command_text(command, found[command]) for command in COMMANDS)]) + "\n"


def test_the_public_interface_is_unchanged():
    """After an intended change: python tests/project/test_public_api.py, and a line in CHANGELOG.md."""
    assert public_api() == SNAPSHOT.read_text()


def rows_of(heading):
    """The first columns of the table below a heading of docs/stability.md."""
    section = STABILITY.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line][2:]


def test_the_stability_page_lists_the_public_names():
    listed = [name for row in rows_of("Public names") for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(listed) == sorted(kddp_ext.__all__)


def test_the_stability_page_has_the_format_versions():
    versions = {row[0]: row[1] for row in rows_of("Formats")}
    assert versions == {
        "student file": STUDENT_VERSION,
        "pruning history": str(history.VERSION),
        "a pruner's state": str(state.STATE_VERSION),
        "a run's checkpoint": str(folder.CHECKPOINT_VERSION),
        "a run's config.json": str(config.CONFIG_VERSION),
    }


if __name__ == "__main__":
    SNAPSHOT.write_text(public_api())
