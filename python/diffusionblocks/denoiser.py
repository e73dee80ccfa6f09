"""One block as a complete denoiser: stem, layers, head; and the loss it returns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
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
        h, cond = around.stem(x, *_as_weights(around.stem, scaled, c_noise))
        return self._decoded(h, cond, around)

    def logits(self, x: Tensor, shared: StemHead | None) -> Tensor:
        """Return the logits from x alone, float32. Raises: ValueError if the stem has no clean(x), or layers need z."""
        around = self.around(shared)
        if not hasattr(around.stem, "clean") or getattr(around.stem, "z", None) is not None:
            raise ValueError(
                "logits are of x alone, and this model's blocks read z and the noise, too: call model(x), or, for "
                "labels and next tokens of a converted network, convert with cond=0"
            )
        head, h, cond = self._decoded(around.stem.clean(x), None, around)
        return head(h, cond).float()

    def around(self, shared: StemHead | None) -> StemHead:
        """Return the stem and head in use."""
        around = self.stem_head if self.stem_head is not None else shared
        assert around is not None
        return around

    @staticmethod
    def call(layer: nn.Module, h: Any, cond: Any) -> Any:
        """Run a layer. A step that recomputes layers in backward sets another function here, for its forward pass."""
        return layer(h, cond)

    def _decoded(self, h: Any, cond: Any, around: StemHead) -> Features:
        for layer in self.layers:
            out = self.call(layer, h, cond)
            # a layer of transformers gives (h, attentions); two streams come and go as a tuple
            h = out[0] if isinstance(out, tuple) and isinstance(h, Tensor) else out
        return Features(around.head, around.head.features(h), cond)


def _as_weights(stem: nn.Module, scaled: Tensor, c_noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return c_in z and c_noise, float32 as a trajectory has them, in the dtype of a stem that isn't; autocast does so
    itself. A stem with `takes_float32` is left alone: in halves neighbouring levels of c_noise are one."""
    dtype = next((p.dtype for p in stem.parameters() if p.is_floating_point()), c_noise.dtype)
    if (
        dtype == c_noise.dtype
        or getattr(stem, "takes_float32", False)
        or torch.is_autocast_enabled(c_noise.device.type)
    ):
        return scaled, c_noise
    return scaled.to(dtype) if scaled.is_floating_point() else scaled, c_noise.to(dtype)


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
