"""Losses of layers that learn apart: the activations of one are held at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def backward_one_by_one(losses: Iterator[Tensor], count: int) -> Tensor:
    """Return the mean of `count` losses, each computed when it is asked for and, but for the last one, backpropagated
    before the next: the last one's gradient alone flows from the result."""
    mean: Tensor | float = 0.0
    for i in range(count):
        # a counter of saved tensors sees the first one's, which are the most
        with saved_tensors_hooks(lambda t: t, lambda t: t) if i else nullcontext():
            loss = next(losses)
        mean = mean + loss.detach() / count
        if i + 1 < count:
            loss.backward()
    return loss + (mean - loss).detach()
