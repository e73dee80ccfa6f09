"""A causal language model small enough for tests."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffusionblocks.experiments.models.causal_lm import CausalLMConfig
from diffusionblocks.experiments.tasks.causal_lm import CausalLMRun, CausalLMTask

MODEL = CausalLMConfig(dim=16, layers=3, heads=2, mlp=24, cond=8, vocab_size=12)
KINDS = {
    "one stream": MODEL,
    "own z": replace(MODEL, sees_z=True),
    "groups of 4": replace(MODEL, sees_z=True, group_size=4),
}
N = 12
kinds = pytest.mark.parametrize("model", KINDS.values(), ids=KINDS)


def config(model: CausalLMConfig = MODEL, **changes) -> CausalLMRun:
    base = CausalLMRun(
        model=model,
        blocks=3,
        length=N,
        batch_size=8,
        steps=8,
        visit=2,
        warmup=0.2,
        sampling_steps=4,
        combine="none",
        baseline=(),
    )
    return replace(base, **changes)


def blocks(model: CausalLMConfig, scale: float = 0.5, **changes):
    """An untrained model with weights where training starts from zeros, in float64: logits that mean something."""
    made = CausalLMTask(config(model, **changes)).model().double().eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "modulation" in name or "head" in name:
                p.add_(scale * torch.randn(p.shape))
    return made


def noised(model, x):
    z = model.target.clean(x) + 0.3 * torch.randn(*x.shape, 16, dtype=torch.float64)
    return z, torch.full(model.target.level_shape(x), 0.3)
