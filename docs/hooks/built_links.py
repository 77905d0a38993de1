"""Checks the built site: every link leads to a file and an anchor that exist, and no page loads from other servers.

What it finds is a warning, which fails the build.
"""

from __future__ import annotations

import logging
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

logger = logging.getLogger("mkdocs.hooks.built_links")


class _Page(HTMLParser):
    """The anchors of a page, and its links with their tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors = {"", "__top"}
        self.links: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {values[key] or "" for key in ("id", "name") if key in values}
        self.links += [(tag, address) for key in ("href", "src") if (address := values.get(key)) is not None]


def broken_links(site: Path) -> list[str]:
    """What is wrong with the links of the HTML files in `site`, one line each."""

    @cache
    def read(path: Path) -> _Page:
        return _Page(path.read_text(encoding="utf-8"))

    found = []
    for path in sorted(site.rglob("*.html")):
        for tag, address in read(path).links:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                if tag != "a" and parts.scheme != "data":
                    found.append(f"{path.relative_to(site)}: <{tag}> loads {address} from another server")
                continue
            place = unquote(parts.path)
            target = site / place.lstrip("/") if place.startswith("/") else path.parent / place if place else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                found.append(f"{path.relative_to(site)}: {address} leads to no file")
            elif target.suffix == ".html" and unquote(parts.fragment) not in read(target.resolve()).anchors:
                found.append(f"{path.relative_to(site)}: {address} leads to no anchor")
    return found


def on_post_build(config: Any) -> None:
    """Warn of every broken link."""
    for line in broken_links(Path(config.site_dir)):
        logger.warning(line)
