"""The table of machines that never speak: three blocks that share nothing, against what such machines do without."""

from __future__ import annotations

import statistics
from typing import NamedTuple

from tables import RESULTS, gather, spread

WAYS = ("B=3, apart", "lone, 1/3 of the updates", "soup of 3, by outputs", "soup of 3")


class Line(NamedTuple):
    """A task: what the first two columns say, its run, the measure, its decimals, and whether the highest is best."""

    task: str
    judged: str
    run: str
    key: str
    digits: int
    highest: bool


LINES = (
    Line("ViT, digits", "accuracy %", "vit_digits", "accuracy", 1, True),
    Line("DiT, digits", "Fréchet distance ↓", "dit_digits", "frechet", 2, False),
    Line("DiT, digits", "held-out loss ↓", "dit_digits", "loss", 3, False),
    Line("masked diffusion, text", "bits per character ↓", "mdlm_text", "bits", 3, False),
)


def cells(line: Line) -> list[str]:
    """Return a line's cells, all of the seeds that the machines have; their best mean is in bold."""
    controls = gather(RESULTS / f"{line.run}_controls.jsonl")
    seeds = {row["seed"] for row in controls[WAYS[0]]}
    connected = gather(RESULTS / f"{line.run}_main.jsonl")["2 layers alone"]
    ways = [controls.get(way, []) for way in WAYS]
    *apart, whole = ([row["test"][line.key] for row in rows if row["seed"] in seeds] for rows in (*ways, connected))
    best = (max if line.highest else min)(statistics.mean(values) for values in apart if values)
    told = [spread(values, line.digits) if values else "" for values in apart]
    bold = [f"**{t}**" if v and statistics.mean(v) == best else t for t, v in zip(told, apart, strict=True)]
    return [line.task, line.judged, *bold, spread(whole, line.digits)]


def table() -> str:
    """Return the table in Markdown."""
    ways = ["three blocks", "one of them alone", "all three asked", "their soup", "one, all updates"]
    heads = ["task", "judged by", *ways]
    rows = [heads, ["---"] * len(heads), *map(cells, LINES)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
