"""Style of the figures: axes, legends and colours, readable at a README's width. No pyplot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

DPI = 100
GREY, LIGHT = "#444444", "#dddddd"
INK: dict[str, Any] = {"fontsize": 9, "color": GREY}
# Okabe and Ito's colours, safe for colour-blind readers; for more than six blocks, steps of cividis
BLOCK_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
# baseline -> line style
BASELINES: dict[str, Any] = {
    "end-to-end": "--",
    "checkpointing": ":",
    "shallow": (0, (6, 2, 1, 2)),
    "forward-forward": "-.",
    "local": (0, (3, 1, 1, 1, 1, 1)),
    "noprop": (0, (1, 4)),
}
CATEGORY_COLOURS = ("#332288", "#88CCEE", "#999933", "#DDCC77", "#BBBBBB", "#AA4499")


def block_colours(blocks: int) -> list[Any]:
    """Return one colour per block."""
    if blocks <= len(BLOCK_COLOURS):
        return list(BLOCK_COLOURS[:blocks])
    return [matplotlib.colormaps["cividis"](0.94 * b / (blocks - 1)) for b in range(blocks)]


def new_figure(
    rows: int,
    columns: int,
    *,
    widths: Sequence[float] = (),
    heights: Sequence[float] = (),
    share: bool = False,
) -> tuple[Figure, list[Axes]]:
    """Return a figure and its rows x columns axes, row by row. share: the first axes take the second's x axis."""
    figure = Figure(figsize=(8.6, 3.6), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows, columns, width_ratios=widths or None, height_ratios=heights or None)
    every = [figure.add_subplot(grid[i]) for i in range(rows * columns)]
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=LIGHT, lw=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=9, color=GREY)
    if share:
        every[0].sharex(every[1])
        every[0].tick_params(labelbottom=False)
    return figure, every


def caption(axes: Axes, title: str = "", x: str | None = None, y: str | None = None) -> None:
    """Set the title and the axis labels; None leaves a label as it is."""
    axes.set_title(title, fontsize=10)
    if x is not None:
        axes.set_xlabel(x, fontsize=9)
    if y is not None:
        axes.set_ylabel(y, fontsize=9)


def noise_axis(axes: Axes, level: str, also: str = "") -> None:
    """Make the x axis noise from high to low: logarithmic sigma, or linear time t; `also` ends its label."""
    if level == "t":
        axes.set_xlim(1, 0)
        axes.set_xlabel(f"time $t$ (share of masks), sampling runs left to right{also}", fontsize=9)
        return
    axes.set_xscale("log")
    axes.invert_xaxis()
    high, low = axes.get_xlim()
    log_ticks(axes.xaxis, low, high)
    axes.set_xlabel(f"noise level $\\sigma$, sampling runs left to right{also}", fontsize=9)


def log_ticks(axis: Axis, low: float, high: float) -> None:
    """Label a logarithmic axis at powers of ten, and at 2 and 5 between them if it spans three decades or less."""
    axis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 1000 else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.set_minor_formatter(NullFormatter())


def legend_below(axes: Axes, columns: int, handles: Sequence[Artist] | None = None) -> None:
    """Put a legend under the x label, where it covers no data."""
    shown = axes.get_legend_handles_labels()[0] if handles is None else handles
    anchor = (0.45, -0.2)
    axes.legend(
        handles=shown,
        loc="upper center",
        bbox_to_anchor=anchor,
        ncols=columns,
        fontsize=8,
        frameon=False,
        columnspacing=1,
    )


def legend_right(axes: Axes) -> None:
    """Put a legend beside the axes, where it covers no data."""
    columns = 1 + len(axes.get_legend_handles_labels()[0]) // 16
    axes.legend(frameon=False, fontsize=9, ncols=columns, loc="center left", bbox_to_anchor=(1.0, 0.5))


def note(axes: Axes, text: str, at: tuple[float, float], **align: Any) -> None:
    """Write small text at a position in fractions of the axes' width and height."""
    axes.text(at[0], at[1], text, transform=axes.transAxes, **INK, **align)


def short(value: float) -> str:
    """Return a number with two significant digits."""
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


def smooth(values: Sequence[float], window: int | None = None) -> list[float]:
    """Return the centred moving average, shorter at the ends; the default window is a tenth of the values."""
    reach = (len(values) // 10 if window is None else window) // 2
    return [float(np.mean(values[max(0, i - reach) : i + reach + 1])) for i in range(len(values))]
