"""A run small enough for tests: seconds, not minutes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusionblocks.experiments.models import ViTConfig
from diffusionblocks.experiments.tasks.vit import ViTRun, ViTTask
from diffusionblocks.training.trainer import Trainer

MODEL = ViTConfig(dim=16, layers=3, heads=2, mlp=32, cond=8, patch=4)
CONFIG = ViTRun(
    model=MODEL, steps=12, visit=3, batch_size=16, checkpoint_every=7, baseline=(), sampling_steps=4, ema=0.9
)


def config(out: Path, **changes: Any) -> ViTRun:
    """The tiny run, writing to `out`."""
    return replace(CONFIG, out=out, **changes)


def trainer(config_: ViTRun) -> Trainer:
    """A fresh trainer of the config, waiting blocks on disk."""
    task = ViTTask(config_)
    return task.trainer(task.model(), replace(config_, folder=config_.out / "waiting"))


class RandomBatches:
    """Images that carry their label in the mean of a quadrant: learnable at once, made from the step alone."""

    def __init__(self, size: int = 16):
        self.size = size

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        y = torch.randint(10, (self.size,), generator=generator)
        x = torch.randn(self.size, 1, 8, 8, generator=generator) * 0.1
        x[:, :, :4] += (y.float() / 5 - 1).view(-1, 1, 1, 1)
        return x, y
