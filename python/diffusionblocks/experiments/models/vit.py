"""A small Vision Transformer, noise-conditioned for diffusion blocks or as an ordinary classifier."""

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

    Attributes:
        image_size: side length in pixels.
        channels: color channels of the images.
        num_classes: number of classes.
        patch: side length of a patch in pixels.
        z_gain: size of the noised label in the first token, beside the features of the image.
    """

    image_size: int = 8
    channels: int = 1
    num_classes: int = 10
    patch: int = 2
    z_gain: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.patch:
            raise ValueError(f"patch={self.patch} must divide image_size={self.image_size}")

    @property
    def tokens(self) -> int:
        """Number of patches per image."""
        return (self.image_size // self.patch) ** 2


class Stem(nn.Module):
    """Embed images (B, C, S, S) as tokens (B, 1 + N, D); the first is learned, plus z_gain c_in z if conditioned.

    Returns the tokens and the conditioning (B, cond), or None if unconditioned.
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
        tokens = torch.cat([token, patches], dim=1)  # the learned position 0 is the [CLS] token
        return tokens + self.position, self.noise(c_noise)

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless `x` is a non-empty floating-point batch of this model's images."""
        shape = (self.config.channels, self.config.image_size, self.config.image_size)
        if x.dim() != 4 or tuple(x.shape[1:]) != shape or len(x) == 0:
            raise ValueError(f"images must be (B >= 1, {', '.join(map(str, shape))}), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"images must be floating (normalised), got {x.dtype}")
        dtype = self.patch.weight.dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"images are {x.dtype}, the model is {dtype}: cast them with .to({dtype})")


class Head(nn.Module):
    """Classify by the first token: `features` normalises it (B, D), forward maps features to logits (B, K)."""

    def __init__(self, config: ViTConfig, conditioned: bool, norm_eps: float | None = None):
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, config.norm_eps if norm_eps is None else norm_eps)
        self.modulation = Modulation(config.cond, config.dim, 2, config.silu_after) if conditioned else None
        self.linear = nn.Linear(config.dim, config.num_classes)
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
    """A Vision Transformer's stem, layers and head; callable as an ordinary classifier.

    Args:
        config: sizes.
        conditioned: AdaLN layers with z in the first token, instead of affine LayerNorm and [CLS].
        head_norm_eps: eps of the head's norm, if not norm_eps.
    """

    def __init__(self, config: ViTConfig, *, conditioned: bool, head_norm_eps: float | None = None):
        super().__init__()
        self.config = config
        self.stem = Stem(config, conditioned)
        self.layers = nn.ModuleList(Layer(config, conditioned) for _ in range(config.layers))
        self.head = Head(config, conditioned, head_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) of the ordinary classifier for images (B, C, S, S)."""
        h, cond = self.stem(x)
        for layer in self.layers:
            h = layer(h, cond)
        return self.head(self.head.features(h), cond)

    def loss(self, x: Tensor, y: Tensor, *, seed: int, step: int) -> Tensor:
        """Return the ordinary classifier's mean cross-entropy; seed and step are unused."""
        return functional.cross_entropy(self(x).float(), y)
