"""docs/hooks/built_links.py finds what is wrong with the links of a built site."""

import runpy
from pathlib import Path

from docs.blocks import ROOT

broken_links = runpy.run_path(str(ROOT / "docs" / "hooks" / "built_links.py"))["broken_links"]


def test_broken_links_of_a_built_site(tmp_path: Path) -> None:
    good = '<h1 id="top">A</h1> <a href="#top">a</a> <a href="b/c.html#x">b</a> <a href="https://host.example">c</a>'
    (tmp_path / "b").mkdir()
    (tmp_path / "a.html").write_text(good)
    (tmp_path / "b" / "c.html").write_text('<a name="x" href="../a.html#top">d</a> <img src="/p.png?1">')
    (tmp_path / "p.png").touch()
    assert broken_links(tmp_path) == []
    bad = '<a href="b/d.html">e</a> <a href="b/c.html#y">f</a> <script src="//host.example/s.js"></script>'
    (tmp_path / "a.html").write_text(good + bad)
    assert broken_links(tmp_path) == [
        "a.html: b/d.html leads to no file",
        "a.html: b/c.html#y leads to no anchor",
        "a.html: <script> loads //host.example/s.js from another server",
    ]
