"""Checks the commands of the documentation against the parsers, files and extras that they name. Nothing is started."""

import argparse
import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Callable
from importlib.metadata import metadata
from typing import Any

import pytest
import tyro
from docs.blocks import ROOT
from torch.distributed.run import get_args_parser

from kddp_ext.workflow.cli import main as kddp

# Programs of other projects, whose options are not checked.
FOREIGN = {
    "cd", "clang-format", "cmake", "export", "git", "ls", "mkdir", "mkdocs", "mypy", "nvidia-smi", "nvcc", "pre-commit",
    "ruff", "source", "tensorboard", "xargs",
}  # fmt: skip
# Programs that the quick start shows.
SHOWN = {"draw.py", "classify.py"}
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


def check(words: list[str], patch: pytest.MonkeyPatch) -> None:
    """Parse a command with the program that it calls; raises an AssertionError that says what is wrong with it."""
    program, *arguments = words
    if program == "kddp":
        _parse(lambda: kddp(arguments), words, tyro, "cli", patch)
    elif program == "torchrun":
        try:
            parsed = get_args_parser().parse_args(arguments)
        except SystemExit as end:
            raise AssertionError(shlex.join(words)) from end
        options = ["-m"] if parsed.module else []
        check(["python", *options, parsed.training_script, *parsed.training_script_args], patch)
    elif program == "pip":
        named = {extra for word in arguments for extra in re.findall(r"[\w-]+", word.partition("[")[2])}
        assert named <= set(metadata("kddp_ext").get_all("Provides-Extra") or ()), f"an extra of {named} does not exist"
    elif program == "pytest":
        for path in (word.partition("::")[0] for word in arguments if "/" in word and not word.startswith("-")):
            assert (ROOT / path).exists(), f"{path} does not exist"
    elif re.match(r"python(3(\.\d+)?)?$", program):
        _check_python(arguments, patch)
    else:
        assert program in FOREIGN or (ROOT / program).exists(), f"{program}: no such file or known program"


def _check_python(arguments: list[str], patch: pytest.MonkeyPatch) -> None:
    if arguments[0] == "-c":
        compile(arguments[1], "<command>", "exec")
        return
    if arguments[0] in SHOWN:
        return
    if arguments[0] != "-m":
        assert any((folder / arguments[0]).exists() for folder in (ROOT, ROOT / "examples")), arguments[0]
        return
    name, *rest = arguments[1:]
    if name in ("kddp_ext", "pytest"):
        check(["kddp" if name == "kddp_ext" else name, *rest], patch)
        return
    patch.syspath_prepend(ROOT)
    is_folder = (ROOT / name.replace(".", "/")).is_dir()
    assert importlib.util.find_spec(name), f"there is no module {name}"
    if name.partition(".")[0] == "benchmarks":
        patch.setattr(sys, "argv", [name, *rest])
        module = importlib.import_module(f"{name}.__main__" if is_folder else name)
        _parse(module.main, arguments, argparse.ArgumentParser, "parse_args", patch)


class _ParsedError(Exception):
    """Raised after a command line was parsed, before it does its work."""


def _parse(main: Callable[[], Any], words: list[str], owner: Any, parser: str, patch: pytest.MonkeyPatch) -> None:
    """Run a program until the function `parser` of `owner` returns."""
    real = getattr(owner, parser)

    def parse_and_stop(*arguments: Any, **options: Any) -> None:
        real(*arguments, **options)
        raise _ParsedError

    patch.setattr(owner, parser, parse_and_stop)
    try:
        code = main()
    except _ParsedError:
        return
    except SystemExit as end:
        code = end.code
    assert "--help" in words, f"{shlex.join(words)} should start something"
    assert code in (0, None), f"{shlex.join(words)} ends with code {code}"
