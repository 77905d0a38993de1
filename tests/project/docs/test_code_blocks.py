"""Every code block of README.md, CONTRIBUTING.md and docs/ does what it says, as far as it can be tried here.

Python blocks run in the order of their page and share its names, after what setups.py gives them. Of shell blocks every
command is parsed by what it calls, and those that read a finished run do read one.
"""

import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import build_folder
from docs.blocks import Block, all_blocks, blocks_of
from docs.commands import FOREIGN, Commands, commands_of
from docs.setups import SETUPS, compiled_without_code

from kddp_ext.workflow.cli import main

ALL = all_blocks()
BLOCKS = [block for block in ALL if not block.skipped]
PYTHON = [block for block in BLOCKS if block.language == "python"]
# A block without a language is of commands if it begins like one, and else of output or of files.
_PROGRAMS = {"kddp", "pip", "pytest", "python", "torchrun", *FOREIGN}
SHELL = [
    block
    for block in BLOCKS
    if block.language in ("sh", "bash", "console") or (not block.language and block.code.split()[0] in _PROGRAMS)
]
READ_A_RUN = {
    " ".join(command): command
    for block in SHELL
    for command in commands_of(block.code)
    if command[0] == "kddp" and command[1] in ("report", "evaluate", "info") and "runs/digits" in command[2]
}


class Page:
    """The names of a page's Python blocks, and a folder of its own. Each block runs once, those before it first."""

    def __init__(self, page: str, folder: Path, given: dict[str, Any]) -> None:
        self.blocks = [block for block in BLOCKS if block.page == page and (block.language == "python" or block.file)]
        self.folder, self.given = folder, given
        self.names: dict[str, Any] = {}
        self.entered: set[str] = set()

    def run_to(self, wanted: Block) -> None:
        """Run what has not run yet, up to and with `wanted`."""
        while self.blocks and self.blocks[0].line <= wanted.line:
            self._run(self.blocks.pop(0))

    def _run(self, block: Block) -> None:
        if block.needs and not importlib.util.find_spec(block.needs):
            return
        if block.file:
            (self.folder / block.file).write_text(block.code, encoding="utf-8")
            return
        for place in (block.page, f"{block.page}#{block.heading}"):
            if place in SETUPS and place not in self.entered:
                self.entered.add(place)
                self.names.update(SETUPS[place](self.given))
        # So that an error names the page's line.
        exec(compile("\n" * block.line + block.code, block.page, "exec"), self.names)


