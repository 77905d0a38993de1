"""A table of results, for the terminal and for Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import rich.table

from benchmarks.timing import Quartiles
from kddp_ext.files import write_text


class Table(NamedTuple):
    """Rows of text. The first column is left-aligned, the others right-aligned."""

    name: str
    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""

    def for_terminal(self) -> rich.table.Table:
        """The table for rich."""
        table = rich.table.Table(title=self.title, title_justify="left", caption=self.note, caption_justify="left")
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def to_markdown(self) -> str:
        """Title, rows and note, without a newline at the end."""
        rule = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = [f"| {' | '.join(cells)} |" for cells in (self.columns, rule, *self.rows)]
        note = [f"\n{self.note}"] if self.note else []
        return "\n".join([f"**{self.title}**\n", *lines, *note])


def write_markdown(path: str, head: str | None, tables: Sequence[Table], head_name: str = "machine") -> None:
    """Write the tables to a file. If the file exists and marks their places, only these places change.

    A place is everything between the lines `<!-- table NAME -->` and `<!-- end -->`; the head has a name, too.
    """
    file = Path(path)
    parts = {} if head is None else {head_name: head}
    parts |= {table.name: table.to_markdown() for table in tables}
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    if "<!-- table " not in text:
        text = "".join(f"<!-- table {name} -->\n<!-- end -->\n\n" for name in parts).rstrip("\n") + "\n"
    for name, part in parts.items():
        place = re.compile(rf"(<!-- table {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = place.sub(lambda found, part=part: f"{found[1]}{part}\n{found[2]}", text)  # type: ignore[misc]
    write_text(path, text)


def times(ratio: Quartiles) -> str:
    """A ratio with its quartiles."""
    return f"{_short(ratio.median)}x ({_short(ratio.low)}–{_short(ratio.high)})"


def microseconds(seconds: float) -> str:
    """A time in µs."""
    return f"{seconds * 1e6:,.0f}"


def milliseconds(seconds: float) -> str:
    """A time in ms."""
    return f"{seconds * 1e3:,.1f}" if seconds < 0.1 else f"{seconds * 1e3:,.0f}"


def kibibytes(size: float) -> str:
    """A number of bytes in KiB."""
    return f"{size / 2**10:,.1f}" if size < 10 * 2**10 else f"{size / 2**10:,.0f}"


def _short(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 2 else f"{ratio:.1f}"
