"""Randomness by address: every draw is a function of (seed, purpose, step), so resuming needs no generator state."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

import dbkernels


def stream(seed: int, *purpose: str | int) -> int:
    """A 64-bit key for one purpose of one run, e.g. stream(0, "sigma", block).

    Raises: ValueError if seed is negative; TypeError on a tensor, whose text isn't its value.
    """
    if any(isinstance(value, Tensor) for value in (seed, *purpose)):
        raise TypeError("a stream's seed and purpose must be numbers or words, got a tensor: read it first")
    if seed < 0:
        raise ValueError(f"seed must be zero or positive, got {seed}")
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def draw(logits: Tensor, *, seed: int, offset: int = 0) -> Tensor:
    """Draw tokens (...) from softmax(logits), logits (..., V), by the Gumbel trick: the same for one (seed, offset) on
    every device. Tokens are drawn down to probabilities of 2^-47."""
    coarse, fine = dbkernels.philox_uniform((2, *logits.shape), seed=seed, offset=offset, device=logits.device).double()
    # Uniforms are odd multiples of 2^-24: a second one fills the gap around the first. With one alone the exponential
    # had no value below 2^-24, so a token of smaller probability could win no race.
    uniform = coarse + (fine - 0.5) * 2.0**-23
    exponential = -torch.log1p(-uniform)
    return (logits.double() - exponential.log()).argmax(-1)
