"""A small bidirectional language model for masked diffusion: stem, rotary layers, head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ...convert.conditioning import NoiseEmbedding
from .layers import ConditionedConfig, RotaryLayer, check_rotary

KERNEL_SIZE = 5  # of the stem's convolution over tokens


@dataclass(frozen=True)
class MaskedLMConfig(ConditionedConfig):
    """Sizes of a masked language model.

    Attributes:
        heads: number of attention heads.
        gate_start: initial value of AdaLN's gates; with 1, six layers predict no more than character frequencies for
            hundreds of steps.
        vocab_size: vocabulary size without the mask, whose token is `vocab_size`.
    """

    heads: int = 2
    gate_start: float = 0.0
    vocab_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rotary(self)


class Stem(nn.Module):
    """Embed masked tokens z (B, N) as (B, N, D), with the conditioning (B, cond); x (B, 0) is unused.

    A depthwise convolution mixes neighbouring tokens from the first step; by rotary positions alone attention takes
    hundreds of steps to find them.
    """

    def __init__(self, config: MaskedLMConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size + 1, config.dim)
        self.near = nn.Conv1d(config.dim, config.dim, KERNEL_SIZE, padding=KERNEL_SIZE // 2, groups=config.dim)
        self.noise = NoiseEmbedding(config.cond)

    def forward(self, x: Tensor, z: Tensor, c_noise: Tensor) -> tuple[Tensor, Tensor]:
        h = self.tokens(z)
        return h + self.near(h.mT).mT, self.noise(c_noise)


class Head(nn.Linear):
    """Map tokens to logits (B, N, V): `features` is the final norm, (B, N, D)."""

    is_linear = True

    def __init__(self, config: MaskedLMConfig):
        super().__init__(config.dim, config.vocab_size)
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def features(self, h: Tensor) -> Tensor:
        return self.norm(h)

    def forward(self, h: Tensor, cond: Tensor) -> Tensor:
        return super().forward(h)


def layers(config: MaskedLMConfig) -> list[RotaryLayer]:
    """Return the conditioned layers of the model."""
    return [RotaryLayer(config, conditioned=True) for _ in range(config.layers)]
