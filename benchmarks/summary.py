"""The first pages' table of all tasks: end to end, in blocks, and one block's layers alone."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from tables import RESULTS, Row, gather, spread


@dataclass(frozen=True)
class Line:
    """A task, and the variants of its study that the table's columns show.

    task, judged: What the first two columns say.
    study: File of rows, without its ending.
    key: Measure of the test split.
    blocks, alone, ordinary: Variants in blocks, of one block's layers alone ("" if there is none), and end to end.
    digits: Decimals.
    highest: The highest measure is the best, not the lowest.
    """

    task: str
    judged: str
    study: str
    key: str
    blocks: str = "B=3"
    alone: str = "2 layers alone"
    ordinary: str = "end-to-end"
    digits: int = 1
    highest: bool = True


LINES = (
    Line("ViT, digits", "accuracy %", "vit_digits_main", "accuracy"),
    Line("ViT, Fashion-MNIST", "accuracy %", "vit_fashion_small_main", "accuracy"),
    Line("DiT, digits", "Fréchet distance ↓", "dit_digits_main", "frechet", digits=2, highest=False),
    Line("DiT, Fashion-MNIST", "Fréchet distance ↓", "dit_fashion_small_main", "frechet", digits=1, highest=False),
    Line("masked diffusion, text", "bits per character ↓", "mdlm_text_main", "bits", digits=3, highest=False),
    Line(
        "the same at equal updates", "bits per character ↓", "mdlm_text_main", "bits",
        ordinary="B=1, equal updates", digits=3, highest=False,
    ),
    Line(
        "autoregressive, text", "bits per character ↓", "lm_text_main", "bits",
        blocks="B=2", alone="shallow, equal compute", digits=3, highest=False,
    ),
    Line("recurrent depth, sums", "answers %", "recurrent_sums_main", "accuracy", blocks="equal compute", alone=""),
    Line("recurrent depth, mazes", "answers %", "recurrent_mazes_main", "accuracy", blocks="equal compute", alone=""),
)  # fmt: skip


def memory(rows: list[Row]) -> float:
    """Return the peak bytes of a training, the mean over seeds."""
    return statistics.mean(sum(row["memory"].values()) for row in rows)


def cells(line: Line) -> list[str]:
    """Return a line's cells; the best mean is in bold."""
    groups = gather(RESULTS / f"{line.study}.jsonl")
    ways = [groups.get(name, []) for name in (line.ordinary, line.blocks, line.alone)]
    values = [[row["test"][line.key] for row in rows] for rows in ways]
    means = [statistics.mean(one) for one in values if one]
    best = max(means) if line.highest else min(means)
    told = []
    for one in values:
        text = spread(one, line.digits) if one else ""
        told.append(f"**{text}**" if one and statistics.mean(one) == best else text)
    if line.blocks.startswith("B="):
        told[1] += f" ({line.blocks.replace('=', ' = ')})"
    return [line.task, line.judged, *told, f"{memory(ways[1]) / memory(groups['end-to-end']):.2f}"]


def table() -> str:
    """Return the table in Markdown."""
    heads = ["task", "judged by", "end to end", "in blocks", "one block's layers alone", "memory"]
    rows = [heads, ["---"] * len(heads), *map(cells, LINES)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
