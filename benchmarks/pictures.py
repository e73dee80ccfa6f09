"""A picture of an op's results: the share of a copy's bandwidth that each contender reaches, case by case."""

from __future__ import annotations

from pathlib import Path

from rows import Document

from diffusionblocks.experiments.plotting.axes import GREY, INK, block_colours, caption, new_figure


def draw(document: Document, path: Path) -> None:
    """Draw bars by case and contender, with the milliseconds beside them."""
    rows = [row for row in document["rows"] if row.get("of_copy") is not None]
    cases = list(dict.fromkeys(_case(row) for row in rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    figure, (axes,) = new_figure(1, 1)
    figure.set_size_inches(8.6, 1.2 + 0.16 * len(cases) * (len(names) + 1))
    height = 1 / (len(names) + 1)
    for i, (name, colour) in enumerate(zip(names, block_colours(len(names)), strict=True)):
        own = {_case(row): row for row in rows if row["contender"] == name}
        places = [at + i * height for at, case in enumerate(cases) if case in own]
        chosen = [own[case] for case in cases if case in own]
        axes.barh(places, [row["of_copy"] for row in chosen], height, label=name, color=colour, align="edge")
        for place, row in zip(places, chosen, strict=True):
            text = f" {row['ms_50']:.3g} ms"
            axes.text(row["of_copy"], place + height / 2, text, va="center", **INK | {"fontsize": 7})
    axes.axvline(1, color=GREY, lw=1)
    middle = height * len(names) / 2
    axes.set_yticks([at + middle for at in range(len(cases))], ["\n".join(case) for case in cases], fontsize=7)
    axes.invert_yaxis()
    axes.legend(fontsize=8, frameon=False)
    machine = document["machine"]
    title = f"{document['op']} on {machine['device']}, {machine['threads']} threads"
    caption(axes, title, "bandwidth, as a share of a copy's")
    figure.savefig(path)


def _case(row: dict[str, str]) -> tuple[str, str]:
    direction = row.get("direction", "both")
    return row["case"], row["dtype"] + ("" if direction == "both" else f", {direction}")
