"""Checks the commands of the documentation against the parsers, files and extras that they name. Nothing is started."""

import argparse
import importlib
import importlib.util
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tyro
from docs.blocks import ROOT

# Programs of other projects, whose options are not checked.
FOREIGN = {
    "cd", "clang-format", "cmake", "export", "git", "mkdir", "mkdocs", "mypy", "nvidia-smi", "nvcc", "pre-commit",
    "ruff", "source", "tensorboard", "xargs",
}  # fmt: skip
_ENDS = {"&&", "||", ";", "|"}


def commands_of(code: str) -> list[list[str]]:
    """The commands of a shell block as lists of words, without comments, prompts and variables set for one command."""
    commands: list[list[str]] = []
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if word in _ENDS:
                commands += [command] if command else []
                command = []
            elif command or not re.match(r"\w+=", word):
                command.append(word)
    return commands


class _ParsedError(Exception):
    """Raised after a command line was parsed, before it does its work."""


class Commands:
    """Checks commands with the parsers of the programs that they call, stopped before the work."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch

    def check(self, words: list[str]) -> None:
        """Raises an AssertionError that says what is wrong with the command."""
        program, *arguments = words
        checks: dict[str, Callable[[list[str]], None]] = {
            "kddp": self._kddp,
            "torchrun": self._torchrun,
            "pip": _pip,
            "pytest": _pytest,
        }
        if program in checks:
            checks[program](arguments)
        elif re.match(r"python(3(\.\d+)?)?$", program):
            self._python(arguments)
        else:
            assert program in FOREIGN or (ROOT / program).exists(), f"{program}: no such file or known program"

    def _kddp(self, arguments: list[str]) -> None:
        from kddp_ext.workflow.cli import main

        self._patch.setattr(tyro, "cli", _stops_after(tyro.cli))
        _parse(lambda: main(arguments), f"kddp {shlex.join(arguments)}", help_only="--help" in arguments)

    def _torchrun(self, arguments: list[str]) -> None:
        from torch.distributed.run import get_args_parser

        try:
            parsed = get_args_parser().parse_args(arguments)
        except SystemExit as end:
            raise AssertionError(f"torchrun {shlex.join(arguments)}") from end
        self._python([*(["-m"] if parsed.module else []), parsed.training_script, *parsed.training_script_args])

    def _python(self, arguments: list[str]) -> None:
        if arguments[0] == "-c":
            compile(arguments[1], "<command>", "exec")
            return
        if arguments[0] != "-m":
            assert any((folder / arguments[0]).exists() for folder in (ROOT, ROOT / "examples")), arguments[0]
            return
        name, *rest = arguments[1:]
        if name == "kddp_ext":
            self._kddp(rest)
        elif name == "pytest":
            _pytest(rest)
        elif name.partition(".")[0] == "benchmarks":
            self._benchmarks(name, rest)
        else:
            assert importlib.util.find_spec(name), f"there is no module {name}"

    def _benchmarks(self, name: str, arguments: list[str]) -> None:
        self._patch.syspath_prepend(ROOT)
        found = importlib.util.find_spec(f"{name}.__main__" if (ROOT / name.replace(".", "/")).is_dir() else name)
        assert found, f"there is no module {name}"
        module = importlib.import_module(found.name)
        real = argparse.ArgumentParser.parse_args
        parse = _stops_after(lambda parser: real(parser, arguments))
        self._patch.setattr(argparse.ArgumentParser, "parse_args", lambda parser: parse(parser))
        _parse(module.main, f"python -m {name} {shlex.join(arguments)}")


def _stops_after(parse: Callable[..., Any]) -> Callable[..., Any]:
    def parse_and_stop(*arguments: Any, **options: Any) -> None:
        parse(*arguments, **options)
        raise _ParsedError

    return parse_and_stop


def _parse(main: Callable[[], Any], command: str, help_only: bool = False) -> None:
    """Run a program up to the end of its parser."""
    try:
        code = main()
    except _ParsedError:
        return
    except SystemExit as end:
        code = end.code
    assert help_only, f"{command} should start something"
    assert code in (0, None), f"{command} ends with code {code}"


def _pip(arguments: list[str]) -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    optional = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^([\w-]+) = \[", optional, re.MULTILINE))
    for word in arguments:
        wanted = re.match(r"(?:\.|kddp_ext)\[([\w,-]+)\]", word)
        missing = set(wanted[1].split(",")) - extras if wanted else ()
        assert not missing, f"pyproject.toml has no extra {missing}"


def _pytest(arguments: list[str]) -> None:
    for word in arguments:
        path = Path(word.partition("::")[0])
        assert word.startswith("-") or "/" not in word or (ROOT / path).exists(), f"{path} does not exist"
