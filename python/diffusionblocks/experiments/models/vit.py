"""A small Vision Transformer: stem, layers, head; each takes a conditioning vector or none."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from ...convert.conditioning import NoiseEmbedding
from .layers import ConditionedConfig, Layer, Modulation, modulate


@dataclass(frozen=True)
class ViTConfig(ConditionedConfig):
    """Sizes of a Vision Transformer.

    z_gain: what c_in z is multiplied by as it enters the first token, where it is noise to the classifier's features.
    """

    image_size: int = 8
    channels: int = 1
    classes: int = 10
    patch: int = 2
    z_gain: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.patch:
            raise ValueError(f"patch={self.patch} must divide image_size={self.image_size}")

    @property
    def tokens(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch) ** 2


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

    def loss(self, x: Tensor, y: Tensor, *, seed: int, step: int) -> Tensor:
        """Cross-entropy of the ordinary classifier; nothing is drawn."""
        return functional.cross_entropy(self(x).float(), y)
