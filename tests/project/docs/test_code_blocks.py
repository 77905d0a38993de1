"""Every code block of README.md, CONTRIBUTING.md and docs/ works.

Python blocks run in the order of their page and share its names, after those of setups.py. Commands of shell blocks are
parsed by the programs that they call. `kddp` commands that read a run read one.
"""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from docs.blocks import ROOT, Block, blocks_of, pages
from docs.commands import FOREIGN, check, commands_of
from docs.setups import SETUPS, Names, compiled_without_code

from kddp_ext.workflow.cli import main

BLOCKS = [block for page in pages() for block in blocks_of(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
# A block without a language has commands if it starts with a program.
_PROGRAMS = {"kddp", "pip", "pytest", "python", "torchrun", *FOREIGN}
SHELL = [
    block for block in BLOCKS if block.language == "sh" or (not block.language and block.code.split()[0] in _PROGRAMS)
]
READ_A_RUN = {
    " ".join(command): command
    for block in SHELL
    for command in commands_of(block.code)
    if command[0] == "kddp" and command[1] in ("report", "evaluate", "info") and "runs/digits" in command[2]
}


@pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")
@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found")
@pytest.mark.parametrize("page", sorted({block.page for block in PYTHON}))
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", compiled_without_code)
    names: Names = {}
    prepared: set[str] = set()
    missing: set[str] = set()
    for block in (block for block in PYTHON if block.page == page):
        if block.needs and not importlib.util.find_spec(block.needs):
            missing.add(block.needs)
            continue
        for place in (page, f"{page}#{block.heading}"):
            if place in SETUPS and place not in prepared:
                prepared.add(place)
                names.update(SETUPS[place]())
        # The empty lines make an error name the line of the page.
        exec(compile("\n" * block.line + block.code, page, "exec"), names)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if missing:
        pytest.skip(f"not installed, so their blocks did not run: {', '.join(missing)}")


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.place)
def test_commands_exist(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = commands_of(block.code)
    assert commands
    for command in commands:
        with monkeypatch.context() as patch:
            check(command, patch)


@pytest.mark.parametrize(
    "line",
    [
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
    ],
)
def test_a_wrong_command_fails(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = commands_of(line)
    with pytest.raises(AssertionError):
        check(command, monkeypatch)


def test_shell_blocks_are_split_into_commands() -> None:
    code = "pip install '.[a b]' && CI=1 kddp run  # digits\n\n# nothing\nkddp sweep \\\n    --seeds 0 1\n$ ls | wc\n"
    digits, sweep = ["kddp", "run"], ["kddp", "sweep", "--seeds", "0", "1"]
    assert commands_of(code) == [["pip", "install", ".[a b]"], digits, sweep, ["ls"], ["wc"]]


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished runs/digits of small networks."""
    folder = tmp_path_factory.mktemp("run")
    settings = ["--teacher.channels", "4", "8", "--student.channels", "2", "4", "--student.width", "16"]
    epochs = ["--teacher.epochs", "1", "--student.epochs", "1", "--precision", "float32", "--device", "cpu"]
    threads = torch.get_num_threads()
    assert main(["run", "--runs-dir", str(folder / "runs"), *settings, *epochs]) == 0
    torch.set_num_threads(threads)
    return folder


@pytest.mark.parametrize("command", READ_A_RUN.values(), ids=READ_A_RUN.keys())
def test_commands_read_a_run(
    command: list[str], short_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(short_run)
    assert main(command[1:]) == 0
    assert "kddp" in capsys.readouterr().out


def test_options_named_in_the_text_exist(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Between backticks: on two pages all options are of `kddp`, on the others those with a dot, as --student.width."""
    monkeypatch.setenv("COLUMNS", "200")
    options = {"--nnodes", "--logdir"}  # of torchrun and tensorboard
    for command in ("run", "sweep", "report", "evaluate", "predict", "export", "info"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        options.update(re.findall(r"--[a-z0-9.-]*[a-z0-9]", capsys.readouterr().out))
    named = {
        (page.name, option)
        for page in pages()
        for code in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
        for option in re.findall(r"(?<![\w-])--[a-z0-9.-]*[a-z0-9]", code)
        if page.name in ("workflow.md", "quickstart.md") or "." in option
    }
    assert len(named) > 20
    assert {(page, option) for page, option in named if option not in options} == set()


def test_the_gate_runs_the_readmes_commands() -> None:
    gate = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    block = next(block for block in BLOCKS if block.page == "README.md" and block.code.startswith("pip"))
    for line in block.code.splitlines():
        install, command = line.partition("#")[0].strip().split(" && ")
        assert command in gate
        assert install.removeprefix("pip install ").strip("'") in gate


def test_every_block_is_checked() -> None:
    assert [block.place for block in BLOCKS if block.language not in ("", "python", "sh", "text")] == []
    assert len(PYTHON) > 20
    assert len(SHELL) > 15
    assert READ_A_RUN
