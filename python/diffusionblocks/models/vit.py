"""A small Vision Transformer: stem, layers, head; each takes a conditioning vector or none."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

_SIZES = ("image_size", "channels", "classes", "patch", "dim", "layers", "heads", "mlp", "cond")


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a Vision Transformer. mlp, cond: widths of the MLP and of the noise conditioning.

    gate_start: what AdaLN's gates start from: 0 is AdaLN-Zero; from 1 a shallow block learns sooner (docs/method.md).
    z_gain: what c_in z is multiplied by as it enters the first token, where it is noise to the classifier's features.
    silu_after: put SiLU after AdaLN's linear layer, as the published code does, not before it.
    """

    image_size: int = 8
    channels: int = 1
    classes: int = 10
    patch: int = 2
    dim: int = 64
    layers: int = 6
    heads: int = 4
    mlp: int = 256
    cond: int = 16
    norm_eps: float = 1e-6
    gate_start: float = 1.0
    z_gain: float = 0.1
    silu_after: bool = False

    def __post_init__(self) -> None:
        sizes = {name: value for name, value in vars(self).items() if name in _SIZES}
        if min(sizes.values()) < 1:
            raise ValueError(f"every size must be at least 1, got {sizes}")
        if self.image_size % self.patch:
            raise ValueError(f"patch={self.patch} must divide image_size={self.image_size}")
        if self.dim % self.heads:
            raise ValueError(f"heads={self.heads} must divide dim={self.dim}")

    @property
    def tokens(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch) ** 2


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


class Modulation(nn.Module):
    """Conditioning (B, C) -> `parts` vectors (B, 1, D), all zero at the start."""

    def __init__(self, cond: int, dim: int, parts: int, silu_after: bool):
        super().__init__()
        self.parts, self.silu_after = parts, silu_after
        self.linear = nn.Linear(cond, parts * dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, cond: Tensor) -> tuple[Tensor, ...]:
        out = functional.silu(self.linear(cond)) if self.silu_after else self.linear(functional.silu(cond))
        return out.unsqueeze(1).chunk(self.parts, dim=-1)


class Layer(nn.Module):
    """Attention and MLP on (B, N, D), each with a residual; AdaLN where conditioned, affine LayerNorm where not."""

    def __init__(self, config: ViTConfig, conditioned: bool):
        super().__init__()
        d = config.dim
        self.heads, self.gate_start = config.heads, config.gate_start
        self.norm1 = nn.LayerNorm(d, config.norm_eps, elementwise_affine=not conditioned)
        self.norm2 = nn.LayerNorm(d, config.norm_eps, elementwise_affine=not conditioned)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, config.mlp), nn.GELU(), nn.Linear(config.mlp, d))
        self.modulation = Modulation(config.cond, d, 6, config.silu_after) if conditioned else None

    def forward(self, h: Tensor, cond: Tensor | None) -> Tensor:
        if self.modulation is None:
            h = h + self.attend(self.norm1(h))
            return h + self.mlp(self.norm2(h))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond)
        h = h + (self.gate_start + gate1) * self.attend(modulate(self.norm1(h), shift1, scale1))
        return h + (self.gate_start + gate2) * self.mlp(modulate(self.norm2(h), shift2, scale2))

    def attend(self, h: Tensor) -> Tensor:
        B, N, D = h.shape
        q, k, v = self.qkv(h).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, N, D/H)
        out = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(B, N, D))


def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN's affine map. h: (B, N, D); shift, scale: (B, 1, D)."""
    return h * (1 + scale) + shift


class Stem(nn.Module):
    """Images (B, C, S, S) -> tokens (B, 1 + N, D). The first token is a learned one, plus z_gain c_in z.

    Returns the tokens and the conditioning (B, cond), None where there is no noise.
    """

    def __init__(self, config: ViTConfig, conditioned: bool):
        super().__init__()
        self.config = config
        self.patch = nn.Conv2d(config.channels, config.dim, config.patch, config.patch)
        self.position = nn.Parameter(torch.randn(1, 1 + config.tokens, config.dim) * 0.02)
        self.noise = NoiseEmbedding(config.cond) if conditioned else None
        self.cls = None if conditioned else nn.Parameter(torch.randn(1, 1, config.dim) * 0.02)

    def forward(
        self, x: Tensor, z: Tensor | None = None, c_noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        patches = self.patch(x).flatten(2).transpose(1, 2)  # (B, N, D)
        if self.cls is not None:
            return torch.cat([self.cls.expand(len(x), -1, -1), patches], dim=1) + self.position, None
        assert self.noise is not None and z is not None
        token = (self.config.z_gain * z).unsqueeze(1).to(patches.dtype)
        tokens = torch.cat([token, patches], dim=1)  # position 0 is learned: it is the [CLS] token
        return tokens + self.position, self.noise(c_noise)

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless `x` is a non-empty floating batch of this model's images."""
        shape = (self.config.channels, self.config.image_size, self.config.image_size)
        if x.dim() != 4 or tuple(x.shape[1:]) != shape or len(x) == 0:
            raise ValueError(f"images must be (B >= 1, {', '.join(map(str, shape))}), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"images must be floating (normalised), got {x.dtype}")
        own = self.patch.weight.dtype
        if x.dtype != own and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"images are {x.dtype}, the model is {own}: cast them with .to({own})")


class Head(nn.Module):
    """Class logits from the first token: `features` is its final norm (B, D), forward the map to logits (B, K)."""

    def __init__(self, config: ViTConfig, conditioned: bool, norm_eps: float | None = None):
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, config.norm_eps if norm_eps is None else norm_eps)
        self.modulation = Modulation(config.cond, config.dim, 2, config.silu_after) if conditioned else None
        self.linear = nn.Linear(config.dim, config.classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def features(self, h: Tensor) -> Tensor:
        return self.norm(h[:, 0])

    def forward(self, h: Tensor, cond: Tensor | None) -> Tensor:
        if self.modulation is not None:
            shift, scale = self.modulation(cond)
            h = modulate(h.unsqueeze(1), shift, scale).squeeze(1)
        return self.linear(h)


class ViT(nn.Module):
    """The parts of a Vision Transformer, and the ordinary classifier they make.

    conditioned: built for noise (AdaLN-Zero, z as the first token) or as an ordinary ViT ([CLS], affine LayerNorm).
    """

    def __init__(self, config: ViTConfig, *, conditioned: bool, head_norm_eps: float | None = None):
        super().__init__()
        self.config = config
        self.stem = Stem(config, conditioned)
        self.layers = nn.ModuleList(Layer(config, conditioned) for _ in range(config.layers))
        self.head = Head(config, conditioned, head_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Images -> logits (B, K), for the ordinary classifier."""
        h, cond = self.stem(x)
        for layer in self.layers:
            h = layer(h, cond)
        return self.head(self.head.features(h), cond)
