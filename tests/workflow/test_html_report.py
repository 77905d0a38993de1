"""report.html: its figures are those of the run, nothing in it comes from elsewhere, and no name becomes markup."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from kddp_ext.workflow.data import ImageData
from kddp_ext.workflow.folder import RunFolder
from kddp_ext.workflow.jobs import STAGES
from kddp_ext.workflow.measure import accuracy, confusion, nonzero_counts, share_correct
from kddp_ext.workflow.report import class_table, rebuild_report
from kddp_ext.workflow.runtime import Runtime

Columns = dict[str, list[Any]]


def drawn_columns(page: str) -> dict[str, list[Columns]]:
    """The data of each plot by its title, a dictionary of columns for each glyph."""
    found: dict[str, list[Columns]] = {}
    for text in re.findall(r"Bokeh\.embed\.embed_item\((.*)\)</script>", page):
        (plot,) = json.loads(text)["doc"]["roots"]
        attributes = plot["attributes"]
        data = [each["attributes"].get("data_source", {}) for each in attributes["renderers"]]
        # A source that two glyphs share is spelled out in the first.
        columns = [dict(each["attributes"]["data"]["entries"]) for each in data if "attributes" in each]
        found[attributes["title"]["attributes"]["text"]] = columns
    return found


def test_the_curves_have_the_figures_of_the_run(finished_run: Path) -> None:
    folder = RunFolder(finished_run)
    plots = drawn_columns(folder.page.read_text())
    results = {stage: folder.read_result(stage) or {} for stage in STAGES}
    sizes = {column["name"][0]: column for column in plots["Test accuracy (%) against size"]}
    assert sizes.keys() == results.keys()
    for stage, column in sizes.items():
        assert column["x"] == [results[stage]["parameters"]]
        assert column["y"] == [100 * results[stage]["test_accuracy"]]
    epochs = folder.read_epochs("kddp")
    assert plots["Neurons of each pruned layer"] == [
        {"x": [1, 2, 3, 4], "y": [epoch["widths"]["hidden"] for epoch in epochs], "name": ["kddp: hidden"] * 4}
    ]
    assert epochs[-1]["widths"] == {"hidden": results["kddp"]["width"]}
    (penalty,) = plots["L1 of the activations, before its weight"]
    assert penalty["y"] == [epoch["l1"] for epoch in epochs]
    assert [column["name"][0] for column in plots["Loss"]] == list(STAGES)


def test_the_accuracies_of_the_classes_add_up(finished_run: Path) -> None:
    folder = RunFolder(finished_run)
    rows = re.findall(r"<tr><td>(.*)</td></tr>", folder.page.read_text())[-10:]
    cells = [row.split("</td><td>") for row in rows]
    images = [int(row[1]) for row in cells]
    assert sum(images) == 597
    for column, stage in enumerate(STAGES, 2):
        correct = sum(count * float(row[column]) / 100 for count, row in zip(images, cells, strict=True))
        assert correct / 597 == pytest.approx((folder.read_result(stage) or {})["test_accuracy"], abs=5e-4)


def test_a_page_holds_everything_and_no_name_becomes_markup(finished_run: Path, quiet: Console) -> None:
    folder = RunFolder(finished_run)
    name = "</script><script>alert(1)</script>"
    folder.data.write_text(json.dumps({**dataclasses.asdict(folder.read_info()), "class_names": [name, *"123456789"]}))
    rebuild_report(finished_run, quiet)
    page = folder.page.read_text()
    assert name not in page
    assert name in unescape(page)
    assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=", page)
    assert len(page) < 2_000_000


def test_confusion_counts_what_is_taken_for_what(image_data: Callable[..., ImageData]) -> None:
    data = image_data()  # seven test images, with the labels 0 to 6

    class Constant(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.eye(10)[[2]].expand(len(images), 10)

    counts = confusion(Constant(), data, data.test, Runtime("cpu", "float32"))
    assert nonzero_counts(counts) == [{"2": 1}] * 7 + [{}] * 3
    assert share_correct(counts) == accuracy(Constant(), data, data.test, Runtime("cpu", "float32")) == 1 / 7


def test_the_table_of_classes_adds_seeds_and_names_the_most_frequent_errors() -> None:
    seeds = [[{"0": 3, "1": 1}, {"1": 4}, {}], [{"0": 1, "1": 1, "2": 2}, {"0": 4}, {}]]
    table = class_table(["cat", "dog", "owl"], {"kd": [seeds[0]], "kddp": seeds})
    assert list(table.columns) == ["class", "test images", "kd", "kddp", "kddp: taken for"]
    assert table.rows == [
        ["cat", "4", "75.0", "50.0", "dog (25.0), owl (25.0)"],
        ["dog", "4", "100.0", "50.0", "cat (50.0)"],
        ["owl", "0", "", "", ""],
    ]
