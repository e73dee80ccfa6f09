"""Made images as PNG files: a grid of them, and how they came about along the walk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from .axes import DPI, block_colours, short

CELL = 64  # smallest width of an image in a grid, in pixels


def to_pixels(images: Tensor) -> Tensor:
    """(N, C, S, S) in [-1, 1] -> uint8 on the CPU; what lies beyond is cut."""
    return ((images.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def write_grid(images: Tensor, path: Path, columns: int) -> Path:
    """(N, C, S, S) uint8 row by row, each pixel enlarged to a square so that an image is at least CELL wide."""
    N, C, S, _ = images.shape
    rows = -(-N // columns)
    cells = torch.full((rows * columns, C, S + 1, S + 1), 255, dtype=torch.uint8)  # a white line between images
    cells[:N, :, :S, :S] = images
    sheet = cells.view(rows, columns, C, S + 1, S + 1).permute(0, 3, 1, 4, 2).reshape(rows * (S + 1), -1, C)
    large = sheet.repeat_interleave(-(-CELL // S), 0).repeat_interleave(-(-CELL // S), 1)
    Image.fromarray(large.squeeze(-1).numpy()).save(path)
    return path


def write_trajectory(estimates: Sequence[tuple[float, int, Tensor]], path: Path, blocks: int) -> Path:
    """What the owners of some levels make of the same images: (sigma, block, D as (N, C, S, S) uint8) a column."""
    rows, columns, colours = len(estimates[0][2]), len(estimates), block_colours(blocks)
    figure = Figure(figsize=(0.8 * columns, 0.8 * rows + 0.5), dpi=DPI)
    FigureCanvasAgg(figure)
    edges = dict(left=0.02, right=0.98, bottom=0.02, top=0.8 * rows / (0.8 * rows + 0.5), wspace=0.05, hspace=0.05)
    every: Any = figure.subplots(rows, columns, squeeze=False, gridspec_kw=edges)
    for column, (sigma, block, images) in enumerate(estimates):
        for row, image in enumerate(images):
            axes = every[row, column]
            axes.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
            axes.set_axis_off()
        every[0, column].set_title(f"$\\sigma$ {short(sigma)}\nblock {block}", fontsize=8, color=colours[block])
    figure.savefig(path, format="png")
    return path
