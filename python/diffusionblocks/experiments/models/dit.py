"""A small Diffusion Transformer: from labels and noised images to F of the image's shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import dbkernels

from ...convert.conditioning import NoiseEmbedding
from ...targets.devices import check_labels
from .layers import ConditionedConfig, Modulation


@dataclass(frozen=True)
class DiTConfig(ConditionedConfig):
    """Sizes of a Diffusion Transformer.

    Attributes:
        cond: width of the conditioning.
        image_size: side length in pixels.
        channels: color channels of the images.
        num_classes: number of classes.
        patch: side length of a patch in pixels.
    """

    cond: int = 64
    image_size: int = 8
    channels: int = 1
    num_classes: int = 10
    patch: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.patch:
            raise ValueError(f"patch={self.patch} must divide image_size={self.image_size}")


class DiTStem(nn.Module):
    """Embed c_in z (B, C, S, S) as tokens (B, N, D); the conditioning (B, cond) is noise plus label embedding.

    Label `num_classes` stands for no class, for classifier-free guidance.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.patch = nn.Linear(config.channels * config.patch**2, config.dim)
        # as large as an embedded patch: positions that start near zero are learnt late
        self.position = nn.Parameter(torch.randn(1, (config.image_size // config.patch) ** 2, config.dim) * 0.5)
        self.noise = NoiseEmbedding(config.cond)
        self.label = nn.Embedding(config.num_classes + 1, config.cond)

    def forward(self, x: Tensor, z: Tensor, c_noise: Tensor) -> tuple[Tensor, Tensor]:
        shape = (self.config.channels, self.config.image_size, self.config.image_size)
        if tuple(z.shape[1:]) != shape:
            raise ValueError(f"images must be (B, {', '.join(map(str, shape))}), got {tuple(z.shape)}")
        patches = patchify(z.to(self.patch.weight.dtype), self.config.patch)
        return self.patch(patches) + self.position, self.noise(c_noise) + self.label(x)

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless `x` is (B >= 1,) labels in [0, num_classes]; values on a GPU aren't checked."""
        if x.dim() != 1 or x.dtype not in (torch.int64, torch.int32) or len(x) == 0:
            raise ValueError(f"labels must be a non-empty 1-d integer tensor, got {tuple(x.shape)} {x.dtype}")
        none = self.config.num_classes
        check_labels("labels", x, none + 1, f"[0, {none}], {none} for no class")


class DiTHead(nn.Module):
    """Map tokens (B, N, D) to F (B, C, S, S): a modulated norm and a linear map initialised to zero."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.modulation = Modulation(config.cond, config.dim, 2, config.silu_after)
        self.linear = nn.Linear(config.dim, config.channels * config.patch**2)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def features(self, h: Tensor) -> Tensor:
        return h

    def forward(self, h: Tensor, cond: Tensor) -> Tensor:
        shift, scale = self.modulation(cond)
        h = dbkernels.ada_layer_norm(h, shift, scale, eps=self.config.norm_eps)
        return unpatchify(self.linear(h), self.config.patch)


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut images (B, C, S, S) into patches (B, N, C P P), row by row."""
    B, C, S, _ = images.shape
    parts = images.reshape(B, C, S // patch, patch, S // patch, patch)
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * patch**2)


def unpatchify(patches: Tensor, patch: int) -> Tensor:
    """Join patches (B, N, C P P) to images (B, C, S, S): the inverse of `patchify`."""
    B, N, width = patches.shape
    side, C = round(N**0.5), width // patch**2
    parts = patches.view(B, side, side, C, patch, patch)
    return parts.permute(0, 3, 1, 4, 2, 5).reshape(B, C, side * patch, side * patch)
