"""A Diffusion Transformer small enough for tests."""

from __future__ import annotations

from dataclasses import replace

import torch

from diffusionblocks.experiments.models.dit import DiTConfig
from diffusionblocks.experiments.tasks.dit import DiTRun, DiTTask

MODEL = DiTConfig(dim=16, layers=3, heads=2, mlp=24, cond=8, patch=4)
CONFIG = DiTRun(
    model=MODEL, steps=6, visit=2, batch_size=8, sampling_steps=6, baseline=(), ema=0.9, lr=1e-2, guidance=2.0
)


def config(**changes) -> DiTRun:
    return replace(CONFIG, **changes)


def scrambled(**changes):
    """An untrained model with weights where training starts from zeros."""
    model = DiTTask(config(**changes)).model().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model
