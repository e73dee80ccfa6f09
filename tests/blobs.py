"""A data set of blobs, and the digits ViT's tiny run on it."""

from __future__ import annotations

import torch

import tiny
from diffusionblocks.experiments.data.images import ImageData, Split
from diffusionblocks.experiments.tasks.vit import ViTTask


def blobs(count: int, seed: int) -> Split:
    """Images whose upper half's brightness is their label: plain, but not given away by one pixel."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    noise = torch.randint(-8, 8, (count, 1, 8, 8), generator=generator)
    images = torch.full((count, 1, 8, 8), 60)
    images[:, :, :4] = 30 + 20 * labels.view(-1, 1, 1, 1)
    return Split((images + noise).to(torch.uint8), labels)


DATA = ImageData("blobs", blobs(200, 0), blobs(60, 1), blobs(60, 2), 10, (0.4,), (0.25,))


def task(tmp_path, **changes):
    settings = {"steps": 60, "tune_lr": (1e-2,), "tune_warmup": (0.1,), "batch_size": 32, **changes}
    task = ViTTask(tiny.config(tmp_path, **settings))
    task.data = DATA
    return task
