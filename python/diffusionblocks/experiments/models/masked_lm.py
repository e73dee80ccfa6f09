"""A small bidirectional language model for masked diffusion: stem, rotary layers, head over the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ...convert.conditioning import NoiseEmbedding
from .layers import ConditionedConfig, RotaryLayer, check_rotary

NEAR = 5  # tokens, centred, that the convolution of the stem sees


@dataclass(frozen=True)
class MaskedLMConfig(ConditionedConfig):
    """Sizes of a masked language model. symbols: of the alphabet; the mask is one more, the last.

    Gates start at 0: from 1, six layers at once stay at single characters' frequencies for hundreds of steps.
    """

    heads: int = 2
    gate_start: float = 0.0
    symbols: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rotary(self)


class Stem(nn.Module):
    """Tokens with masks (B, N) -> (B, N, D), and the conditioning (B, cond). What is given, x, is nothing: (B, 0).

    A depthwise convolution brings every place its neighbours from the first step. By rotary positions alone
    attention takes hundreds of steps to find them.
    """

    def __init__(self, config: MaskedLMConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.symbols + 1, config.dim)
        self.near = nn.Conv1d(config.dim, config.dim, NEAR, padding=NEAR // 2, groups=config.dim)
        self.noise = NoiseEmbedding(config.cond)

    def forward(self, x: Tensor, z: Tensor, c_noise: Tensor) -> tuple[Tensor, Tensor]:
        h = self.tokens(z)
        return h + self.near(h.mT).mT, self.noise(c_noise)


class Head(nn.Linear):
    """Logits (B, N, V) of the tokens: `features` is the final norm, (B, N, D)."""

    def __init__(self, config: MaskedLMConfig):
        super().__init__(config.dim, config.symbols)
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def features(self, h: Tensor) -> Tensor:
        return self.norm(h)

    def forward(self, h: Tensor, cond: Tensor) -> Tensor:
        return super().forward(h)


def layers(config: MaskedLMConfig) -> list[RotaryLayer]:
    """All layers, each conditioned on the time."""
    return [RotaryLayer(config, conditioned=True) for _ in range(config.layers)]
