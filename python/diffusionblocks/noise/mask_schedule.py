"""Masked diffusion's schedule: how many tokens stay at time t, the loss's weight, and each block's share of time.

alpha(t) = (1 - 2e-4)(1 - t) + 1e-4 is the probability that a token is still itself, from nearly 1 at t = 0 to nearly 0
at t = 1. Source: Shi et al. 2024 (MD4).
"""

from __future__ import annotations

import torch
from torch import Tensor

import dbkernels

MARGIN = 1e-4  # keeps alpha off 0 and 1, and the weight finite


def alpha(t: Tensor) -> Tensor:
    """Probability of keeping a token at time t in [0, 1]."""
    return (1 - 2 * MARGIN) * (1 - t) + MARGIN


def weight(t: Tensor) -> Tensor:
    """-alpha'(t) / (1 - alpha(t)): of the masked tokens' cross-entropy in the bound."""
    return (1 - 2 * MARGIN) / (1 - alpha(t))


def edges(blocks: int) -> list[float]:
    """B + 1 falling times, from 1 to 0: block b, with block 0 at the input and the most masks, owns edges[b] to
    edges[b + 1]. All intervals have the same mass alpha(t_b+1) - alpha(t_b), so the blocks work alike.

    Raises: ValueError if blocks is less than 1.
    """
    if blocks < 1:
        raise ValueError(f"blocks={blocks} must be at least 1")
    return [1 - b / blocks for b in range(blocks + 1)]


def times(
    high: float, low: float, count: int, *, seed: int, offset: int = 0, device: str | torch.device = "cpu"
) -> Tensor:
    """`count` times in [low, high], one in each of as many equal parts, in order: low discrepancy. (count,), float32.

    Raises: ValueError unless 0 <= low < high <= 1 and count is positive.
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"times need 0 <= low < high <= 1, got low={low}, high={high}")
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    first = dbkernels.philox_uniform((1,), seed=seed, offset=offset, device=device)
    part = (first + torch.arange(count, device=device) / count) % 1
    return low + (high - low) * part
