"""Rewrites links that leave docs/ for the site, which contains only docs/.

Links in the Markdown files are relative, so that they work on a code host. In the site, the files in `ROOT_PAGES` are
pages. A link to another file becomes a link to the code host if mkdocs.yml has a `repo_url`, else the file's name. A
broken link is a warning, which fails the build.
"""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Files in the repository's root and their pages.
ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}

# Skips fenced blocks and code between backticks. The text of a link may contain a line break.
_LINK = re.compile(
    r"^ {0,3}(?P<fence>```+|~~~+).*?^ {0,3}(?P=fence)[^\n]*$"
    r"|`[^`\n]+`"
    r"|(?<!!)\[(?P<words>[^\]]*)\]\((?P<address>[^()\s]+)\)",
    re.MULTILINE | re.DOTALL,
)
_OF_ANOTHER_PLACE = re.compile(r"^(?:[a-z][a-z0-9+.-]*:|/|#)", re.IGNORECASE)
logger = logging.getLogger("mkdocs.hooks.repository_links")


def rewrite(
    text: str, source: str, page: str, root: Path, repo_url: str | None, warn: Callable[[str], None] = logger.warning
) -> str:
    """Return the Markdown `text` with links that work in the site.

    Args:
        text: the Markdown of a page.
        source: its file, relative to the repository's root, such as "docs/pruning.md".
        page: its page, relative to docs/.
        root: the repository's root.
        repo_url: address of the repository on a code host, or None.
        warn: called with a message for each broken link.
    """
    return _LINK.sub(lambda found: _rewritten(found, source, page, root, repo_url, warn), text)


def _rewritten(
    found: re.Match[str], source: str, page: str, root: Path, repo_url: str | None, warn: Callable[[str], None]
) -> str:
    words, address = found["words"], found["address"]
    if address is None or _OF_ANOTHER_PLACE.match(address):
        return found[0]
    target, anchor, section = address.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if not (root / path).exists():
        warn(f"{source}: {address} leads to {path}, which does not exist")
        return found[0]
    in_docs = path.removeprefix("docs/") if path.startswith("docs/") else ROOT_PAGES.get(path)
    if path == "README.md":
        in_docs = "index.md"
    if in_docs is not None:
        return f"[{words}]({posixpath.relpath(in_docs, posixpath.dirname(page) or '.')}{anchor}{section})"
    if repo_url:
        return f"[{words}]({repo_url.rstrip('/')}/blob/HEAD/{path}{anchor}{section})"
    return f"`{path}`" if path.endswith(words.strip("`")) else f"{words} (`{path}`)"


def on_files(files: Any, config: Any) -> Any:
    """Add the pages in `ROOT_PAGES`."""
    from mkdocs.structure.files import File

    root = Path(config.config_file_path).parent
    for name, page in ROOT_PAGES.items():
        if (root / name).exists():
            files.append(File.generated(config, page, content=(root / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Rewrite a page's links."""
    root = Path(config.config_file_path).parent
    at = page.file.src_uri
    source = {each: name for name, each in ROOT_PAGES.items()}.get(at, f"docs/{at}")
    return rewrite(markdown, source, at, root, config.repo_url)
