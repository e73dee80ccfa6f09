"""Figure of a run's memory on the device: during training, and by category."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ...offload.memory import CATEGORIES
from ..results import BLOCKWISE, Run
from .axes import BASELINES, BLOCK_COLOURS, CATEGORY_COLOURS, GREY, INK, caption, legend_below, new_figure

PLAN = "block-wise,\nplan"


def memory_figure(run: Run) -> Figure:
    """Plot the allocated bytes during training, and the bytes by category, of the plan, the blocks and the baselines.

    Training is shown in percent of its steps: the runs' wall times aren't measured under equal conditions.
    """
    figure, (left, right) = new_figure(1, 2, widths=(1, 1.2))
    bars = _bars(run)
    unit, per = _unit(max(sum(by.values()) for by in bars.values()))
    for name, style in {BLOCKWISE: "-", **BASELINES}.items():
        rows = run.rows.get(name, [])
        done = [100 * r["step"] / rows[-1]["step"] for r in rows]
        colour = BLOCK_COLOURS[0] if name == BLOCKWISE else GREY
        if rows:
            marker = "o" if len(rows) == 1 else None  # a line through one point can't be seen
            allocated = [r["allocated"] / per for r in rows]
            left.plot(done, allocated, ls=style, color=colour, lw=1.8, marker=marker, label=name)
    left.set_xlim(0, 103)
    left.set_ylim(0, 1.1 * left.get_ylim()[1])
    caption(left, "during training", "steps done, %", f"allocated on the device, {unit}")
    legend_below(left, 2)
    _stack(right, bars, unit, per)
    caption(right, "by category", unit)
    return figure


def _bars(run: Run) -> dict[str, dict[str, int]]:
    """Return the bars from top to bottom: name -> bytes by category."""
    bars = {PLAN: run.results[BLOCKWISE].get("plan"), BLOCKWISE: run.results[BLOCKWISE]["memory"]}
    bars |= {name: run.results[name].get("memory") for name in BASELINES if name in run.results}
    return {name: {c: int(by.get(c, 0)) for c in CATEGORIES} for name, by in bars.items() if by}


def _stack(axes: Axes, bars: dict[str, dict[str, int]], unit: str, per: float) -> None:
    """Draw bytes by category, labelled with their total and, for baselines, its ratio to block-wise training's."""
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
        ratio = f", {total / measured:.1f} x block-wise" if name in BASELINES and measured else ""
        text = f"{total / per:.1f} {unit}{ratio}"
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
