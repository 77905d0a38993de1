"""The code blocks of the documentation, with the comments that control their tests.

`<!-- block: skip, REASON -->` before a block leaves it out, `<!-- block: needs MODULE -->` leaves it out if the module
is not installed, and `<!-- block: file NAME -->` writes it to a file for the blocks after it.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
_FENCE = re.compile(r"^ {0,3}(```+|~~~+) *(\S*)")
_HEADING = re.compile(r"^#{2} (.+)")
_DIRECTIVE = re.compile(r"^<!-- block: *(.*?) *-->$")
_VALID = re.compile(r"skip, \S+ \S.*|needs \w+|file \S+|")


@dataclass(frozen=True)
class Block:
    """A fenced block: its page and line, the heading above it, its language, and the comment before it."""

    page: str
    line: int
    heading: str
    language: str
    code: str
    directive: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def skipped(self) -> bool:
        return self.directive.startswith("skip")

    @property
    def valid(self) -> bool:
        """Whether the comment is one of the three forms; a skipped block has a reason of at least two words."""
        return _VALID.fullmatch(self.directive) is not None

    @property
    def needs(self) -> str:
        """The module that the block needs, or an empty string."""
        return self.directive.removeprefix("needs ") if self.directive.startswith("needs ") else ""

    @property
    def file(self) -> str:
        """The file that the block is the content of, or an empty string."""
        return self.directive.removeprefix("file ") if self.directive.startswith("file ") else ""


def pages() -> list[Path]:
    """All pages whose blocks and links are tested."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_of(text: str, page: str) -> list[Block]:
    """The blocks of a page, in order."""
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
            comment = _DIRECTIVE.match(line)
            directive = comment[1] if comment else ""
            heading = match[1] if (match := _HEADING.match(line)) else heading
    assert fence is None, f"{page}:{start}: this block does not end"
    return found


def all_blocks() -> list[Block]:
    return [
        block
        for page in pages()
        for block in blocks_of(page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix())
    ]
