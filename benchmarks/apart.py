"""The table of machines that never speak: three blocks that share nothing, against what such machines do without."""

from __future__ import annotations

import statistics
from typing import NamedTuple

from tables import RESULTS, Row, gather, spread

WAYS = ("lone, 1/3 of the updates", "soup of 3, by outputs", "soup of 3")


class Line(NamedTuple):
    """A task: what the first two columns say, its run, the study that has blocks of their own, and their variant there;
    the measure, its decimals, and whether the highest is the best."""

    task: str
    judged: str
    run: str
    study: str
    blocks: str
    key: str
    digits: int
    highest: bool


LINES = (
    Line("ViT, digits", "accuracy %", "vit_digits", "main", "B=3 per_block", "accuracy", 1, True),
    Line("DiT, digits", "Fréchet distance ↓", "dit_digits", "sharing", "per_block", "frechet", 2, False),
    Line("DiT, digits", "held-out loss ↓", "dit_digits", "sharing", "per_block", "loss", 3, False),
    Line("masked diffusion, text", "bits per character ↓", "mdlm_text", "main", "B=3 per_block", "bits", 3, False),
)


def measured(rows: list[Row], line: Line, seeds: set[int]) -> list[float]:
    """Return the measure of rows of these seeds."""
    return [row["test"][line.key] for row in rows if row["seed"] in seeds]


def cells(line: Line) -> list[str]:
    """Return a line's cells, of the seeds that the controls have; the best mean of unconnected machines is in bold."""
    controls = gather(RESULTS / f"{line.run}_controls.jsonl")
    seeds = {row["seed"] for row in controls[WAYS[0]]}
    own = gather(RESULTS / f"{line.run}_{line.study}.jsonl")[line.blocks]
    apart = [measured(rows, line, seeds) for rows in (own, *(controls.get(way, []) for way in WAYS))]
    best = (max if line.highest else min)(statistics.mean(values) for values in apart if values)
    told = [spread(values, line.digits) if values else "" for values in apart]
    bold = [f"**{t}**" if v and statistics.mean(v) == best else t for t, v in zip(told, apart, strict=True)]
    connected = measured(gather(RESULTS / f"{line.run}_main.jsonl")["2 layers alone"], line, seeds)
    return [line.task, line.judged, *bold, spread(connected, line.digits)]


def table() -> str:
    """Return the table in Markdown."""
    heads = [
        "task",
        "judged by",
        "three blocks",
        "one of them alone",
        "all three asked",
        "their soup",
        "one, all updates",
    ]
    rows = [heads, ["---"] * len(heads), *map(cells, LINES)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
