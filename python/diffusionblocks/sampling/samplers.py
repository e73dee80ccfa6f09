"""Samplers: functions over (denoise, z, sigmas), without state.

denoise(z, sigma) -> D. sigmas: falling levels, the last 0. callback(step, sigma, D) sees every first evaluation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
Callback = Callable[[int, float, Tensor], None]


def euler(denoise: Denoise, z: Tensor, sigmas: Sequence[float], callback: Callback | None = None) -> Tensor:
    """z' = r z + (1 - r) D with r = sigma'/sigma; the step to 0 returns D.

    Source: arXiv 2206.00364, algorithm 1 without churn; arXiv 2506.14202 prints the opposite sign.
    """
    check_sigmas(sigmas)
    for i, (sigma, target) in enumerate(itertools.pairwise(sigmas)):
        D = denoise(z, sigma)
        if callback:
            callback(i, sigma, D)
        z = _step(z, D, sigma, target)
    return z


def heun(denoise: Denoise, z: Tensor, sigmas: Sequence[float], callback: Callback | None = None) -> Tensor:
    """Second order: each step averages the slopes at both of its ends; the second may belong to the next block.

    Source: arXiv 2206.00364, algorithm 1 without churn.
    """
    check_sigmas(sigmas)
    for i, (sigma, target) in enumerate(itertools.pairwise(sigmas)):
        D = denoise(z, sigma)
        if callback:
            callback(i, sigma, D)
        ahead = _step(z, D, sigma, target)
        if target > 0:
            slope = ((z - D) / sigma + (ahead - denoise(ahead, target)) / target) / 2
            ahead = z + (target - sigma) * slope
        z = ahead
    return z


def dpmpp_2m(denoise: Denoise, z: Tensor, sigmas: Sequence[float], callback: Callback | None = None) -> Tensor:
    """DPM-Solver++(2M): one evaluation a step, second order by extrapolating D over ln sigma from the step before.

    Source: Lu et al. 2022, arXiv 2211.01095, algorithm 2, with lambda = -ln sigma.
    """
    check_sigmas(sigmas)
    before, width_before = None, 0.0
    for i, (sigma, target) in enumerate(itertools.pairwise(sigmas)):
        D = denoise(z, sigma)
        if callback:
            callback(i, sigma, D)
        width = math.log(sigma / target) if target > 0 else math.inf
        guess = D
        if before is not None and target > 0:
            guess = D + width / (2 * width_before) * (D - before)
        z, before, width_before = _step(z, guess, sigma, target), D, width
    return z


def guided(denoise: Denoise, without: Denoise, guidance: float) -> Denoise:
    """D without the condition, and `guidance` times what the condition changes: 1 is `denoise` itself, at one call.

    Source: Ho and Salimans 2022, arXiv 2207.12598, with guidance = 1 + w.
    """
    if guidance == 1:
        return denoise

    def both(z: Tensor, sigma: float) -> Tensor:
        D = without(z, sigma)
        return D + guidance * (denoise(z, sigma) - D)

    return both


def _step(z: Tensor, D: Tensor, sigma: float, target: float) -> Tensor:
    r = target / sigma
    return r * z + (1 - r) * D


def check_sigmas(sigmas: Sequence[float]) -> None:
    """Raise ValueError unless the levels fall strictly, are finite, and end at 0."""
    if len(sigmas) < 2 or sigmas[-1] != 0:
        raise ValueError("sigmas must hold at least one level and end with 0")
    if not all(math.inf > a > b for a, b in itertools.pairwise(sigmas)):
        raise ValueError(f"sigmas must fall strictly from a finite level, got {list(sigmas)}")


SAMPLERS = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}
