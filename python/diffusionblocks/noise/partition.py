"""Which block owns which noise: edges, overlap, layers per block, and the one sigma-to-block function."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import edm
from .density import LogUniform, NoiseDensity, Uniform
from .density import from_dict as density_from_dict
from .density import to_dict as density_to_dict

LARGEST_EXPONENT = 700.0  # e to it is the largest float64, nearly: beyond any range's width


class Range(NamedTuple):
    """Noise levels from `low` to `high`, in the target's units."""

    low: float
    high: float


@dataclass(frozen=True)
class Partition:
    """B blocks, the noise each owns and the layers each holds. Block 0 is at the input and owns the highest noise.

    density: where training noise is drawn. edges: B+1 falling levels from sigma_max to sigma_min, rounded to float32
    so that a comparison gives the same owner in every dtype. layers: layers per block, B numbers.
    overlap: each range is widened by this fraction of its log width at both ends for training; ownership is not.
    Raises: ValueError on edges that don't fall, counts that don't match, or a negative overlap.
    Source: arXiv 2506.14202.
    """

    density: NoiseDensity
    edges: tuple[float, ...]
    layers: tuple[int, ...]
    overlap: float = 0.05

    def __post_init__(self) -> None:
        object.__setattr__(self, "edges", tuple(_float32(e) for e in self.edges))
        if not self.layers or len(self.edges) != len(self.layers) + 1:
            raise ValueError(f"B >= 1 blocks need B + 1 edges, got layers={self.layers}, edges={self.edges}")
        if not all(math.inf > a > b > 0 for a, b in zip(self.edges, self.edges[1:], strict=False)):
            raise ValueError(f"edges must be finite, fall strictly and stay positive, got {self.edges}")
        if any(n < 1 for n in self.layers):
            raise ValueError(f"every block needs at least one layer, got layers={self.layers}")
        if not 0 <= self.overlap < math.inf:
            raise ValueError(f"overlap must be zero or a positive fraction, got {self.overlap}")
        for block in range(self.blocks):
            self._check_mass(block)

    @property
    def blocks(self) -> int:
        """B."""
        return len(self.layers)

    @property
    def sigma_min(self) -> float:
        return self.edges[-1]

    @property
    def sigma_max(self) -> float:
        return self.edges[0]

    def owned(self, block: int) -> Range:
        """The levels that `block` serves at inference. Raises: ValueError if there is no such block."""
        self.check_block(block)
        return Range(self.edges[block + 1], self.edges[block])

    def trained(self, block: int) -> Range:
        """The levels that `block` is trained on: its own, widened by `overlap`, cut to [sigma_min, sigma_max]."""
        low, high = self.owned(block)
        margin = math.exp(min(self.overlap * math.log(high / low), LARGEST_EXPONENT))
        return Range(max(low / margin, self.sigma_min), min(high * margin, self.sigma_max))

    def block_of(self, sigma: float | Tensor) -> Tensor:
        """The block that owns `sigma` (any shape, int64 out). An edge belongs to the block below, where a step starts.

        Levels above sigma_max belong to block 0, below sigma_min to block B-1.
        """
        level = torch.as_tensor(sigma).float()
        inner = torch.tensor(self.edges[1:-1], dtype=torch.float32, device=level.device)
        return (level.unsqueeze(-1) <= inner).sum(-1)

    @torch._disable_dynamo  # reads a tensor, which a compiler would warn of
    def owner(self, sigma: float) -> int:
        """Return the block that owns one level, as `block_of`."""
        return int(self.block_of(sigma))

    def draw(self, block: int, u: Tensor) -> Tensor:
        """Training noise of `block` from uniforms `u` in (0, 1): float32, u's shape and device, no host sync.

        The inverse distribution function of the density cut to the block's widened range.
        """
        return self._draw(self.trained(block), u)

    def draw_any(self, u: Tensor) -> Tensor:
        """The same over the whole range of noise, whoever owns it."""
        return self._draw(Range(self.sigma_min, self.sigma_max), u)

    def _draw(self, cut: Range, u: Tensor) -> Tensor:
        q_low, q_high = self._quantiles(cut)
        sigma = self.density.ppf(q_low + u.double() * (q_high - q_low))
        return sigma.clamp(cut.low, cut.high).float()

    def _quantiles(self, cut: Range) -> tuple[float, float]:
        q_low, q_high = self.density.cdf(torch.tensor(cut, dtype=torch.float64)).tolist()
        return q_low, q_high

    def _check_mass(self, block: int) -> None:
        low, high = self.trained(block)
        q_low, q_high = self._quantiles(Range(low, high))
        # fewer than a thousand float64 steps between the quantiles: the draws would be a few levels, or one
        if not q_high - q_low > 1e3 * sys.float_info.epsilon * q_high:
            raise ValueError(
                f"the density has no mass between {low:.4g} and {high:.4g}, which edges give to block {block}: "
                "choose edges inside the density, or a wider density"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the partition as plain JSON values."""
        noise = {k: list(v) if isinstance(v, tuple) else v for k, v in density_to_dict(self.density).items()}
        return {"density": noise, "edges": list(self.edges), "layers": list(self.layers), "overlap": self.overlap}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Partition:
        """Return the partition that `to_dict` wrote."""
        noise = density_from_dict(values["density"])
        return cls(noise, tuple(values["edges"]), tuple(values["layers"]), values["overlap"])

    def check_block(self, block: int) -> None:
        """Raise ValueError unless 0 <= block < B."""
        if not 0 <= block < self.blocks:
            raise ValueError(f"block must be in [0, {self.blocks}), got {block}")


def spread_layers(layers: int, blocks: int) -> tuple[int, ...]:
    """`layers` over `blocks` as evenly as they go, the blocks at the input taking the remainder; none is dropped.

    Raises: ValueError if there are fewer layers than blocks.
    """
    if not 1 <= blocks <= layers:
        raise ValueError(f"blocks must be between 1 and the number of layers ({layers}), got {blocks}")
    return tuple(layers // blocks + (b < layers % blocks) for b in range(blocks))


def equal_mass_edges(density: NoiseDensity, blocks: int) -> tuple[float, ...]:
    """B+1 falling levels that give every block the same probability under `density`, cut to its range.

    Source: arXiv 2506.14202.
    """
    return _equal_mass(density, density.sigma_max, density.sigma_min, blocks)


def _equal_mass(density: NoiseDensity, high: float, low: float, parts: int) -> tuple[float, ...]:
    if parts < 1:
        raise ValueError(f"blocks must be at least 1, got {parts}")
    ends = density.cdf(torch.tensor([high, low], dtype=torch.float64))
    q = ends[0] + (ends[1] - ends[0]) * torch.arange(1, parts, dtype=torch.float64) / parts
    return (high, *density.ppf(q).tolist(), low)


def make_partition(
    density: NoiseDensity,
    layers: int | Sequence[int],
    blocks: int | None = None,
    *,
    by: str = "probability",
    edges: Sequence[float] | None = None,
    overlap: float = 0.05,
) -> Partition:
    """Cut layers and noise into blocks.

    layers: how many in all (spread over `blocks`), or explicit counts per block. by: "probability" (equal mass under
    `density`), "uniform" (equal width in sigma) or "log_uniform" (equal width in ln sigma). edges: explicit levels
    instead, falling, B+1 of them.
    Raises: ValueError if the counts don't fit together or `by` is unknown.
    """
    if isinstance(layers, int):
        counts = spread_layers(layers, len(edges) - 1 if blocks is None and edges is not None else blocks or 1)
    else:
        counts = tuple(layers)
    if blocks is not None and len(counts) != blocks:
        raise ValueError(f"layers={counts} names {len(counts)} blocks, blocks={blocks}")
    if edges is None:
        edges = equal_mass_edges(_rule(density, by), len(counts))
    return Partition(density, tuple(edges), counts, overlap)


def _rule(density: NoiseDensity, by: str) -> NoiseDensity:
    rules: dict[str, NoiseDensity] = {
        "probability": density,
        "uniform": Uniform(density.sigma_min, density.sigma_max),
        "log_uniform": LogUniform(density.sigma_min, density.sigma_max),
    }
    if by not in rules:
        raise ValueError(f"by must be one of {', '.join(rules)}, got {by!r}")
    return rules[by]


@torch._disable_dynamo  # lists of numbers: a compiler would warn of each read of a tensor
def step_levels(partition: Partition, steps: int, *, kind: str = "karras", rho: float = edm.RHO) -> list[float]:
    """`steps` falling levels a sampler starts its steps from, at least one in every block's range, then 0.

    kind: "karras" (EDM's ramp) or "probability" (equal mass under the density). Levels are rounded to float32.
    A block that the ramp jumps over gets its upper edge, in place of the nearest level of a block that has several.
    Raises: ValueError if steps < B or kind is unknown.
    """
    if steps < partition.blocks:
        raise ValueError(f"steps must be at least the number of blocks ({partition.blocks}), got {steps}")
    if kind == "karras":
        levels = edm.karras_sigmas(steps, partition.sigma_min, partition.sigma_max, rho)
    elif kind == "probability":
        levels = list(_equal_mass(partition.density, partition.sigma_max, partition.sigma_min, steps)[:-1])
    else:
        raise ValueError(f"kind must be 'karras' or 'probability', got {kind!r}")
    return [*_visit_every_block(partition, [_float32(s) for s in levels]), 0.0]


def _visit_every_block(partition: Partition, levels: list[float]) -> list[float]:
    for block in range(partition.blocks):
        owners = partition.block_of(torch.tensor(levels)).tolist()
        if block in owners:
            continue
        edge = partition.edges[block]
        spare = [i for i, owner in enumerate(owners) if i > 0 and owners.count(owner) > 1]
        levels[min(spare, key=lambda i: abs(math.log(levels[i] / edge)))] = edge
        levels.sort(reverse=True)
    return levels


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()
