"""Pictures of a finished run: what it learnt, how it walks, what it took, and where the bits are.

Each picture has a function from a `Run` to a matplotlib Figure; `draw` writes them all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from ...noise.partition import Partition
from ...training.memory import CATEGORIES, readable
from ..results import BLOCKWISE, Run, read_run
from .axes import (
    BLOCK_COLOURS,
    CATEGORY_COLOURS,
    DPI,
    GREY,
    INK,
    LIGHT,
    block_colours,
    caption,
    legend_below,
    new_figure,
    noise_axis,
    note,
    short,
    smooth,
)

# name -> line style
BASELINES: dict[str, Any] = {
    "end-to-end": "--",
    "checkpointing": ":",
    "shallow": (0, (6, 2, 1, 2)),
    "forward-forward": "-.",
    "noprop": (0, (1, 4)),
}
PLAN = "block-wise,\nplan"


def draw(folder: str | os.PathLike[str]) -> list[Path]:
    """Write the pictures of the run in `folder` into it, each in one step; returns their paths.

    Raises: ValueError if it isn't the folder of a finished run, saying what is missing.
    """
    folder = Path(folder)
    run = read_run(folder)
    figures = {f"{name}.png": figure(run) for name, (figure, needs) in FIGURES.items() if needs <= set(run.test)}
    return [_write(figure, folder / name) for name, figure in figures.items()]


def loss_figure(run: Run) -> Figure:
    """Loss of each block while it trained."""
    figure, (axes,) = new_figure(1, 1)
    highest = 0.0
    for block, colour in enumerate(colours_of(run)):
        own = [r for r in run.rows[BLOCKWISE] if r["block"] == block]
        steps, losses = [r["step"] for r in own], [r["loss"] for r in own]
        highest = max([highest, *smooth(losses)])
        axes.plot(steps, losses, color=colour, alpha=0.25, lw=0.8)
        axes.plot(steps, smooth(losses), color=colour, lw=1.8, label=f"block {block}")
    axes.set_ylim(0, 1.08 * highest or 1)
    caption(axes, "loss of each block while it trains", "step", "loss")
    axes.legend(frameon=False, fontsize=9, ncols=1 + len(colours_of(run)) // 5)
    return figure


def levels_figure(run: Run) -> Figure:
    """Cross-entropy (or an image's loss) by noise level after training, on the test split."""
    figure, (axes,) = new_figure(1, 1)
    key, label = ("loss", "loss") if "loss" in run.test else ("cross_entropy", "cross-entropy, nats")
    for block, colour in enumerate(colours_of(run)):
        span = [v for v in run.test["levels"] if v["block"] == block]
        sigmas, losses = [v["sigma"] for v in span], [v[key] for v in span]
        axes.plot(sigmas, losses, "o-", ms=3.5, lw=1.5, color=colour, label=f"block {block}")
    axes.set_ylim(0)
    caption(axes, "by noise level after training, test split", y=label)
    noise_axis(axes, run.level)
    classes = run.summary.get("config", {}).get("model", {}).get("classes")
    if classes and key == "cross_entropy":
        note(axes, f"guessing: {math.log(classes):.2f}", (0.98, 0.96), ha="right", va="top")
    axes.legend(frameon=False, fontsize=9, ncols=1 + len(colours_of(run)) // 5)
    return figure


def walk_figure(run: Run) -> Figure:
    """Accuracy at each step of the walk from high noise to low, beside the baselines' accuracy."""
    figure, (axes,) = new_figure(1, 1)
    walk = run.test["walk"]
    steps, accuracies = [s["step"] for s in walk], [s["accuracy"] for s in walk]
    axes.plot(steps, accuracies, color=LIGHT, lw=2, zorder=1)
    for block, colour in enumerate(colours_of(run)):
        own = [i for i, s in enumerate(walk) if s["block"] == block]
        points = [steps[i] for i in own], [accuracies[i] for i in own]
        axes.plot(*points, "o-", ms=8, lw=2.5, color=colour, label=f"block {block}")
    others = {name: r["test"]["accuracy"] for name, r in run.results.items() if name in BASELINES}
    low, high = _window(accuracies, list(others.values()))
    for name, accuracy in others.items():
        if accuracy >= low:
            axes.axhline(accuracy, color=GREY, ls=BASELINES[name], lw=1.3, label=f"{name} {accuracy:.1f} %")
    off = ", ".join(f"{name} {accuracy:.1f} %" for name, accuracy in others.items() if accuracy < low)
    if off:
        note(axes, f"below this picture: {off}", (0.01, 0.02))
    last = (steps[-1], accuracies[-1])
    axes.annotate(f"{last[1]:.1f} %", last, xytext=(0, 9), textcoords="offset points", ha="center", **INK)
    axes.set_ylim(low, high)
    if len(walk) <= 12:
        axes.set_xticks(steps, [f"{s['step']}\n$\\sigma$={short(s['sigma'])}" for s in walk])
    caption(axes, "accuracy along the walk, test split", "step of the walk", "accuracy, %")
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def memory_figure(run: Run) -> Figure:
    """Bytes on the device against time, and by category: the plan, block-wise training, the baselines."""
    figure, (left, right) = new_figure(1, 2, widths=(1, 1.2))
    bars = _bars(run)
    unit, per = _unit(max(sum(by.values()) for by in bars.values()))
    for name, style in {BLOCKWISE: "-", **BASELINES}.items():
        rows = run.rows.get(name, [])
        seconds, held = [r["seconds"] for r in rows], [r["allocated"] / per for r in rows]
        if rows:
            colour = BLOCK_COLOURS[0] if name == BLOCKWISE else GREY
            left.plot(seconds, held, ls=style, color=colour, lw=1.8, label=name)
    left.set_ylim(0, 1.1 * left.get_ylim()[1])
    caption(left, "while training", "seconds since it began", f"on the device, {unit}")
    legend_below(left, 2)
    _stack(right, bars, per)
    caption(right, "by category", unit)
    return figure


def partition_figure(run: Run) -> Figure:
    """Where training noise is drawn and who owns it; below, the ranges as trained, widened by the overlap."""
    partition = run.partition
    figure, (top, lanes) = new_figure(2, 1, heights=(3, 0.4 + 0.25 * partition.blocks), share=True)
    levels, height = _density_curve(partition, run.level)
    for block, colour in enumerate(colours_of(run)):
        owned, trained, lane = partition.owned(block), partition.trained(block), (block, block)
        span = np.geomspace(owned.low, owned.high, 200)
        top.fill_between(span, np.interp(np.log(span), np.log(levels), height), color=colour, alpha=0.75, lw=0)
        lanes.plot(trained, lane, color=colour, alpha=0.35, lw=7, solid_capstyle="butt")
        lanes.plot(owned, lane, color=colour, lw=7, solid_capstyle="butt")
    top.set_ylim(0, 1.08 * max(height))
    names = [f"block {b}, {n} layer{'s' * (n > 1)}" for b, n in enumerate(partition.layers)]
    lanes.set_yticks(range(partition.blocks), names, fontsize=9 if partition.blocks <= 4 else 7)
    lanes.set_ylim(partition.blocks - 0.4, -0.6)
    over = "$t$" if run.level == "t" else "$\\ln\\,\\sigma$"
    caption(top, "who owns which noise", y=f"density of training\nnoise over {over}")
    pale = "; pale: the overlap in training" if partition.overlap else ""
    noise_axis(lanes, run.level, f"falling as the walk goes{pale}")
    return figure


def bound_figure(run: Run) -> Figure:
    """The information bound by the noise level it is read at: flat where the model is consistent."""
    figure, (axes,) = new_figure(1, 1)
    levels, edges, bit = run.test["levels"], run.partition.edges, 1 / math.log(2)
    bound, left_over = ([v[key] * bit for v in levels] for key in ("bound", "cross_entropy"))
    sigma, top = [v["sigma"] for v in levels], 1.3 * max(bound)
    axes.plot(sigma, left_over, color=GREY, lw=1.2, ls=":", label="cross-entropy left at this noise")
    axes.plot(sigma, bound, color=GREY, lw=1, zorder=1, label="bound: that, plus what higher noise has told")
    for block, colour in enumerate(colours_of(run)):
        span = [i for i, v in enumerate(levels) if v["block"] == block]
        axes.plot([sigma[i] for i in span], [bound[i] for i in span], "o-", ms=4, lw=2.2, color=colour)
        axes.axvspan(edges[block + 1], edges[block], color=colour, alpha=0.08, lw=0)
        middle, regret = math.sqrt(edges[block] * edges[block + 1]), _regret(run, block)
        height = 0.97 if len(edges) <= 5 else 0.97 - 0.07 * (block % 3)  # many narrow blocks: in three rows
        name = f"block {block}\n" if len(edges) <= 5 else f"{block}: "
        axes.text(middle, height * top, f"{name}{regret:+.3f}", ha="center", va="top", **INK)
    axes.set_ylim(0, top)
    total = f"information bound {run.test['bound_bits']:.3f} bits; by block its regret, what it adds to the bound"
    caption(axes, total, y="bits")
    noise_axis(axes, run.level)
    axes.legend(frameon=False, fontsize=9, loc="center left")
    return figure


def passes_figure(run: Run) -> Figure:
    """Accuracy by the number of passes through a recurrent core, beside the baselines'."""
    figure, panels = new_figure(1, 2)
    names = [name for name in run.results if "passes" in run.results[name]["test"]]
    for axes, key, title in zip(panels, ("accuracy", "exact"), ("answers", "whole puzzles"), strict=True):
        for name in names:
            rows = run.results[name]["test"]["passes"]
            style, colour = BASELINES.get(name, "-"), GREY if name in BASELINES else BLOCK_COLOURS[0]
            cost = f"{name}, {run.results[name]['test']['layer_evaluations']:.3g} layer evaluations"
            values = [row["passes"] for row in rows], [row[key] for row in rows]
            axes.plot(*values, marker="o", ls=style, ms=5, lw=2, color=colour, label=cost)
        axes.set_xscale("log", base=2)
        axes.set_ylim(0, 103)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        caption(axes, f"{title} solved, test split", "passes through the core", "%")
    legend_below(panels[0], 1)
    return figure


# name -> the picture, and what of the test results it needs
FIGURES: dict[str, tuple[Callable[[Run], Figure], set[str]]] = {
    "loss": (loss_figure, set()),
    "levels": (levels_figure, {"levels"}),
    "walk": (walk_figure, {"walk"}),
    "memory": (memory_figure, set()),
    "partition": (partition_figure, set()),
    "bound": (bound_figure, {"levels", "bound_bits"}),
    "passes": (passes_figure, {"passes"}),
}


def colours_of(run: Run) -> list[Any]:
    """One a block."""
    return block_colours(len(run.summary["partition"]["layers"]))


def _window(walk: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Limits in percent that show the walk; a baseline far below it doesn't flatten it."""
    least = min(walk)
    low = min([least, *(a for a in others if a > least - 15)])
    high = max([*walk, *others])
    margin = max(0.15 * (high - low), 1.5)
    return max(0.0, low - margin), min(100.5, high + margin)


def _density_curve(partition: Partition, level: str) -> tuple[list[float], list[float]]:
    """Rising levels and the density there, per unit of t or of ln sigma, smoothed over about a bin of a table."""
    low, high = partition.sigma_min, partition.sigma_max
    grid = np.linspace(low, high, 641) if level == "t" else np.geomspace(low, high, 641)
    scale = grid if level == "t" else np.log(grid)
    q = partition.density.cdf(torch.from_numpy(grid)).numpy()
    height = np.diff(q) / (q[-1] - q[0]) / np.diff(scale)
    middle = (scale[1:] + scale[:-1]) / 2
    return (middle if level == "t" else np.exp(middle)).tolist(), smooth(height.tolist(), 16)


def _regret(run: Run, block: int) -> float:
    """In bits; 0 for a last block that owns none of the levels."""
    regrets = run.test["regret_bits"]
    return regrets[block] if block < len(regrets) else 0.0


def _bars(run: Run) -> dict[str, dict[str, int]]:
    """What each bar of the memory picture stands for, top to bottom, and its bytes by category."""
    bars = {PLAN: run.results[BLOCKWISE].get("plan"), BLOCKWISE: run.results[BLOCKWISE]["memory"]}
    bars |= {name: run.results[name].get("memory") for name in BASELINES if name in run.results}
    return {name: {c: int(by.get(c, 0)) for c in CATEGORIES} for name, by in bars.items() if by}


def _stack(axes: Axes, bars: dict[str, dict[str, int]], per: float) -> None:
    """Bars of bytes by category with their totals, and how many times block-wise training's they are."""
    names, left = list(bars), np.zeros(len(bars))
    for category, colour in zip(CATEGORIES, CATEGORY_COLOURS, strict=True):
        sizes = np.array([bars[name][category] / per for name in names])
        drawn = axes.barh(range(len(names)), sizes, 0.6, left=left, color=colour)
        for bar, name in zip(drawn, names, strict=True):
            bar.set_alpha(0.5 if name == PLAN else 1.0)
        left += sizes
    measured = sum(bars[BLOCKWISE].values())
    for i, name in enumerate(names):
        total = sum(bars[name].values())
        text = readable(total) + (f", {total / measured:.1f}x" if name in BASELINES and measured else "")
        axes.annotate(text, (left[i], i), xytext=(4, 0), textcoords="offset points", va="center", **INK)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.5 * max(left))
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    patches = [Patch(color=c, label=name) for name, c in zip(CATEGORIES, CATEGORY_COLOURS, strict=True)]
    legend_below(axes, 3, handles=patches)


def _unit(total: int) -> tuple[str, float]:
    power = max(k for k in range(4) if k == 0 or total >= 1024**k)
    return ("B", "KiB", "MiB", "GiB")[power], 1024.0**power


def _write(figure: Figure, path: Path) -> Path:
    partial = path.with_name(path.name + ".tmp")
    try:
        figure.savefig(partial, format="png", dpi=DPI)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
