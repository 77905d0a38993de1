"""The code blocks of the documentation. `<!-- block: needs MODULE -->` before a block says what must be installed."""

import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Block:
    """A fenced block: its page and line, the heading above it, its language, and the module that it needs or ""."""

    page: str
    line: int
    heading: str
    language: str
    code: str
    needs: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """All pages whose blocks and links are tested."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    found: list[Block] = []
    heading = needs = ""
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    for token, after in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "heading_open" and token.tag == "h2" and after:
            heading = after.content
        elif token.type == "html_block" and "block:" in token.content:
            comment = re.fullmatch(r"<!-- block: needs (\w+) -->", token.content.strip())
            assert comment, f"{page}: expected <!-- block: needs MODULE -->, got {token.content}"
            needs = comment[1]
        elif token.type == "fence" and token.map:
            name = page.relative_to(ROOT).as_posix()
            found.append(Block(name, token.map[0] + 1, heading, token.info, token.content, needs))
            needs = ""
    return found
