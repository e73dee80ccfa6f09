"""Brings the studies' rows onto the pages that show them: python benchmarks/pages.py"""

from __future__ import annotations

import re

import apart
import summary
import tables

from diffusionblocks.experiments.run_folder import write

PAGES = [tables.ROOT / name for name in ("README.md", "docs/results.md", "docs/lab-book.md")]
WHOLE = {"summary": summary.table, "apart": apart.table}  # made of several studies
# A comment that names a study and which of its tables, and the table that stands below it.
MARKED = re.compile(r"^<!-- (\w+) (\d) -->\n(?:\|.*\n)*", re.MULTILINE)


def renewed(page: str) -> str:
    """Return the page with every marked table as the rows have it now."""

    def table(found: re.Match[str]) -> str:
        name, which = found.groups()
        if name in WHOLE:
            return f"<!-- {name} {which} -->\n{WHOLE[name]()}\n"
        made = tables.report(tables.RESULTS / f"{name}.jsonl").rstrip().split("\n\n")
        return f"<!-- {name} {which} -->\n{made[int(which)]}\n"

    return MARKED.sub(table, page)


def renew() -> None:
    """Bring the rows onto all pages."""
    for page in PAGES:
        write(page, renewed(page.read_text()))


if __name__ == "__main__":
    renew()
