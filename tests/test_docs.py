"""The Python examples in the documentation run, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|mailto:)([^)#\s]+)(#[^)\s]+)?\)")


def examples(page: Path) -> list[tuple[int, str]]:
    """The line that each ```python block of a page starts after, and its code."""
    text = page.read_text()
    return [(text.count("\n", 0, found.start(1)), found.group(1)) for found in FENCE.finditer(text)]


def test_examples_are_found():
    assert len(examples(ROOT / "docs" / "adapters.md")) >= 3


@pytest.mark.parametrize("page", [p for p in PAGES if examples(p)], ids=lambda p: p.name)
def test_examples_run(page, tmp_path, monkeypatch):
    """In order, in one namespace and an empty folder, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__example__"}
    for line, code in examples(page):
        # Blank lines in front, so that a traceback names the page's own line.
        exec(compile("\n" * line + code, str(page), "exec", dont_inherit=True), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(page.read_text()):
        linked = page.parent / target
        if linked.name == "README.md" and not linked.exists():
            pytest.skip("README.md isn't there")
        assert linked.exists(), f"{page.name} links to {target}, which isn't there"
        assert not anchor or anchor[1:] in anchors(linked), f"{page.name} links to {target}{anchor}: no such heading"


def anchors(page: Path) -> set[str]:
    """A page's headings as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
