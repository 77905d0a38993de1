"""Command lines of the pages, held against what they call: parsers, files, extras; nothing is started."""

import argparse
import importlib
import importlib.util
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from docs.blocks import ROOT

# Programs of others, whose options are theirs to change.
FOREIGN = {
    "cd", "clang-format", "cmake", "export", "git", "mkdir", "mkdocs", "mypy", "ruff", "source", "tensorboard", "xargs",
}  # fmt: skip
_PYTHON = re.compile(r"python(3(\.\d+)?)?$")
_ENDS = {"&&", "||", ";", "|"}


def commands_of(code: str) -> list[list[str]]:
    """The commands of a shell block as words, without comments, prompts and variables set for one command."""
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


class _StopError(Exception):
    """Raised when a command is parsed, in the place of its work."""


class Commands:
    """Checks commands; `kddp` commands are parsed by the real command line, whose work is caught."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from kddp_ext.workflow import inspect, report, runs

        self.caught: list[str] = []
        for module, name in (
            (runs, "run_sweep"), (report, "rebuild_report"), (inspect, "evaluate"), (inspect, "describe"),
        ):  # fmt: skip
            patch.setattr(module, name, lambda *_, name=name, **__: self.caught.append(name))
        patch.setattr("torch.set_num_threads", lambda _: None)
        patch.setattr("kddp_ext.workflow.runtime.prepare_process", lambda: None)
        self._patch = patch

    def check(self, words: list[str]) -> None:
        """An AssertionError that says what of a command is wrong."""
        program, *arguments = words
        checks: dict[str, Callable[[list[str]], None]] = {
            "kddp": self._kddp,
            "torchrun": self._torchrun,
            "pip": _pip,
            "pytest": _paths,
        }
        if program in checks:
            checks[program](arguments)
        elif _PYTHON.match(program):
            self._python(arguments)
        elif program not in FOREIGN:
            path = ROOT / program
            assert path.exists(), f"{program} is no file here, and no program that tests/project/docs/commands.py knows"

    def _kddp(self, arguments: list[str]) -> None:
        from kddp_ext.workflow.cli import main

        before = len(self.caught)
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
        assert code == 0, f"kddp {shlex.join(arguments)} ends with code {code}"
        started = len(self.caught) - before
        assert started == (not {"--help", "--version"} & set(arguments)), "it should start one thing"

    def _torchrun(self, arguments: list[str]) -> None:
        from torch.distributed.run import get_args_parser

        parsed = _parsed(lambda: get_args_parser().parse_args(arguments), f"torchrun {shlex.join(arguments)}")
        self._python([*(["-m"] if parsed.module else []), parsed.training_script, *parsed.training_script_args])

    def _python(self, arguments: list[str]) -> None:
        if arguments[0] == "-c":
            compile(arguments[1], "<command>", "exec")
            return
        if arguments[0] != "-m":
            script = arguments[0]
            assert (ROOT / script).exists() or (ROOT / "examples" / script).exists(), f"{script} does not exist"
            return
        name, *rest = arguments[1:]
        if name == "kddp_ext":
            self._kddp(rest)
        elif name == "pytest":
            _paths(rest)
        elif name.partition(".")[0] == "benchmarks":
            self._benchmarks(name, rest)
        else:
            assert importlib.util.find_spec(name), f"there is no module {name}"

    def _benchmarks(self, name: str, arguments: list[str]) -> None:
        """By the module's own parser, and no further."""
        self._patch.syspath_prepend(ROOT)
        found = importlib.util.find_spec(f"{name}.__main__" if (ROOT / name.replace(".", "/")).is_dir() else name)
        assert found, f"there is no module {name}"
        module = importlib.import_module(found.name)
        parse_args = argparse.ArgumentParser.parse_args

        def parse_and_stop(parser: argparse.ArgumentParser, *_: Any) -> None:
            parse_args(parser, arguments)
            raise _StopError

        self._patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        with pytest.raises(_StopError):
            _parsed(module.main, f"python -m {name} {shlex.join(arguments)}")


def _parsed(parse: Callable[[], Any], command: str) -> Any:
    try:
        return parse()
    except SystemExit as end:
        raise AssertionError(f"{command} ends with code {end.code}") from end


def _pip(arguments: list[str]) -> None:
    """Each extra of this package is one that pyproject.toml has."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    optional = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^([\w-]+) = \[", optional, re.MULTILINE))
    assert {"test", "dev"} <= extras
    for word in arguments:
        wanted = re.match(r"(?:\.|kddp_ext)\[([\w,-]+)\]", word)
        missing = set(wanted[1].split(",")) - extras if wanted else ()
        assert not missing, f"pyproject.toml has no extra {missing}"


def _paths(arguments: list[str]) -> None:
    for word in arguments:
        if not word.startswith("-") and "/" in word:
            path = Path(word.partition("::")[0])
            assert (ROOT / path).exists(), f"{path} does not exist"
