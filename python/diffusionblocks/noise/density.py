"""Where the noise is drawn: densities over sigma, each by its distribution function and the inverse of it."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from . import edm


class NoiseDensity(Protocol):
    """A density of noise levels on [sigma_min, sigma_max]."""

    @property
    def sigma_min(self) -> float: ...

    @property
    def sigma_max(self) -> float: ...

    def cdf(self, sigma: Tensor) -> Tensor:
        """Probability of a level below `sigma`, float64, of sigma's shape; need not be 0 or 1 at the ends."""
        ...

    def ppf(self, q: Tensor) -> Tensor:
        """The level with probability `q` below it, float64, of q's shape."""
        ...


@dataclass(frozen=True)
class LogNormal:
    """ln sigma ~ N(P_mean, P_std), EDM's training noise. Source: arXiv 2206.00364, table 1."""

    P_mean: float = edm.P_MEAN
    P_std: float = edm.P_STD
    sigma_min: float = edm.SIGMA_MIN
    sigma_max: float = edm.SIGMA_MAX

    def __post_init__(self) -> None:
        edm.check_range(self.sigma_min, self.sigma_max)
        if not (math.isfinite(self.P_mean) and 0 < self.P_std < math.inf):
            raise ValueError(f"need a finite P_mean and P_std > 0, got {self.P_mean}, {self.P_std}")

    def cdf(self, sigma: Tensor) -> Tensor:
        # not ndtr: it is 1 + erf, which has no digits left in the lower tail
        return torch.special.erfc((self.P_mean - sigma.double().log()) / (self.P_std * math.sqrt(2))) / 2

    def ppf(self, q: Tensor) -> Tensor:
        return (self.P_mean + self.P_std * torch.special.ndtri(q.double())).exp()


@dataclass(frozen=True)
class LogUniform:
    """Every octave of sigma equally likely."""

    sigma_min: float = edm.SIGMA_MIN
    sigma_max: float = edm.SIGMA_MAX

    def __post_init__(self) -> None:
        edm.check_range(self.sigma_min, self.sigma_max)

    def cdf(self, sigma: Tensor) -> Tensor:
        return (sigma.double() / self.sigma_min).log() / math.log(self.sigma_max / self.sigma_min)

    def ppf(self, q: Tensor) -> Tensor:
        return self.sigma_min * (q.double() * math.log(self.sigma_max / self.sigma_min)).exp()


@dataclass(frozen=True)
class Uniform:
    """Every sigma equally likely; for comparison."""

    sigma_min: float = edm.SIGMA_MIN
    sigma_max: float = edm.SIGMA_MAX

    def __post_init__(self) -> None:
        edm.check_range(self.sigma_min, self.sigma_max)

    def cdf(self, sigma: Tensor) -> Tensor:
        return (sigma.double() - self.sigma_min) / (self.sigma_max - self.sigma_min)

    def ppf(self, q: Tensor) -> Tensor:
        return self.sigma_min + q.double() * (self.sigma_max - self.sigma_min)


@dataclass(frozen=True)
class Tabulated:
    """A density given by its mass in bins of ln sigma, constant within a bin.

    log_edges: K+1 rising values of ln sigma. mass: K non-negative numbers, not all zero.
    Raises: ValueError if the lengths or the order are wrong, or a mass is negative or not finite.
    """

    log_edges: tuple[float, ...]
    mass: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.log_edges) != len(self.mass) + 1:
            raise ValueError(f"{len(self.mass)} bins need {len(self.mass) + 1} edges, got {len(self.log_edges)}")
        rising = all(a < b for a, b in zip(self.log_edges, self.log_edges[1:], strict=False))
        if not (rising and all(math.isfinite(e) for e in self.log_edges)):
            raise ValueError("log_edges must be finite and rise strictly")
        if not all(0 <= m < math.inf for m in self.mass) or sum(self.mass) <= 0:
            raise ValueError("mass must be finite, non-negative and not all zero")

    @property
    def sigma_min(self) -> float:
        return math.exp(self.log_edges[0])

    @property
    def sigma_max(self) -> float:
        return math.exp(self.log_edges[-1])

    def cdf(self, sigma: Tensor) -> Tensor:
        edges, heights = _knots(self, sigma.device)
        return _interpolate(sigma.double().log(), edges, heights)

    def ppf(self, q: Tensor) -> Tensor:
        edges, heights = _knots(self, q.device)
        return _interpolate(q.double(), heights, edges).exp()


@functools.lru_cache(maxsize=64)
def _knots(density: Tabulated, device: torch.device) -> tuple[Tensor, Tensor]:
    """Bin edges and the distribution function at them. An empty bin gets a sliver, so that the inverse exists."""
    mass = torch.tensor(density.mass, dtype=torch.float64)
    mass = mass / mass.sum() + 1e-9
    heights = torch.cat([torch.zeros(1, dtype=torch.float64), mass.cumsum(0) / mass.sum()])
    return torch.tensor(density.log_edges, dtype=torch.float64).to(device), heights.to(device)


def _interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    i = torch.searchsorted(knots, x.contiguous()).clamp(1, len(knots) - 1)
    t = (x - knots[i - 1]) / (knots[i] - knots[i - 1])
    return values[i - 1] + t.clamp(0, 1) * (values[i] - values[i - 1])


_KINDS = {"log_normal": LogNormal, "log_uniform": LogUniform, "uniform": Uniform, "tabulated": Tabulated}


def to_dict(density: NoiseDensity) -> dict[str, Any]:
    """`density` as plain JSON values; `from_dict` is its inverse."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(density, cls))
    return {"kind": kind, **vars(density)}


def from_dict(values: dict[str, Any]) -> NoiseDensity:
    """The density that `to_dict` wrote. Raises: ValueError on an unknown kind."""
    kind = values.get("kind")
    if kind not in _KINDS:
        raise ValueError(f"unknown noise density {kind!r}; known: {', '.join(_KINDS)}")
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k != "kind"}
    return _KINDS[kind](**fields)
