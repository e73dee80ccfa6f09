"""Randomness by address: every draw is a function of (seed, purpose, step), so resuming needs no generator state."""

from __future__ import annotations

import hashlib


def stream(seed: int, *purpose: str | int) -> int:
    """A 64-bit key for one purpose of one run, e.g. stream(0, "sigma", block).

    Raises: ValueError if seed is negative.
    """
    if seed < 0:
        raise ValueError(f"seed must be zero or positive, got {seed}")
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
