"""Figures of a finished run: losses, accuracy along the sampling trajectory, memory, partition and bound.

Each figure is a function from a `Run` to a matplotlib Figure; `draw` writes them all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from ...noise.partition import Partition
from ..results import BLOCKWISE, Run, read_run, signed
from .axes import (
    BASELINES,
    BLOCK_COLOURS,
    DPI,
    GREY,
    INK,
    LIGHT,
    block_colours,
    caption,
    legend_below,
    legend_right,
    log_ticks,
    new_figure,
    noise_axis,
    note,
    short,
    smooth,
)
from .memory import memory_figure

BIT = 1 / math.log(2)


def draw(folder: str | os.PathLike[str]) -> list[Path]:
    """Write the figures of the run in `folder` into it, each atomically, and return their paths.

    Raises:
        ValueError: the folder isn't that of a finished run; the message names what is missing.
    """
    folder = Path(folder)
    run = read_run(folder)
    figures = {f"{name}.png": figure(run) for name, (figure, needs) in FIGURES.items() if needs <= set(run.test)}
    return [_write(figure, folder / name) for name, figure in figures.items()]


def loss_figure(run: Run) -> Figure:
    """Plot each block's training loss by step: logged values and their moving average."""
    figure, (axes,) = new_figure(1, 1)
    for block, colour in enumerate(colours_of(run)):
        rows = [r for r in run.rows[BLOCKWISE] if r["block"] == block]
        steps, losses = [r["step"] for r in rows], [r["loss"] for r in rows]
        axes.plot(steps, losses, "o", color=colour, alpha=0.4, ms=3, mew=0)
        few = "o" if len(rows) < 20 else None
        axes.plot(steps, smooth(losses), color=colour, lw=1.8, marker=few, ms=4, label=f"block {block}")
    every = [r["loss"] for r in run.rows[BLOCKWISE]]
    if max(every) > 10 * min(every) > 0:
        axes.set_yscale("log")
        log_ticks(axes.yaxis, min(every), max(every))
    caption(axes, "training loss by block", "step", "loss" if "loss" in run.test else "loss, nats")
    legend_right(axes)
    return figure


def levels_figure(run: Run) -> Figure:
    """Plot the cross-entropy in bits (for images the loss) by noise level after training, on the test split."""
    figure, (axes,) = new_figure(1, 1)
    key, unit, label = ("loss", 1.0, "loss") if "loss" in run.test else ("cross_entropy", BIT, "cross-entropy, bits")
    for block, colour in enumerate(colours_of(run)):
        span = [v for v in run.test["levels"] if v["block"] == block]
        sigmas, losses = [v["sigma"] for v in span], [v[key] * unit for v in span]
        axes.plot(sigmas, losses, "o-", ms=3.5, lw=1.5, color=colour, label=f"block {block}")
    axes.set_ylim(0)
    classes = run.summary.get("config", {}).get("model", {}).get("num_classes")
    guess = f" (uniform guess: {math.log2(classes):.2f} bits)" if classes and key == "cross_entropy" else ""
    caption(axes, f"{label.split(',')[0]} by noise level after training, test split{guess}", y=label)
    noise_axis(axes, run.level)
    legend_right(axes)
    return figure


def trajectory_figure(run: Run) -> Figure:
    """Plot the accuracy at each step of the sampling trajectory, with standard errors, beside the baselines'."""
    figure, (axes,) = new_figure(1, 1)
    path, images = run.test["trajectory"], run.test.get("images")
    steps, accuracies = [s["step"] for s in path], [s["accuracy"] for s in path]
    errors = np.array([standard_error(a, images) if images else (0.0, 0.0) for a in accuracies]).T  # (2, steps)
    axes.plot(steps, accuracies, color=LIGHT, lw=2, zorder=1)
    for block, colour in enumerate(colours_of(run)):
        own = [i for i, s in enumerate(path) if s["block"] == block]
        points = [steps[i] for i in own], [accuracies[i] for i in own]
        axes.errorbar(
            *points, yerr=errors[:, own], fmt="o-", ms=8, lw=2.5, elinewidth=1, color=colour, label=f"block {block}"
        )
    others = {name: r["test"]["accuracy"] for name, r in run.results.items() if name in BASELINES}
    low, high = _window([*(accuracies - errors[0]), *(accuracies + errors[1])], list(others.values()))
    for name, accuracy in others.items():
        if accuracy >= low:
            axes.axhline(accuracy, color=GREY, ls=BASELINES[name], lw=1.2, zorder=0, label=f"{name} {accuracy:.1f} %")
    below = [f"{name} {accuracy:.1f} %" for name, accuracy in others.items() if accuracy < low]
    if below:
        note(axes, f"below this range: {', '.join(below)}", (0.01, 0.02))
    last = (steps[-1], accuracies[-1] + errors[1, -1])
    axes.annotate(f"{accuracies[-1]:.1f} %", last, xytext=(0, 6), textcoords="offset points", ha="center", **INK)
    axes.set_ylim(low, high)
    if len(path) <= 12:
        axes.set_xticks(steps, [f"{s['step']}\n$\\sigma$={short(s['sigma'])}" for s in path])
    of = f", {images} test images, $\\pm$ one standard error" if images else ", test split"
    caption(axes, f"accuracy along the sampling trajectory{of}", "step", "accuracy, %")
    legend_right(axes)
    return figure


