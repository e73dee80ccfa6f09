"""One block as a complete denoiser: stem, layers, head; and the loss it returns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from .targets.base import Features


class StemHead(nn.Module):
    """The stem (input embedding) and head (output projection) around a block's layers.

    stem(x, c_in z, c_noise) -> (h, cond); head.features(h) -> features; head(features, cond) -> logits or F.
    """

    def __init__(self, stem: nn.Module, head: nn.Module):
        super().__init__()
        self.stem, self.head = stem, head


class Block(nn.Module):
    """Some of the network's layers, with a stem and head of their own or the shared ones: a complete denoiser."""

    def __init__(self, layers: Iterable[nn.Module], stem_head: StemHead | None = None):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.stem_head = stem_head

    def forward(self, x: Tensor, scaled: Tensor, c_noise: Tensor, shared: StemHead | None) -> Features:
        """Return features from the conditioning x and the stem's inputs c_in z and c_noise."""
        around = self.around(shared)
        h, cond = around.stem(x, scaled, c_noise)
        return self._decoded(h, cond, around)

    def logits(self, x: Tensor, shared: StemHead | None) -> Tensor:
        """Return the logits from x alone, float32; the stem has clean(x)."""
        around = self.around(shared)
        head, h, cond = self._decoded(around.stem.clean(x), None, around)
        return head(h, cond).float()

    def around(self, shared: StemHead | None) -> StemHead:
        """Return the stem and head in use."""
        around = self.stem_head if self.stem_head is not None else shared
        assert around is not None
        return around

    def _decoded(self, h: Any, cond: Any, around: StemHead) -> Features:
        for layer in self.layers:
            h = layer(h, cond)
        return Features(around.head, around.head.features(h), cond)


class BlockLoss(NamedTuple):
    """One block's loss on one batch.

    loss: 0-dim, to backpropagate, times the weight asked for. sigma: the levels drawn, of the target's level_shape.
    per_sample: unweighted loss, of sigma's shape, finer, or means of it; error: |y - D|^2, of sigma's shape, None
    unless asked for; both without gradient.
    """

    loss: Tensor
    sigma: Tensor
    per_sample: Tensor
    error: Tensor | None
