"""Pictures and the README's table of what the benches measured: python benchmarks/report.py results/cpu-2core"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from diffusionblocks.axes import BLOCK_COLOURS, GREY, INK, caption, new_figure

Document = dict[str, Any]


def draw(document: Document, path: Path) -> None:
    """One op: the share of a copy's bandwidth that each contender reaches, case by case."""
    rows = document["rows"]
    cases = list(dict.fromkeys((row["case"], row["dtype"]) for row in rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    figure, (axes,) = new_figure(1, 1)
    figure.set_size_inches(8.6, 1.2 + 0.16 * len(cases) * (len(names) + 1))
    height = 1 / (len(names) + 1)
    for i, name in enumerate(names):
        share = {(row["case"], row["dtype"]): row for row in rows if row["contender"] == name}
        places = [at + i * height for at, case in enumerate(cases) if case in share]
        chosen = [share[case] for case in cases if case in share]
        axes.barh(places, [row["of_copy"] for row in chosen], height, label=name, color=BLOCK_COLOURS[i], align="edge")
        for place, row in zip(places, chosen, strict=True):
            axes.text(
                row["of_copy"], place + height / 2, f" {row['ms_50']:.3g} ms", va="center", **INK | {"fontsize": 7}
            )
    axes.axvline(1, color=GREY, lw=1)
    axes.set_yticks(
        [at + height * len(names) / 2 for at in range(len(cases))], [f"{c}\n{d}" for c, d in cases], fontsize=7
    )
    axes.invert_yaxis()
    axes.legend(fontsize=8, frameon=False)
    machine = document["machine"]
    caption(
        axes,
        f"{document['op']} on {machine['device']}, {machine['threads']} threads",
        "bandwidth, as a share of a copy's",
    )
    figure.savefig(path)


def line(document: Document) -> str:
    """One op's line of the README's table."""
    gains = [
        f"{gain['geometric_mean']:.1f}x ({gain['worst']:.1f}x)" if gain else ""
        for gain in (document["speedup"].get(name) for name in ("eager", "compile", "liger"))
    ]
    ours = [row["of_copy"] for row in document["rows"] if row["contender"] == "ours"]
    return f"| `{document['op']}` | {' | '.join(gains)} | {statistics.median(ours):.2f} | {_memory(document['rows'])} |"


def _memory(rows: list[dict[str, Any]]) -> str:
    """Ours against eager's highest allocation, over the cases where eager allocates anything."""
    peaks: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        peaks.setdefault((row["case"], row["dtype"]), {})[row["contender"]] = row["peak_mib"]
    ratios = [case["ours"] / case["eager"] for case in peaks.values() if case.get("eager", 0) > 0.01]
    return f"{statistics.geometric_mean([max(r, 1e-3) for r in ratios]):.2f}x" if ratios else ""


def main(folder: Path) -> None:
    """Print the table of all ops in a machine's folder."""
    documents = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    documents = [document for document in documents if "speedup" in document]
    print("| op | against eager | torch.compile | Liger | bandwidth, share of a copy's | peak memory against eager |")
    print("|---|---|---|---|---|---|")
    print("\n".join(line(document) for document in documents))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
