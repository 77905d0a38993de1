"""Links of the documentation, on a code host and in the site that docs/hooks/repository_links.py prepares."""

import runpy

import pytest
from docs.blocks import ROOT, pages

LOOP = "../kddp_ext/loss/functional.py"
rewrite = runpy.run_path(str(ROOT / "docs" / "hooks" / "repository_links.py"))["rewrite"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[losses](losses.md#limits)", "[losses](losses.md#limits)"),
        ("![a](images/x.png) [b](https://a.org/b) [c](#here)", "![a](images/x.png) [b](https://a.org/b) [c](#here)"),
        (f"[the loop]({LOOP})", "the loop (`kddp_ext/loss/functional.py`)"),
        (f"[loss/functional.py]({LOOP})", "`kddp_ext/loss/functional.py`"),
        ("[`tests/project/docs`](../tests/project/docs)", "`tests/project/docs`"),
        ("[read\nme](../README.md)", "[read\nme](index.md)"),
        (f"`x[0]({LOOP})`", f"`x[0]({LOOP})`"),
        (f"```text\n[a](b.py)\n```\n[functional.py]({LOOP})", "```text\n[a](b.py)\n```\n`kddp_ext/loss/functional.py`"),
    ],
)
def test_links_of_a_page_in_the_site(text: str, expected: str) -> None:
    assert rewrite(text, "docs/pruning.md", "pruning.md", ROOT, None, warn=pytest.fail) == expected


def test_no_link_is_broken() -> None:
    """On a code host. The links and the anchors of the site are checked when it is built."""
    told: list[str] = []
    for page in [*pages(), ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"]:
        name = page.relative_to(ROOT).as_posix()
        rewrite(page.read_text(encoding="utf-8"), name, "page.md", ROOT, None, warn=told.append)
    assert told == []


def test_other_links_in_the_site() -> None:
    url, told = "https://host.example/a/b/", list[str]()
    made = rewrite(f"[the loop]({LOOP}#L3)", "docs/pruning.md", "pruning.md", ROOT, url, warn=pytest.fail)
    assert made == "[the loop](https://host.example/a/b/blob/HEAD/kddp_ext/loss/functional.py#L3)"
    root_page = "[a](docs/losses.md) [LICENSE](LICENSE)"
    made = rewrite(root_page, "CHANGELOG.md", "changelog.md", ROOT, None, warn=pytest.fail)
    assert made == "[a](losses.md) `LICENSE`"
    rewrite("[a](../nothing.py)", "docs/losses.md", "losses.md", ROOT, None, warn=told.append)
    assert told == ["docs/losses.md: ../nothing.py leads to nothing.py, which does not exist"]