def partition_figure(run: Run) -> Figure:
    """Plot the density of training noise by the block that owns it; below, the ranges trained on, with overlap."""
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
    caption(top, "training noise and the block that owns it", y=f"density of training\nnoise over {over}")
    noise_axis(lanes, run.level, "; pale: overlap in training" if partition.overlap else "")
    return figure


def bound_figure(run: Run) -> Figure:
    """Plot the information bound, in bits, by the noise level down to which it is taken; flat if consistent."""
    figure, (axes,) = new_figure(1, 1)
    levels, edges = run.test["levels"], run.partition.edges
    bound, entropy = ([v[key] * BIT for v in levels] for key in ("bound", "cross_entropy"))
    sigma, top = [v["sigma"] for v in levels], 1.3 * max(*bound, *entropy)
    axes.plot(sigma, entropy, color=GREY, lw=1.2, ls=":", label="cross-entropy at this noise level")
    axes.plot(sigma, bound, color=GREY, lw=1, zorder=1, label="bound: cross-entropy plus information from higher noise")
    for block, colour in enumerate(colours_of(run)):
        span = [i for i, v in enumerate(levels) if v["block"] == block]
        axes.plot([sigma[i] for i in span], [bound[i] for i in span], "o-", ms=4, lw=2.2, color=colour)
        axes.axvspan(edges[block + 1], edges[block], color=colour, alpha=0.08, lw=0)
        middle, regret = math.sqrt(edges[block] * edges[block + 1]), _regret(run, block)
        height = 0.97 if len(edges) <= 5 else 0.97 - 0.07 * (block % 3)  # many narrow blocks: in three rows
        name = f"block {block}\n" if len(edges) <= 5 else f"{block}: "
        axes.text(middle, height * top, f"{name}{signed(regret)}", ha="center", va="top", **INK)
    axes.set_ylim(0, top)
    total = (
        f"information bound {run.test['bound_bits']:.3f} bits; numbers: what each block's range adds to it (its regret)"
    )
    caption(axes, total, y="bits")
    noise_axis(axes, run.level)
    legend_below(axes, 2)
    return figure


def passes_figure(run: Run) -> Figure:
    """Plot the accuracy by the number of passes through a recurrent core, beside the baselines'."""
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


# name -> the figure, and the keys of the test results that it needs
FIGURES: dict[str, tuple[Callable[[Run], Figure], set[str]]] = {
    "loss": (loss_figure, set()),
    "levels": (levels_figure, {"levels"}),
    "trajectory": (trajectory_figure, {"trajectory"}),
    "memory": (memory_figure, set()),
    "partition": (partition_figure, set()),
    "bound": (bound_figure, {"levels", "bound_bits"}),
    "passes": (passes_figure, {"passes"}),
}


def colours_of(run: Run) -> list[Any]:
    """Return one colour per block."""
    return block_colours(len(run.summary["partition"]["layers"]))


def standard_error(accuracy: float, count: int) -> tuple[float, float]:
    """Return how far an accuracy of `count` samples may be too high and too low, all in percent.

    Source: Wilson 1927, the score interval of one standard error, which doesn't vanish at 100 %.
    """
    p = accuracy / 100
    middle = (p + 0.5 / count) / (1 + 1 / count)
    half = math.sqrt(p * (1 - p) / count + 0.25 / count**2) / (1 + 1 / count)
    return 100 * (p - middle + half), 100 * (middle + half - p)


def _window(path: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Return limits in percent that show the trajectory; a baseline more than 15 points below it is left out."""
    least = min(path)
    low = min([least, *(a for a in others if a > least - 15)])
    high = max([*path, *others])
    margin = max(0.15 * (high - low), 1.5)
    return max(0.0, low - margin), min(100.5, high + margin)


def _density_curve(partition: Partition, level: str) -> tuple[list[float], list[float]]:
    """Return rising levels and the density per unit of t or ln sigma, smoothed over about a bin of a Tabulated one."""
    low, high = partition.sigma_min, partition.sigma_max
    grid = np.linspace(low, high, 641) if level == "t" else np.geomspace(low, high, 641)
    scale = grid if level == "t" else np.log(grid)
    q = partition.density.cdf(torch.from_numpy(grid)).numpy()
    height = np.diff(q) / (q[-1] - q[0]) / np.diff(scale)
    middle = (scale[1:] + scale[:-1]) / 2
    return (middle if level == "t" else np.exp(middle)).tolist(), smooth(height.tolist(), 16)


def _regret(run: Run, block: int) -> float:
    """Return the block's regret in bits; 0 for a last block that owns none of the levels."""
    regrets = run.test["regret_bits"]
    return regrets[block] if block < len(regrets) else 0.0


def _write(figure: Figure, path: Path) -> Path:
    partial = path.with_name(path.name + ".tmp")
    try:
        figure.savefig(partial, format="png", dpi=DPI)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
