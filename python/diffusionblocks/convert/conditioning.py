"""Somebody's stem, layers and head, made aware of the noise level and of z."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

Z_GAIN = 0.1  # of z beside the features it enters: to them it is noise


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
    """A residual layer h -> layer(h) with AdaLN around it, which does nothing at the start.

    h: (B, D) or (B, N, D); cond: (B, C), or (B, N, C) with a level per token.
    """

    def __init__(self, layer: nn.Module, dim: int, cond: int):
        super().__init__()
        self.layer = layer
        own = next(layer.parameters(), torch.empty(0))
        self.linear = nn.Linear(cond, 3 * dim, device=own.device, dtype=own.dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the modulation do nothing; the layer's own weights stay."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, h: Tensor, cond: Tensor) -> Tensor:
        modulation = self.linear(nn.functional.silu(cond))
        if h.dim() == modulation.dim() + 1:
            modulation = modulation.unsqueeze(1)  # one level for all tokens
        shift, scale, gate = modulation.chunk(3, dim=-1)
        out = self.layer(h * (1 + scale) + shift)
        return h + (1 + gate) * ((out[0] if isinstance(out, tuple) else out) - h)


class PlainStem(nn.Module):
    """A stem x -> h that knows no noise; z enters the first token (or each, if z has tokens) by a learned projection.

    Args:
        stem: x -> (B, D) or (B, N, D).
        dim: D.
        z_dim: Width of z, (B, z_dim) or (B, N, z_dim).
        cond: Width of the conditioning.
    """

    def __init__(self, stem: nn.Module, dim: int, z_dim: int, cond: int):
        super().__init__()
        self.stem = stem
        self.z = nn.Linear(z_dim, dim, bias=False)
        nn.init.orthogonal_(self.z.weight, gain=Z_GAIN)
        self.noise = NoiseEmbedding(cond)

    def forward(self, x: Tensor, z: Tensor, c_noise: Tensor) -> tuple[Tensor, Tensor]:
        h, noise = self.stem(x), self.z(z.to(self.z.weight.dtype))
        if h.dim() == noise.dim() + 1:
            h = torch.cat([h[:, :1] + noise.unsqueeze(1).to(h.dtype), h[:, 1:]], dim=1)
        elif h.shape == noise.shape:
            h = h + noise.to(h.dtype)
        else:
            raise ValueError(
                f"the stem gives {tuple(h.shape)}, and z projected to its width is {tuple(noise.shape)}: z needs a "
                "first token or a token each; write the stem as stem(x, z, c_noise) -> (h, cond) instead"
            )
        return h, self.noise(c_noise)


class PlainHead(nn.Module):
    """A head h -> output that knows no noise. `linear`: the head itself, where it is one linear map."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    @property
    def linear(self) -> nn.Linear | None:
        """The whole head, if it is a linear map: its logits then needn't be held all at once."""
        return self.head if type(self.head) is nn.Linear else None

    def features(self, h: Tensor) -> Tensor:
        return h

    def forward(self, h: Tensor, cond: Any) -> Tensor:
        return self.head(h)


def takes(module: nn.Module, *names: str) -> bool:
    """Return whether a module's forward takes as many arguments as there are names: it requires them, or calls some so.

    names: the first argument can have any name, the others are looked for, e.g. takes(layer, "h", "cond").
    """
    parameters = inspect.signature(module.forward).parameters
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters.values())
    return required >= len(names) or all(name in parameters for name in names[1:])
