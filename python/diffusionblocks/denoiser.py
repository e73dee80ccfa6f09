"""One block as a complete denoiser: what stands before its layers, the layers, and what reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from .targets.base import Target


class Features(NamedTuple):
    """What a block's layers leave to be read: the head, its features h, and the conditioning."""

    head: nn.Module
    h: Tensor
    cond: Tensor


class Ends(nn.Module):
    """What stands before and after a block's layers.

    stem(x, c_in z, c_noise) -> (h, cond); head.features(h) -> what is read; head(features, cond) -> logits or F.
    """

    def __init__(self, stem: nn.Module, head: nn.Module):
        super().__init__()
        self.stem, self.head = stem, head


class Block(nn.Module):
    """Some layers of the network, with ends of their own or shared ones: a complete denoiser.

    carry: (h, before) -> h, how what the blocks before made of x enters, for a network that carries it on.
    """

    def __init__(self, layers: Iterable[nn.Module], ends: Ends | None = None, carry: nn.Module | None = None):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.ends = ends
        self.carry = carry

    def forward(
        self, x: Tensor, z: Tensor, sigma: Tensor, target: Target, shared: Ends | None, before: Tensor | None = None
    ) -> Features:
        """x: the conditioning; z: noised target, (B, ...); sigma: (B,); before: see `clean` -> what the head reads."""
        ends = self.own(shared)
        h, cond = ends.stem(x, *target.inputs(z, sigma))
        h = self.run(h, cond, before)
        return Features(ends.head, ends.head.features(h), cond)

    def clean(self, x: Tensor, shared: Ends | None, before: Tensor | None) -> Tensor:
        """What this block makes of x alone, for the next one; before: what the one before made of it."""
        return self.run(self.own(shared).stem.clean(x), None, before)

    def logits(self, x: Tensor, shared: Ends | None) -> Tensor:
        """What this block says from x alone, float32."""
        head = self.own(shared).head
        return head(head.features(self.clean(x, shared, None)), None).float()

    def run(self, h: Any, cond: Tensor | None, before: Tensor | None) -> Any:
        """The layers, behind what the blocks before made of x."""
        if before is not None and self.carry is not None:
            h = self.carry(h, before)
        for layer in self.layers:
            h = layer(h, cond)
        return h

    def own(self, shared: Ends | None) -> Ends:
        """The ends in use."""
        ends = self.ends if self.ends is not None else shared
        assert ends is not None
        return ends


def mean_with(head: nn.Module, said: Tensor, count: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The head whose logits are the mean of its own and of `count` others', whose sum is `said`."""
    return lambda h, cond: (head(h, cond).float() + said) / (count + 1)
