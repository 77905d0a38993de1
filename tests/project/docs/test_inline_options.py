"""Options of `kddp` that a page names in passing, between backticks, are ones that the command has."""

import re

import pytest
from docs.blocks import pages

from kddp_ext.workflow.cli import main

# Where every option is of `kddp` or one of these; on other pages those with a point in them are, as --student.width.
ALL_OF_THEM = ("workflow.md", "quickstart.md")
OF_OTHERS = {"--nnodes", "--logdir"}  # torchrun and tensorboard


def test_options_exist(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    options = set(OF_OTHERS)
    for command in ("run", "sweep", "report", "evaluate", "info"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        options.update(re.findall(r"--[a-z0-9.-]*[a-z0-9]", capsys.readouterr().out))
    assert {"--student.width", "--l1-weights", "--data-dir", "--resume"} <= options
    named = {
        (page.name, option)
        for page in pages()
        for code in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
        for option in re.findall(r"(?<![\w-])--[a-z0-9.-]*[a-z0-9]", code)
        if page.name in ALL_OF_THEM or "." in option
    }
    assert len(named) > 20
    assert {(page, option) for page, option in named if option not in options} == set()
