"""Layers of the reference models."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

import dbkernels

from ...training.settings import take_types


@dataclass(frozen=True)
class LayerConfig:
    """Sizes of a transformer.

    Attributes:
        dim: width of the tokens.
        layers: number of layers.
        heads: number of attention heads.
        mlp: width of the MLP's hidden layer.
        norm_eps: added to the variance in the norms.
    """

    dim: int = 64
    layers: int = 6
    heads: int = 4
    mlp: int = 256
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        take_types(self)
        sizes = {f.name: getattr(self, f.name) for f in fields(self) if f.type == "int"}
        if min(sizes.values()) < 1:
            raise ValueError(f"every size must be at least 1, got {sizes}")
        if self.norm_eps < 0:
            raise ValueError(f"norm_eps must not be negative, got {self.norm_eps}")
        if self.dim % self.heads:
            raise ValueError(f"heads={self.heads} must divide dim={self.dim}")


def check_rotary(config: LayerConfig) -> None:
    """Raise ValueError unless a head's width is even, as rotary positions need."""
    if config.dim // config.heads % 2:
        raise ValueError(f"dim={config.dim} over heads={config.heads} must be even: rotary positions turn pairs")


@dataclass(frozen=True)
class ConditionedConfig(LayerConfig):
    """Config of noise-conditioned models.

    Attributes:
        cond: width of the conditioning.
        gate_start: initial value of AdaLN's gates: 0 is AdaLN-Zero; with 1 a shallow block learns sooner
            (docs/method.md).
        silu_after: apply SiLU after AdaLN's linear layer, as the published code does, instead of before.
    """

    cond: int = 16
    gate_start: float = 1.0
    silu_after: bool = False


class Modulation(nn.Module):
    """Map conditioning (B, C) to `parts` vectors (B, 1, D), or (B, N, C) to (B, N, D); initialised to zero."""

    def __init__(self, cond: int, dim: int, parts: int, silu_after: bool):
        super().__init__()
        self.parts, self.silu_after = parts, silu_after
        self.linear = nn.Linear(cond, parts * dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the modulation do nothing."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, cond: Tensor) -> tuple[Tensor, ...]:
        out = functional.silu(self.linear(cond)) if self.silu_after else self.linear(functional.silu(cond))
        return (out.unsqueeze(1) if out.dim() == 2 else out).chunk(self.parts, dim=-1)


class Layer(nn.Module):
    """Residual attention and MLP on (B, N, D); AdaLN if conditioned, else affine LayerNorm."""

    def __init__(self, config: LayerConfig, conditioned: bool):
        super().__init__()
        d = config.dim
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(d, config.norm_eps, elementwise_affine=not conditioned)
        self.norm2 = nn.LayerNorm(d, config.norm_eps, elementwise_affine=not conditioned)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, config.mlp), nn.GELU(), nn.Linear(config.mlp, d))
        self.modulation = None
        if conditioned:
            assert isinstance(config, ConditionedConfig)
            self.gate_start = config.gate_start
            self.modulation = Modulation(config.cond, d, 6, config.silu_after)

    def forward(self, h: Tensor, cond: Tensor | None) -> Tensor:
        if self.modulation is None:
            h = h + self.attend(self.norm1(h))
            return h + self.mlp(self.norm2(h))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond)
        branch = self.attend(dbkernels.ada_layer_norm(h, shift1, scale1, eps=self.norm1.eps))
        gate1, gate2 = self.gate_start + gate1, self.gate_start + gate2
        h, normed = dbkernels.gated_residual_norm(h, branch, gate1, shift2, scale2, eps=self.norm2.eps)
        return torch.addcmul(h, gate2, self.mlp(normed))

    def attend(self, h: Tensor) -> Tensor:
        B, N, D = h.shape
        q, k, v = self.qkv(h).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, N, D/H)
        out = dbkernels.attention(self.encode_positions(q), self.encode_positions(k), v)
        return self.proj(out.transpose(1, 2).reshape(B, N, D))

    def encode_positions(self, x: Tensor) -> Tensor:
        """Return queries or keys (B, H, N, C) as they are: the stem adds positions to the tokens."""
        return x


class RotaryLayer(Layer):
    """A layer with rotary positions: attention depends on the distances between tokens."""

    def encode_positions(self, x: Tensor) -> Tensor:
        return rotary(x)


def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return h (1 + scale) + shift. h: (B, N, D); shift, scale: (B, 1, D)."""
    return h * (1 + scale) + shift


def rotary(x: Tensor, first: int = 0) -> Tensor:
    """Rotate queries or keys (..., N, C) by their positions first, first + 1, ...; scores depend on distances alone.

    Source: Su et al. 2021, arXiv 2104.09864; here element i pairs with i + C/2.
    """
    half = x.shape[-1] // 2
    rates = 1e4 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(first, first + x.shape[-2], device=x.device).unsqueeze(-1) * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
