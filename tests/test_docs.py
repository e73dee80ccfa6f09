"""The Python examples in the documentation and in docstrings run, and links lead somewhere."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "python" / "diffusionblocks"
MODULES = sorted(p for p in LIBRARY.rglob("*.py") if ">>>" in p.read_text() and "experiments" not in p.parts)
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
REPOSITORY = r"https://(?:github\.com|raw\.githubusercontent\.com)/diffusionblocks/diffusionblocks/(?:blob/)?main/"
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]+)?\)")
FETCHED = {  # what pages import
    "guides/lora.md": "peft", "guides/own-model.md": "transformers", "guides/transformers.md": "transformers",
    "guides/diffusers.md": "diffusers", "guides/trainers.md": "accelerate", "index.md": "sklearn",
    "README.md": "sklearn",
}  # fmt: skip


def examples(page: Path) -> list[tuple[int, str]]:
    """The line that each ```python block of a page starts after, and its code."""
    text = page.read_text()
    return [(text.count("\n", 0, found.start(1)), found.group(1)) for found in FENCE.finditer(text)]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix().removeprefix("docs/")


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def test_examples_are_found():
    assert len(examples(ROOT / "docs" / "guides" / "own-loop.md")) >= 4


@pytest.mark.parametrize("page", [p for p in PAGES if examples(p)], ids=name_of)
def test_examples_run(page, empty_folder):
    """In order, in one namespace and an empty folder, as a reader would paste them."""
    if name_of(page) in FETCHED:
        pytest.importorskip(FETCHED[name_of(page)])
    namespace = {"__name__": "__example__"}
    for line, code in examples(page):
        # Blank lines in front, so that a traceback names the page's own line.
        exec(compile("\n" * line + code, str(page), "exec", dont_inherit=True), namespace)
    if "accuracy" in namespace:
        assert namespace["accuracy"] > 0.8  # the example of README and the first page: chance is a tenth


def test_docstring_examples_are_found():
    assert {LIBRARY / "training" / "trainer.py", LIBRARY / "convert" / "layers.py"} <= set(MODULES)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_docstring_examples_run(path, empty_folder):
    """In an empty folder, and each docstring by itself."""
    name = ".".join(path.relative_to(ROOT / "python").with_suffix("").parts).removesuffix(".__init__")
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried and not failed


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(page.read_text()):
        local = re.sub(REPOSITORY, f"{ROOT}/", target)
        if re.match(r"https?://|mailto:", local):
            continue
        linked = page.parent / local if local else page
        assert linked.exists(), f"{page.name} links to {target}, which isn't there"
        assert not anchor or anchor[1:] in anchors(linked), f"{page.name} links to {target}{anchor}: no such heading"


def test_links_of_the_readme_survive_a_package_index():
    targets = [target for target, _ in LINK.findall((ROOT / "README.md").read_text())]
    assert targets and all(target.startswith("https://") for target in targets)


def test_every_page_is_in_the_menu_once():
    menu = re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(menu) == sorted(name_of(page) for page in (ROOT / "docs").rglob("*.md"))


def test_public_names_are_in_the_reference():
    import diffusionblocks

    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    named = {found.rpartition(".")[2] for found in re.findall(r"^::: (\S+)$", pages, re.MULTILINE)}
    assert set(diffusionblocks.__all__) <= named


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda p: p.name)
def test_workflows_name_what_exists(path):
    text = path.read_text()
    assert yaml.safe_load(text)
    targets = set(re.findall(r"\bmake ([a-z][\w-]*)", text))
    assert targets <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def anchors(page: Path) -> set[str]:
    """A page's headings as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
