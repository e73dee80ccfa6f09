"""A finished run's folder, read back: the rows of metrics.jsonl and summary.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.shards import INDEX
from ..noise.partition import Partition

BLOCKWISE = "block-wise"
_NEEDED = (
    *(f"partition.{name}" for name in ("density", "edges", "layers", "overlap")),
    *(f"results.{BLOCKWISE}.{name}" for name in ("test", "memory")),
)


@dataclass(frozen=True)
class Run:
    """A finished run as it was written: the rows of metrics.jsonl by run and step, and summary.json."""

    rows: dict[str, list[dict[str, Any]]]
    summary: dict[str, Any]

    @property
    def results(self) -> dict[str, Any]:
        """What summary.json says of each run, block-wise and baselines."""
        return self.summary["results"]

    @property
    def test(self) -> dict[str, Any]:
        """The block-wise model on the test split."""
        return self.results[BLOCKWISE]["test"]

    @property
    def level(self) -> str:
        """What a noise level is called: "sigma", or masked diffusion's "t"."""
        return self.summary.get("level", "sigma")

    @property
    def partition(self) -> Partition:
        """The ranges of noise."""
        return Partition.from_dict(self.summary["partition"])


def read_run(folder: Path) -> Run:
    """The run in `folder`. A row logged twice (a run resumed from before it) counts once, as logged last.

    Raises: ValueError if it isn't the folder of a finished run, saying what is missing.
    """
    if (folder / INDEX).is_file():
        raise ValueError(f"{folder} is an exported model, which holds no results to draw: give the run folder")
    unfinished = f"{folder} is not a finished run:"
    for name in ("metrics.jsonl", "summary.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{unfinished} {name} is missing; train or resume it first")
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for row in read_rows(folder / "metrics.jsonl"):
        rows.setdefault(row["run"], {})[row["step"]] = row
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except ValueError as error:
        raise ValueError(f"{unfinished} summary.json is no JSON ({error}); evaluate it again") from error
    for path in _NEEDED:
        if not _has(summary, path):
            raise ValueError(f"{unfinished} summary.json has no {path}; train or resume it first")
    if not rows.get(BLOCKWISE):
        raise ValueError(f"{unfinished} metrics.jsonl has no {BLOCKWISE} rows; train or resume it first")
    return Run({run: [found[step] for step in sorted(found)] for run, found in rows.items()}, summary)


def read_rows(log: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl, without a last one that was cut short: a training may be at work."""
    rows = []
    for number, line in enumerate(log.read_text().split("\n")[:-1], 1):
        try:
            row = json.loads(line)
            rows.append({"run": row["run"], "step": row["step"], **row})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{log}, line {number} is no row of metrics ({error!r}); remove that line") from error
    return rows


def _has(values: Any, path: str) -> bool:
    for key in path.split("."):
        if not isinstance(values, dict) or key not in values:
            return False
        values = values[key]
    return values is not None and values != []


def signed(bits: float) -> str:
    """Return a number with its sign, without one if it rounds to zero."""
    return f"{bits:+.3f}" if round(bits, 3) else "0.000"
