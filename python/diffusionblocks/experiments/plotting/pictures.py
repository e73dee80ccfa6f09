"""Write generated images as PNG files: a labelled grid, and the estimates along the sampling trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

CELL = 64  # smallest width of an image in a grid, in pixels
CAPTION = 14  # height of a label in a grid, in pixels


def to_pixels(images: Tensor) -> Tensor:
    """Convert images in [-1, 1] to uint8 on the CPU; values beyond are clamped."""
    return ((images.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def write_grid(images: Tensor, path: Path, columns: int, labels: Sequence[object] = ()) -> Path:
    """Write images row by row, pixels enlarged so that an image is at least CELL wide, each under its label.

    Args:
        images: (N, C, S, S) uint8.
        path: the PNG file.
        columns: images per row.
        labels: N class names or numbers; none are drawn by default.

    Raises:
        ValueError: another number of labels.
    """
    N, C, S, _ = images.shape
    if len(labels) not in (0, N):
        raise ValueError(f"labels must be as many as the {N} images or none, got {len(labels)}")
    rows, zoom, caption = -(-N // columns), -(-CELL // S), CAPTION if len(labels) else 0
    side = zoom * (S + 1)  # with a white line between images
    cells = torch.full((rows * columns, C, caption + side, side), 255, dtype=torch.uint8)
    enlarged = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    cells[:N, :, caption : caption + zoom * S, : zoom * S] = enlarged
    sheet = cells.view(rows, columns, C, caption + side, side).permute(0, 3, 1, 4, 2).reshape(-1, columns * side, C)
    picture = Image.fromarray(sheet.squeeze(-1).numpy())
    for i, label in enumerate(labels):
        corner = i % columns * side, i // columns * (caption + side)
        ImageDraw.Draw(picture).text(corner, str(label)[: side // 7], fill=0 if C == 1 else (0, 0, 0))
    picture.save(path)
    return path


def write_trajectory(
    estimates: Sequence[tuple[float, int, Tensor]], path: Path, blocks: int, labels: Sequence[object] = ()
) -> Path:
    """Write the estimates of the same images at some noise levels, a column per level and a row per image.

    Args:
        estimates: per column sigma, the block that owns it, and D as (N, C, S, S) uint8.
        path: the PNG file.
        blocks: number of blocks.
        labels: N class names or numbers, one per row; none are drawn by default.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # most of a second, which a start need not wait for
    from matplotlib.figure import Figure

    from .axes import DPI, block_colours, short

    rows, columns, colours = len(estimates[0][2]), len(estimates), block_colours(blocks)
    margin = 0.02 + max((0.1 + 0.08 * len(str(label)) for label in labels), default=0.0)  # inches
    figure = Figure(figsize=(0.8 * columns + margin, 0.8 * rows + 0.5), dpi=DPI)
    FigureCanvasAgg(figure)
    left, top = margin / (0.8 * columns + margin), 0.8 * rows / (0.8 * rows + 0.5)
    edges = dict(left=left, right=0.98, bottom=0.02, top=top, wspace=0.05, hspace=0.05)
    every: Any = figure.subplots(rows, columns, squeeze=False, gridspec_kw=edges)
    for column, (sigma, block, images) in enumerate(estimates):
        for row, image in enumerate(images):
            axes = every[row, column]
            axes.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
            axes.set_axis_off()
            if column == 0 and len(labels):
                axes.text(-0.1, 0.5, labels[row], transform=axes.transAxes, ha="right", va="center", fontsize=8)
        every[0, column].set_title(f"$\\sigma$ {short(sigma)}\nblock {block}", fontsize=8, color=colours[block])
    figure.savefig(path, format="png")
    return path
