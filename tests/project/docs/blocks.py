"""The code blocks of the documentation's pages, and what a page says of them in comments.

`<!-- block: skip, REASON -->` before a block leaves it out, `<!-- block: needs MODULE -->` does where that module is
not installed, and `<!-- block: file NAME -->` writes it into a file for the blocks after it.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
_FENCE = re.compile(r"^ {0,3}(```+|~~~+) *(\S*)")
_HEADING = re.compile(r"^#{2} (.+)")
_DIRECTIVE = re.compile(r"^<!-- block: *(.*?) *-->$")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, under which heading, in what language, and the comment before it."""

    page: str
    line: int
    heading: str
    language: str
    code: str
    directive: str

    @property
    def place(self) -> str:
        """As an editor opens it."""
        return f"{self.page}:{self.line}"

    @property
    def skipped(self) -> bool:
        return self.directive.split(",")[0] == "skip"

    @property
    def fault(self) -> str:
        """What is wrong with the comment before it, or nothing."""
        reason = self.directive.partition(",")[2].split()
        if self.skipped and len(reason) < 2:
            return f"{self.place}: skipped without a reason of some words"
        if self.directive and not (self.skipped or self.needs or self.file):
            return f"{self.place}: {self.directive!r} is none of: skip, REASON; needs MODULE; file NAME"
        return ""

    @property
    def needs(self) -> str:
        """The module without which it is left out, or nothing."""
        return self.directive.removeprefix("needs ") if self.directive.startswith("needs ") else ""

    @property
    def file(self) -> str:
        """The file that it is the content of, or nothing."""
        return self.directive.removeprefix("file ") if self.directive.startswith("file ") else ""


def pages() -> list[Path]:
    """Every page whose blocks are checked."""
    named = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
    return [page for page in named if page.exists()] + sorted((ROOT / "docs").rglob("*.md"))


def blocks_of(text: str, page: str) -> list[Block]:
    """The blocks of a page, in their order."""
    found: list[Block] = []
    heading = directive = ""
    fence: re.Match[str] | None = None
    start, code = 0, []
    for number, line in enumerate(text.splitlines(), 1):
        mark = _FENCE.match(line)
        if fence is not None:
            if mark and mark[1].startswith(fence[1]) and not mark[2]:
                found.append(Block(page, start, heading, fence[2], "\n".join(code) + "\n", directive))
                fence, directive = None, ""
            else:
                code.append(line)
        elif mark:
            fence, start, code = mark, number, []
        elif line.strip():
            said = _DIRECTIVE.match(line)
            directive = said[1] if said else ""
            heading = named[1] if (named := _HEADING.match(line)) else heading
    assert fence is None, f"{page}:{start}: this block does not end"
    return found


def all_blocks() -> list[Block]:
    """The blocks of all pages."""
    return [
        block
        for page in pages()
        for block in blocks_of(page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix())
    ]
