"""Layers and stems of somebody's network, made aware of the noise level."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class NoiseEmbedding(nn.Module):
    """c_noise (B,) -> conditioning (B, cond): sinusoids, then an MLP."""

    def __init__(self, cond: int, frequencies: int = 64):
        super().__init__()
        rates = torch.exp(-math.log(1e4) * torch.arange(frequencies) / frequencies)
        self.register_buffer("rates", rates, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, cond), nn.SiLU(), nn.Linear(cond, cond))

    def forward(self, c_noise: Tensor) -> Tensor:
        # c_noise spans about [-1.6, 1.1]: scaled so that the fastest sinusoid turns several times over it
        angles = 16 * c_noise.unsqueeze(-1) * self.rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.mlp[0].weight.dtype))


class Conditioned(nn.Module):
    """Any residual layer h -> layer(h), made aware of the noise by AdaLN around it; the layer itself at the start."""

    def __init__(self, layer: nn.Module, dim: int, cond: int):
        super().__init__()
        self.layer = layer
        own = next(layer.parameters())
        self.linear = nn.Linear(cond, 3 * dim, device=own.device, dtype=own.dtype)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, h: Tensor, cond: Tensor) -> Tensor:
        shift, scale, gate = self.linear(nn.functional.silu(cond)).unsqueeze(1).chunk(3, dim=-1)
        out = self.layer(h * (1 + scale) + shift)
        return h + (1 + gate) * ((out[0] if isinstance(out, tuple) else out) - h)
