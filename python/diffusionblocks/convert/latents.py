"""diffusers' transformers in the hands of blocks: base classes of what stands before, between and behind their layers.

Parts keep the names that they have in the network, so that weights are given back by name.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class Stream(NamedTuple):
    """Tokens between layers.

    h: (B, N, D). arguments: of the layers. emb: what modulates the output, (B, D); None until a layer computes it.
    grid: patches along each axis; None where latents came as tokens and go as tokens.
    """

    h: Tensor
    arguments: dict[str, Any]
    emb: Tensor | None
    grid: tuple[int, ...] | None


class Stem(nn.Module):
    """Base class: x_t, the timestep and what x holds -> Stream. A subclass defines `start`, `arguments` and `check`.

    Attributes:
        patch: Sides of a patch, in latents.
        channels: Of the latents.
    """

    takes_float32 = True
    parts: ClassVar[tuple[str, ...]]

    def __init__(self, network: Any):
        super().__init__()
        size = network.config.patch_size
        self.patch: tuple[int, ...] = (size, size) if isinstance(size, int) else tuple(size)
        self.channels: int = network.config.in_channels
        for name in self.parts:
            setattr(self, name, getattr(network, name))

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type."""
        return next(self.parameters()).dtype

    def forward(self, x: Tensor, z: Tensor, c_noise: Tensor) -> tuple[Stream, None]:
        return self.start(z.to(self.dtype), timestep=c_noise, **self.arguments(x, z)), None

    def start(self, *latents: Any, **arguments: Any) -> Stream:
        """Return the first layer's input, given what the network itself takes: hidden_states, timestep= and others."""
        raise NotImplementedError

    def arguments(self, x: Tensor, z: Tensor) -> dict[str, Any]:
        """Return x as the network's arguments; z: the latents, whose size some need."""
        raise NotImplementedError

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless `x` fits the network."""
        raise NotImplementedError

    def grid(self, latents: Tensor) -> tuple[int, ...]:
        """Return how many patches there are along each axis."""
        return tuple(side // patch for side, patch in zip(latents.shape[2:], self.patch, strict=True))


class Layer(nn.Module):
    """A network's layer between Streams; of two streams, (text, h) comes out."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, stream: Stream, cond: None) -> Stream:
        out = self.layer(stream.h, **stream.arguments)
        if not isinstance(out, tuple):
            return stream._replace(h=out)
        text, h = out
        return stream._replace(h=h, arguments={**stream.arguments, "encoder_hidden_states": text})


class Head(nn.Module):
    """Base class: Stream -> the prediction, of the latents' shape. A subclass defines `tokens`.

    patch: its sides. channels_first: within a token, as Flux packs them.
    """

    parts: ClassVar[tuple[str, ...]]
    channels_first = False

    def __init__(self, network: Any, patch: tuple[int, ...]):
        super().__init__()
        self.patch = patch
        for name in self.parts:
            setattr(self, name, getattr(network, name))

    def tokens(self, h: Tensor, emb: Tensor) -> Tensor:
        """Return each token's patch, (B, N, patch * C)."""
        raise NotImplementedError

    def features(self, stream: Stream) -> Tensor:
        assert stream.emb is not None
        tokens = self.tokens(stream.h, stream.emb)
        if stream.grid is None:
            return tokens
        axes = len(stream.grid)
        inner = (-1, *self.patch) if self.channels_first else (*self.patch, -1)
        tokens = tokens.unflatten(2, inner).unflatten(1, stream.grid)
        if not self.channels_first:
            tokens = tokens.movedim(-1, axes + 1)  # (B, *grid, C, *patch)
        order = [axis for i in range(axes) for axis in (1 + i, axes + 2 + i)]
        sides = [count * side for count, side in zip(stream.grid, self.patch, strict=True)]
        return tokens.permute(0, axes + 1, *order).reshape(len(tokens), -1, *sides)

    def forward(self, latents: Tensor, cond: None) -> Tensor:
        return latents


def check_text(x: Tensor, width: int, *, pooled: bool = False) -> None:
    """Raise ValueError unless `x` is a batch of texts' embeddings of that width, if `pooled` behind a pooled one."""
    least = 2 if pooled else 1
    if x.dim() != 3 or x.shape[1] < least or x.shape[2] != width or len(x) == 0 or not x.is_floating_point():
        what = "a pooled embedding of each text and those of its tokens" if pooled else "embeddings of texts"
        raise ValueError(f"x must be {what}, floating (B, N, {width}), got {tuple(x.shape)} {x.dtype}")
