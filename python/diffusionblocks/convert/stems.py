"""Stems around transformers' embeddings: how z and its noise level enter, by the kind of target.

Without a noise embedding (`noise=None`) a network is left as it is: labels and next tokens are then read from x alone,
and z speaks through the posterior readout only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..targets.devices import on_host
from ..targets.masked import MaskedTarget
from .conditioning import Z_GAIN, Conditioned, NoiseEmbedding
from .embedding import Images, TokenEmbedding, Tokens, check_windows


def z_projection(z_dim: int, dim: int) -> nn.Linear:
    """Return the map by which z enters tokens: orthogonal and small, since to a pretrained network it is noise."""
    linear = nn.Linear(z_dim, dim, bias=False)
    nn.init.orthogonal_(linear.weight, gain=Z_GAIN)
    return linear


def noise_embedding(cond: int, dtype: torch.dtype) -> NoiseEmbedding | None:
    """Return an embedding of the noise level, cond wide, None for 0."""
    if not cond:
        return None
    noise = NoiseEmbedding(cond)
    noise.mlp.to(dtype)  # the angles stay float32: halves would merge neighbouring noise levels
    return noise


def entrances(z_dim: int, width: int, cond: int, dtype: torch.dtype) -> tuple[nn.Linear | None, NoiseEmbedding | None]:
    """Return the modules by which z and its noise level enter tokens of a width; None for both if cond is 0."""
    noise = noise_embedding(cond, dtype)
    return (z_projection(z_dim, width).to(dtype) if cond else None), noise


class EmbeddingStem(nn.Module):
    """Base class: x -> tokens, and what z and its noise level enter by; None for both where they don't."""

    takes_float32 = True

    def __init__(self, embedding: Images | TokenEmbedding, z: nn.Linear | None, noise: NoiseEmbedding | None):
        super().__init__()
        self.embedding, self.z, self.noise = embedding, z, noise

    @property
    def sees_z(self) -> bool:
        return self.z is not None


class LabelStem(EmbeddingStem):
    """x -> tokens; z (B, d) is added to the first one."""

    def clean(self, x: Tensor) -> Tokens:
        """Return the tokens of x alone."""
        tokens: Tokens = self.embedding(x)
        return tokens

    def forward(self, x: Tensor, z: Tensor, c_noise: Tensor) -> tuple[Tokens, Tensor | None]:
        tokens = self.clean(x)
        if self.z is None or self.noise is None:
            return tokens, None
        first = tokens.h[:, :1] + self.z(z.to(self.z.weight.dtype)).unsqueeze(1).to(tokens.h.dtype)
        return tokens._replace(h=torch.cat([first, tokens.h[:, 1:]], 1)), self.noise(c_noise)

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless `x` fits the network."""
        self.embedding.check(x)


class MaskedStem(nn.Module):
    """Nothing (B, 0) and tokens with masks z (B, N) -> tokens. mask_token_id: the network's own mask."""

    takes_float32 = True

    def __init__(self, embedding: TokenEmbedding, mask_token_id: int, noise: NoiseEmbedding | None):
        super().__init__()
        self.embedding, self.noise, self.mask_token_id = embedding, noise, mask_token_id

    def forward(self, x: Tensor, z: Tensor, c_noise: Tensor) -> tuple[Tokens, Tensor | None]:
        self.embedding.check_length(z)
        ids = torch.where(z == self.embedding.vocab_size, self.mask_token_id, z)
        return self.embedding(ids), None if self.noise is None else self.noise(c_noise)

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless `x` is (B, 0)."""
        if x.dim() != 2 or x.shape[1]:
            raise ValueError(f"a masked language model is given nothing: x must be (B, 0), got {tuple(x.shape)}")


class WindowTarget(MaskedTarget):
    """MaskedTarget of windows that are full of text: padding and the tokenizer's own masks are refused."""

    def __init__(self, vocab_size: int, padding: int | None, mask_token_id: int):
        super().__init__(vocab_size, never=mask_token_id)
        self.padding = padding

    def check(self, y: Tensor) -> None:
        super().check(y)
        check_windows(y, self.padding)
        if on_host(y) and bool((y == self.never).any()):
            raise ValueError(
                f"y holds the tokenizer's mask (id {self.never}), which would be learned as text: give whole "
                "texts, the noise masks them"
            )


