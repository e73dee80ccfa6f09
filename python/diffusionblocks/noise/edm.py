"""EDM's arithmetic: preconditioning, loss weight, noise levels. No model, no trainer.

Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv 2206.00364.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
P_MEAN, P_STD = -1.2, 1.2
SIGMA_DATA = 0.5
RHO = 7.0


class Coefficients(NamedTuple):
    """EDM's four scalings, each of sigma's shape, float32 (or sigma's own wider dtype)."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def precondition(sigma: Tensor, sigma_data: float) -> Coefficients:
    """EDM's scalings at noise level `sigma`.

    sigma: any shape, > 0, in the units of the target. sigma_data: the target's root mean square per element.
    Raises: ValueError if sigma_data is not positive. Source: arXiv 2206.00364, table 1.
    """
    check_sigma_data(sigma_data)
    sigma = sigma if sigma.dtype == torch.float64 else sigma.float()
    total = sigma.square() + sigma_data**2
    return Coefficients(
        c_skip=sigma_data**2 / total,
        c_out=sigma * sigma_data * total.rsqrt(),
        c_in=total.rsqrt(),
        c_noise=sigma.log() / 4,
    )


def weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """EDM's loss weight 1 / c_out^2, of sigma's shape.

    Raises: ValueError if sigma_data is not positive. Source: arXiv 2206.00364, section 5.
    """
    check_sigma_data(sigma_data)
    sigma = sigma if sigma.dtype == torch.float64 else sigma.float()
    return (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()


def expand_as(coefficient: Tensor, target: Tensor) -> Tensor:
    """`coefficient` of shape (B,) or (B, N) with the trailing axes it needs to broadcast against `target`."""
    return coefficient.reshape(coefficient.shape + (1,) * (target.dim() - coefficient.dim()))


def karras_sigmas(
    steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO
) -> list[float]:
    """Return EDM's falling ramp of `steps` noise levels from sigma_max to sigma_min, without the closing 0.

    Raises: ValueError on steps < 1, rho that is not positive, a range that is not 0 < sigma_min < sigma_max, or levels
    that float64 can't tell apart.
    Source: arXiv 2206.00364, eq. 5.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 < rho < math.inf:
        raise ValueError(f"rho must be a positive number, got {rho}")
    check_range(sigma_min, sigma_max)
    # Equation 5 divided by sigma_max, in logarithms: no root overflows, vanishes or rounds to its neighbour.
    root = math.expm1(math.log(sigma_min / sigma_max) / rho)
    between = [sigma_max * math.exp(rho * math.log1p(t / (steps - 1) * root)) for t in range(1, steps - 1)]
    levels = [sigma_max, *between, sigma_min][:steps]
    if not all(a > b for a, b in itertools.pairwise(levels)):
        raise ValueError(f"rho={rho} makes some of {steps} noise levels equal: choose one nearer to {RHO}")
    return levels


def check_range(sigma_min: float, sigma_max: float) -> None:
    """Raise ValueError unless 0 < sigma_min < sigma_max < inf."""
    if not (0 < sigma_min < sigma_max < math.inf):
        raise ValueError(f"need 0 < sigma_min < sigma_max < inf, got sigma_min={sigma_min}, sigma_max={sigma_max}")


def check_sigma_data(sigma_data: float) -> None:
    """Raise ValueError unless sigma_data is a positive number."""
    if not (0 < sigma_data < math.inf):
        raise ValueError(f"sigma_data must be a positive number (the target's root mean square), got {sigma_data}")


def check_sigma(sigma: Tensor) -> None:
    """Raise ValueError unless every noise level is positive and finite. Waits for the device."""
    if not bool(((sigma > 0) & sigma.isfinite()).all()):
        raise ValueError("sigma must be positive and finite everywhere; a level of 0 or NaN reached a denoiser")
