"""Whose turn it is, and the learning rate: functions of the step alone, so that a resumed run needs no more."""

from __future__ import annotations

import functools
import math

import torch

from ..noise.rng import stream


def turn(visit: int, blocks: int, *, seed: int) -> int:
    """Return the block of a visit: every block once per round of visits, in an order drawn for the round."""
    return _order(visit // blocks, blocks, seed)[visit % blocks]


@functools.lru_cache(maxsize=4)
def _order(round_: int, blocks: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(stream(seed, "round", round_))
    order: list[int] = torch.randperm(blocks, generator=generator).tolist()
    return order


def learning_rate(step: int, *, steps: int | None, peak: float, warmup: int) -> float:
    """Return the rate of a step: linear warm-up to `peak`, then a cosine to zero from `steps` on; None: constant."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if steps is None:
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * min(1, (step - warmup) / max(1, steps - warmup))))