class CausalStem(EmbeddingStem):
    """Tokens x (B, N), and z (B, N, d) of those that follow each, -> a clean and a noisy stream, (B, 2 N, D).

    Noisy token i is x_i's embedding plus a little of z_i, at x_i's position. It attends to the clean tokens before
    that and to itself; clean tokens attend as ever. So without z it computes what x_i computes in the network itself.
    """

    aligned = True  # y holds a token for each of x's

    @staticmethod
    def cache() -> Cache:
        """Return a cache for `extend` and `decode`."""
        return Cache()

    def clean(self, x: Tensor) -> Tokens:
        """Return one stream, of x alone."""
        h, places = self.embedding.embed(x), torch.arange(x.shape[1], device=x.device)
        return Tokens(h, self.embedding.arguments(h, places, lambda window: _seen(places, places, window)))

    def forward(self, x: Tensor, z: Tensor, c_noise: Tensor) -> tuple[Tokens, Tensor | None]:
        if x.shape[1] != z.shape[1]:
            raise ValueError(f"x has {x.shape[1]} tokens, y or z {z.shape[1]}: y holds the token after each of x's")
        if self.z is None or self.noise is None:
            return self.clean(x), None
        h, places = self.embedding.embed(x), torch.arange(x.shape[1], device=x.device)
        both = torch.cat([h, h + self.z(z.to(self.z.weight.dtype)).to(h.dtype)], 1)
        arguments = self.embedding.arguments(both, places.repeat(2), lambda window: two_streams(places, window))
        return Tokens(both, arguments), self.noise(c_noise)

    def extend(self, x: Tensor, cache: Cache) -> tuple[Tokens, Tensor | None]:
        """Return clean tokens x (B, n) that follow those in the cache, to which the layers append them."""
        none = None if self.noise is None else self.noise(torch.zeros(len(x), 0, device=x.device))
        return self._following(self.embedding.embed(x, cache.length), cache), none

    def decode(self, x: Tensor, z: Tensor, c_noise: Tensor, cache: Cache) -> tuple[Tokens, Tensor]:
        """Return the noisy token that stands for x (B, 1) behind those in the cache, with z (B, 1, d) of the next."""
        assert self.z is not None and self.noise is not None
        h = self.embedding.embed(x, cache.length)
        return self._following(h + self.z(z.to(self.z.weight.dtype)).to(h.dtype), cache), self.noise(c_noise)

    def _following(self, h: Tensor, cache: Cache) -> Tokens:
        keys = torch.arange(cache.length + h.shape[1], device=h.device)
        places = keys[cache.length :]
        arguments = self.embedding.arguments(h, places, lambda window: _seen(places, keys, window))
        return Tokens(h, {kind: {**given, "past_key_values": cache} for kind, given in arguments.items()})

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless `x` fits the network and holds no padding."""
        self.embedding.check(x)
        check_windows(x, self.embedding.padding)


def two_streams(places: Tensor, window: int | None) -> Tensor:
    """Return which tokens of both streams (rows) attend to which (columns), (2 N, 2 N) bool.

    Source: arXiv 2506.14202, the autoregressive blocks; see dbkernels.two_stream_attention.
    """
    clean, before = _seen(places, places, window), _seen(places, places, window, itself=False)
    itself = torch.eye(len(places), dtype=torch.bool, device=places.device)
    return torch.cat([torch.cat([clean, torch.zeros_like(clean)], 1), torch.cat([before, itself], 1)])


def _seen(places: Tensor, keys: Tensor, window: int | None, *, itself: bool = True) -> Tensor:
    """Return which tokens before it, and itself, a token sees: (N, K) bool, of tokens and keys at these positions."""
    distance = places[:, None] - keys
    seen = distance >= (0 if itself else 1)
    return seen & (distance < window) if window else seen


class Cache:
    """Keys and values (B, H, L, C) of the clean tokens so far, by layer, as transformers' layers call it.

    length: L. keeps: Whether what comes now is appended.
    """

    def __init__(self) -> None:
        self.length, self.keeps = 0, True
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return all keys and values of a layer, the new ones last."""
        if layer_idx in self._before:
            before = self._before[layer_idx]
            key, value = torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)
        if self.keeps:
            self._before[layer_idx] = key, value
        return key, value


class ConditionedNoisy(Conditioned):
    """Conditioned of two streams: the clean one, which comes first, has no noise level and passes as it is."""

    def modulation(self, h: Tensor, cond: Tensor) -> Tensor:
        noisy = super().modulation(h, cond)
        return functional.pad(noisy, (0, 0, h.shape[1] - noisy.shape[1], 0))
