"""The site's links out of docs/, as docs/hooks/repository_links.py makes them."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from docs.blocks import ROOT, pages


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("repository_links", ROOT / "docs/hooks/repository_links.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[losses](losses.md#limits)", "[losses](losses.md#limits)"),
        ("![a](images/x.png) [b](https://a.org/b) [c](#here)", "![a](images/x.png) [b](https://a.org/b) [c](#here)"),
        ("[the loop](../kddp_ext/loss/functional.py)", "the loop (`kddp_ext/loss/functional.py`)"),
        ("[loss.py](../kddp_ext/loss/functional.py)", "`kddp_ext/loss/functional.py`"),
        ("[`tests/project/docs`](../tests/project/docs)", "`tests/project/docs`"),
        ("[read\nme](../README.md)", "[read\nme](index.md)"),
        ("`x[0](../kddp_ext/loss/functional.py)`", "`x[0](../kddp_ext/loss/functional.py)`"),
        (
            "```text\n[a](b.py)\n```\n[loss.py](../kddp_ext/loss/functional.py)",
            "```text\n[a](b.py)\n```\n`kddp_ext/loss/functional.py`",
        ),
    ],
)
def test_links_of_a_page(hook: ModuleType, text: str, expected: str) -> None:
    assert hook.rewrite(text, "docs/pruning.md", "pruning.md", ROOT, None, warn=pytest.fail) == expected


def test_links_to_a_code_host(hook: ModuleType) -> None:
    text = "[the loop](../kddp_ext/loss/functional.py#L3)"
    made = hook.rewrite(text, "docs/pruning.md", "pruning.md", ROOT, "https://host.example/a/b/", warn=pytest.fail)
    assert made == "[the loop](https://host.example/a/b/blob/HEAD/kddp_ext/loss/functional.py#L3)"


def test_links_of_a_page_of_the_root(hook: ModuleType) -> None:
    made = hook.rewrite(
        "[a](docs/losses.md) [LICENSE](LICENSE)", "CHANGELOG.md", "changelog.md", ROOT, None, warn=pytest.fail
    )
    assert made == "[a](losses.md) `LICENSE`"


def test_a_link_to_nothing_is_told(hook: ModuleType) -> None:
    told: list[str] = []
    hook.rewrite("[a](../nothing.py)", "docs/losses.md", "losses.md", ROOT, None, warn=told.append)
    assert told == ["docs/losses.md: ../nothing.py leads to nothing.py, which does not exist"]


def test_every_link_leads_somewhere(hook: ModuleType) -> None:
    """On a code host, which follows them as they are; the site's are checked when it is built."""
    told: list[str] = []
    for page in pages():
        name = page.relative_to(ROOT).as_posix()
        hook.rewrite(page.read_text(encoding="utf-8"), name, "page.md", ROOT, None, warn=told.append)
    assert told == []


def anchors(page: Path) -> set[str]:
    """The names that a code host gives the headings of a page."""
    text = re.sub(r"^(```+).*?^\1$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_anchor_is_a_heading_on_a_code_host_too() -> None:
    missing, seen = [], 0
    for page in pages():
        for target, anchor in re.findall(r"\]\(([^()\s#:]*)#([^()\s]+)\)", page.read_text(encoding="utf-8")):
            to = (page.parent / target).resolve() if target else page
            # The reference's names are in the site alone; there the build checks them.
            if to.suffix == ".md" and not anchor.startswith("kddp_ext."):
                seen += 1
                missing += [f"{page.name}: {target}#{anchor}"] if anchor not in anchors(to) else []
    assert missing == []
    assert seen > 10