@pytest.fixture(scope="module")
def page_of(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Callable[[str], Page]]:
    """The page of a name, in the state that the tests before have brought it to."""
    pages: dict[str, Page] = {}
    given = {"kept": build_folder(request.config)}

    def page(name: str) -> Page:
        if name not in pages:
            pages[name] = Page(name, tmp_path_factory.mktemp("page"), given)
        return pages[name]

    yield page
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")
@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found")
@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.place)
def test_python_blocks_run(
    block: Block, page_of: Callable[[str], Page], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if block.needs:
        pytest.importorskip(block.needs, reason=f"{block.needs} is not installed")
    page = page_of(block.page)
    monkeypatch.chdir(page.folder)
    monkeypatch.setattr(torch, "compile", compiled_without_code)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        page.run_to(block)
    finally:
        torch.set_num_threads(threads)
    if block.page == "docs/cuda-without-a-gpu.md":
        assert "out of bounds: reads 4 bytes" in capsys.readouterr().out


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.place)
def test_commands_are_understood(block: Block, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checks = Commands(monkeypatch)
    commands = commands_of(block.code)
    assert commands
    monkeypatch.chdir(tmp_path)
    for command in commands:
        checks.check(command)


def test_a_wrong_command_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = Commands(monkeypatch)
    for line in (
        "kddp run --epochz 3",
        "kddp train",
        "kddp info",
        "torchrun --nproc-per-nodes 2 -m kddp_ext run",
        "torchrun --nproc-per-node 2 -m kddp_ext run --seeds 1",
        "python -m benchmarks --jsonn FILE",
        "python -m benchmarks.nothing",
        "python nothing.py",
        "pip install '.[nothing]'",
        "pytest tests/nothing",
        "no-such-program",
    ):
        (command,) = commands_of(line)
        with pytest.raises(AssertionError):
            checks.check(command)


def test_commands_are_taken_apart() -> None:
    code = "pip install '.[a b]' && CI=1 kddp run  # digits\n\n# nothing\nkddp sweep \\\n    --seeds 0 1\n$ ls | wc\n"
    digits, sweep = ["kddp", "run"], ["kddp", "sweep", "--seeds", "0", "1"]
    assert commands_of(code) == [["pip", "install", ".[a b]"], digits, sweep, ["ls"], ["wc"]]


@pytest.fixture(scope="module")
def run_of_seconds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished runs/digits, smaller and shorter than the real one."""
    folder = tmp_path_factory.mktemp("run")
    threads, before = torch.get_num_threads(), Path.cwd()
    os.chdir(folder)
    try:
        settings = ["--teacher.channels", "4", "8", "--student.channels", "2", "4", "--student.width", "16"]
        epochs = ["--teacher.epochs", "1", "--student.epochs", "1", "--precision", "float32", "--device", "cpu"]
        assert main(["run", *settings, *epochs]) == 0
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
    return folder


@pytest.mark.parametrize("command", READ_A_RUN.values(), ids=READ_A_RUN.keys())
def test_commands_that_read_a_run(
    command: list[str], run_of_seconds: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run_of_seconds)
    assert main(command[1:]) == 0
    assert "kddp" in capsys.readouterr().out


def test_data_blocks_are_well_formed() -> None:
    parsers = {"json": json.loads}
    if importlib.util.find_spec("tomllib"):  # from Python 3.11 on
        parsers["toml"] = importlib.import_module("tomllib").loads
    for block in BLOCKS:
        if block.language in parsers:
            parsers[block.language](block.code)
        if block.language == "cpp":
            assert block.file or block.code.count("{") == block.code.count("}"), block.place


def test_languages_are_known_and_every_block_is_checked() -> None:
    for block in BLOCKS:
        assert block.language in ("", "python", "sh", "bash", "console", "cpp", "json", "toml", "yaml", "text"), block
    assert len(PYTHON) > 20
    assert len(SHELL) > 15
    assert READ_A_RUN


def test_few_are_skipped_and_none_without_a_reason() -> None:
    assert [block.fault for block in ALL if block.fault] == []
    skipped = [block.place for block in ALL if block.skipped]
    assert len(skipped) <= len(ALL) / 10, skipped


@pytest.mark.parametrize(
    ("directive", "fault"),
    [
        ("skip, needs a GPU", ""),
        ("needs torch", ""),
        ("file scale.cu", ""),
        ("skip", "page.md:2: skipped without a reason of some words"),
        ("skip, because", "page.md:2: skipped without a reason of some words"),
        ("skpi, needs a GPU", "page.md:2: 'skpi, needs a GPU' is none of: skip, REASON; needs MODULE; file NAME"),
    ],
)
def test_faults_of_comments_are_noticed(directive: str, fault: str) -> None:
    (block,) = blocks_of(f"<!-- block: {directive} -->\n```python\n```\n", "page.md")
    assert block.fault == fault


def test_blocks_are_found() -> None:
    text = (
        "# Page\n\n## One\n\n```python\na = 1\n```\n\n<!-- block: skip, needs a GPU -->\n```python\n~~~\n```\n"
        "## Two\n<!-- block: needs torch -->\n\n~~~sh\nkddp run\n```\n~~~\n"
        "<!-- block: skip -->\ntext\n````\n```\n````\n"
    )
    first, second, third, fourth = blocks_of(text, "page.md")
    assert (first.line, first.heading, first.code, first.directive) == (5, "One", "a = 1\n", "")
    assert (second.skipped, second.code) == (True, "~~~\n")
    assert (third.heading, third.language, third.needs, third.code) == ("Two", "sh", "torch", "kddp run\n```\n")
    assert (fourth.code, fourth.directive) == ("```\n", "")
    with pytest.raises(AssertionError, match=re.escape("page.md:1: this block does not end")):
        blocks_of("```\n", "page.md")
