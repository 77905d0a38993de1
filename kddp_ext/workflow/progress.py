"""Progress bars on a terminal; elsewhere a line now and then."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Display

# Between two lines of one bar where there is no terminal.
_LINE_SECONDS = 10.0


class Bar:
    """One running task.

    Args:
        display: where the bar is drawn, or None to write lines.
        console: where the lines go.
        label: what is being done.
        total: how many images it takes.
        done: how many of them an earlier run has done.
    """

    def __init__(self, display: Display | None, console: Console, label: str, total: int, done: int) -> None:
        self._console = console
        self._display = display
        self._label = label
        self._total = total
        self._done = self._done_before = done
        self._note = ""
        self._started = self._last_line = time.monotonic()
        self._task: TaskID | None = None
        if display is not None:
            self._task = display.add_task(label, total=total, completed=done, note="", rate="")

    def advance(self, images: int) -> None:
        """Say that another `images` are done."""
        self._done += images
        if self._display is not None and self._task is not None:
            self._display.update(self._task, completed=self._done, rate=self._rate())
        elif time.monotonic() - self._last_line > _LINE_SECONDS:
            self._last_line = time.monotonic()
            share = 100 * self._done / max(self._total, 1)
            self._console.print(
                f"{self._label}: {share:.0f}% {self._note} {self._rate()}", highlight=False, soft_wrap=True
            )

    def note(self, text: str) -> None:
        """Show `text` beside the bar from now on."""
        self._note = text
        if self._display is not None and self._task is not None:
            self._display.update(self._task, note=text)

    def close(self) -> None:
        """Take the bar away."""
        if self._display is not None and self._task is not None:
            self._display.remove_task(self._task)

    def _rate(self) -> str:
        seconds = time.monotonic() - self._started
        return f"{(self._done - self._done_before) / max(seconds, 1e-9):,.0f} images/s"


class Progress:
    """Hands out bars; several may run at once.

    Args:
        console: a terminal gets bars, anything else gets lines.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._display: Display | None = None
        self._open = 0

    @contextmanager
    def bar(self, label: str, total: int, done: int = 0) -> Iterator[Bar]:
        """A bar for as long as the context lasts.

        Args:
            label: what is being done.
            total: how many images it takes.
            done: how many of them an earlier run has done.
        """
        if self._display is None and self.console.is_terminal:
            self._display = _display(self.console)
            self._display.start()
        bar = Bar(self._display, self.console, label, total, done)
        self._open += 1
        try:
            yield bar
        finally:
            bar.close()
            self._open -= 1
            if self._open == 0 and self._display is not None:
                self._display.stop()
                self._display = None

    def line(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text, highlight=False, soft_wrap=True)


def _display(console: Console) -> Display:
    return Display(
        TextColumn("{task.description:<8}"),
        BarColumn(bar_width=12),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[note]}"),
        TextColumn("[dim]{task.fields[rate]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        refresh_per_second=4,
        transient=True,
    )
