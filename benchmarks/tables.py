"""The tables of the lab book, from the studies' rows."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Column = Callable[[list[Row]], str]
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu-2core"


def gather(path: Path) -> dict[str, list[Row]]:
    """A study's rows by variant."""
    groups: dict[str, list[Row]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        groups.setdefault(row["variant"], []).append(row)
    return groups


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and, of more than one seed, standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def of(split: str, key: str, digits: int = 1) -> Column:
    """A number of a split, mean and spread over seeds; empty where a training has none."""

    def column(rows: list[Row]) -> str:
        values = [row[split][key] for row in rows if key in row[split]]
        return spread(values, digits) if len(values) == len(rows) else ""

    return column


def blocks_leave(rows: list[Row]) -> str:
    """Accuracy as the trajectory leaves each block."""
    return " → ".join(f"{a:.1f}" for a in by_block(rows)) if "trajectory" in rows[0]["test"] else ""


def rise(rows: list[Row]) -> str:
    """What each block adds to the bound, in bits, the mean over seeds."""
    if "regret_bits" not in rows[0]["test"]:
        return ""
    return ", ".join(
        f"{statistics.mean(b):+.3f}" for b in zip(*(row["test"]["regret_bits"] for row in rows), strict=True)
    )


def memory(rows: list[Row]) -> str:
    """Peak bytes in training."""
    return f"{statistics.mean(sum(row['memory'].values()) for row in rows) / 1e6:.1f}"


def by_passes(rows: list[Row]) -> str:
    """Accuracy after 1, 2, 4, ... passes through the core, the mean over seeds."""
    counts = range(len(rows[0]["test"]["passes"]))
    return ", ".join(f"{statistics.mean(row['test']['passes'][i]['accuracy'] for row in rows):.1f}" for i in counts)


def count(key: str) -> Column:
    """A count of the test split, the mean over seeds."""
    return lambda rows: f"{statistics.mean(row['test'][key] for row in rows):,.0f}"


def moments(rows: list[Row]) -> str:
    """Bytes of moments per weight."""
    return f"{statistics.mean(row['moments'] for row in rows):.2f}"


def loss_in(tenth: int) -> Column:
    """Mean training loss of a tenth of the training."""
    return lambda rows: spread([row["curve"][tenth - 1] for row in rows], 4)


def against_lone(rows: list[Row]) -> str:
    """Paired difference from the lone network's loss, in thousandths; in brackets one seed's standard error."""
    told = [row["test"]["against lone"] for row in rows]
    error = statistics.mean(one["error"] for one in told)
    return f"{spread([1e3 * one['mean'] for one in told], 2)} ({1e3 * error:.2f})"


def by_noise(rows: list[Row]) -> str:
    """The same in the lowest, middle and highest third of the training noise."""
    levels = [
        statistics.mean(column)
        for column in zip(*(r["test"]["against lone by level"]["mean"] for r in rows), strict=True)
    ]
    third = len(levels) // 3
    return ", ".join(f"{1e3 * statistics.mean(levels[i * third : (i + 1) * third]):+.1f}" for i in range(3))


def seeds(rows: list[Row]) -> str:
    """The seeds that a line is the mean of."""
    return " ".join(str(seed) for seed in sorted(row["seed"] for row in rows))


COLUMNS: dict[str, dict[str, Column]] = {
    "vit": {
        "test accuracy %": of("test", "accuracy"),
        "validation %": of("val", "accuracy"),
        "trajectory by block, test %": blocks_leave,
        "bound, bits": of("test", "bound_bits", 2),
        "memory, MB": memory,
    },
    "dit": {
        "Fréchet distance, test": of("test", "frechet", 2),
        "validation": of("val", "frechet", 2),
        "class accuracy %": of("test", "class_accuracy"),
        "held-out loss": of("test", "loss", 3),
        "layers run per image": count("layer_evaluations"),
        "sampling, s": of("test", "sampling_seconds"),
        "memory, MB": memory,
    },
    "masked_lm": {
        "test, bits per character": of("test", "bits", 3),
        "validation": of("val", "bits", 3),
        "memory, MB": memory,
    },
    "recurrent": {
        "test accuracy %": of("test", "accuracy"),
        "validation %": of("val", "accuracy"),
        "whole puzzles %": of("test", "exact"),
        "after 1, 2, 4, 8, 16, 32 passes": by_passes,
        "layer evaluations of the training": count("layer_evaluations"),
        "memory, MB": memory,
    },
    "causal_lm": {
        "test, bits per character": of("test", "bits", 3),
        "validation": of("val", "bits", 3),
        "bound's rise by block": rise,
        "first step": of("test", "first_bits", 3),
        "last step": of("test", "last_bits", 2),
        "mixture of 8": of("test", "mixture_bits", 2),
        "judge of its texts, bits": of("test", "judge_bits", 2),
        "distinct-2": of("test", "distinct_2", 3),
        "memory, MB": memory,
    },
}


# What a study of the moments shows instead of costs.
CURVE = {f"loss, tenth {tenth}": loss_in(tenth) for tenth in (1, 2, 5, 10)} | {"moments, bytes per weight": moments}
# What a study of forks shows besides the architecture's own measure.
FORKED = {
    "test loss": of("test", "loss", 4),
    "against A0, thousandths": against_lone,
    "by noise: low, middle, high": by_noise,
}
OWN = {"dit": ("Fréchet distance, test", "class accuracy %"), "masked_lm": ("test, bits per character",)}
COSTS = ("layers run per image", "sampling, s", "memory, MB")


def main_table(groups: dict[str, list[Row]]) -> list[str]:
    """What each way of training reached, and took."""
    first = next(iter(groups.values()))[0]
    columns = COLUMNS[first.get("architecture", "vit")]
    if "against lone" in first["test"]:
        columns = FORKED | {name: columns[name] for name in OWN[first["architecture"]]}
    if all(name.startswith("moments in ") for name in groups):
        columns = {name: column for name, column in columns.items() if name not in COSTS} | CURVE
    lines = [f"| training | seeds | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for name, rows in groups.items():
        if " as " not in name:
            lines.append(f"| {name} | {seeds(rows)} | {' | '.join(column(rows) for column in columns.values())} |")
    return lines


def by_block(rows: list[Row]) -> list[float]:
    """Mean test accuracy at the last step of each block of the trajectory."""
    lasts = [{step["block"]: step["accuracy"] for step in row["test"]["trajectory"]} for row in rows]
    return [statistics.mean(last[b] for last in lasts) for b in sorted(lasts[0])]


def memory_table(groups: dict[str, list[Row]]) -> list[str]:
    """Peak bytes by category, in MB, and their ratio to end to end and to one conditioned block."""
    names = [name for name in groups if name == "end-to-end" or name in {f"B={b}" for b in (1, 2, 3, 4, 6)}]
    taken = {name: groups[name][0]["memory"] for name in names}
    total = {name: sum(by_category.values()) for name, by_category in taken.items()}
    categories = list(taken[names[0]])
    lines = [
        f"| training | {' | '.join(categories)} | total | against end-to-end | against B=1 |",
        "|---" * (len(categories) + 4) + "|",
    ]
    for name in names:
        cells = [f"{taken[name][category] / 1e6:.2f}" for category in categories]
        ratios = [f"{total[name] / total[base]:.3f}" for base in ("end-to-end", "B=1")]
        lines.append(f"| {name} | {' | '.join(cells)} | {total[name] / 1e6:.2f} | {' | '.join(ratios)} |")
    return lines


def ablation_table(groups: dict[str, list[Row]], base: str, name: str) -> list[str]:
    """One line for each field of `name` switched to the other recipe, against `base`."""
    seeds = {row["seed"] for rows in groups.values() for row in rows if rows[0]["variant"].startswith(f"{name}, ")}
    whole = statistics.mean(row["test"]["accuracy"] for row in groups[base] if row["seed"] in seeds)
    lines = [f"| {name}, but | test accuracy % | difference | bound, bits |", "|---|---|---|---|"]
    for variant, rows in groups.items():
        if not variant.startswith(f"{name}, "):
            continue
        values = [row["test"]["accuracy"] for row in rows]
        bound = spread([row["test"]["bound_bits"] for row in rows], 2)
        change = statistics.mean(values) - whole
        lines.append(f"| {variant.removeprefix(f'{name}, ')} | {spread(values)} | {change:+.1f} | {bound} |")
    return lines


def report(path: Path) -> str:
    """All tables of a study, with its machine."""
    groups = gather(path)
    machine = list(groups.values())[-1][-1]["machine"]
    parts = [f"Mean ± standard deviation over the seeds; machine: {machine}", *main_table(groups)]
    if "end-to-end" in groups and "B=1" in groups:
        parts += ["", *memory_table(groups)]
    for base, name in (("B=3", "corrected"), ("published", "published")):
        if any(variant.startswith(f"{name}, ") for variant in groups) and base in groups:
            parts += ["", *ablation_table(groups, base, name)]
    return "\n".join([parts[0], "", *parts[1:]]) + "\n"
