"""A small Llama-style language model, with one stream of clean tokens or a second, noisy one beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

import dbkernels

from ...convert.conditioning import NoiseEmbedding
from .layers import ConditionedConfig, Modulation, check_rotary, rotary


@dataclass(frozen=True)
class CausalLMConfig(ConditionedConfig):
    """Sizes of a causal language model.

    Attributes:
        layers: number of layers.
        mlp: width of the gated MLP's hidden layer.
        vocab_size: vocabulary size.
        group_size: tokens denoised together.
        sees_z: feed the noised tokens of a group to the network, as a second stream. For single tokens the posterior
            readout already holds all that z tells, so one stream of clean tokens is enough.
        z_gain: size of the noised embedding beside the tokens' own in the noisy stream.
    """

    layers: int = 4
    mlp: int = 176
    vocab_size: int = 64
    group_size: int = 1
    sees_z: bool = False
    z_gain: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rotary(self)
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size={self.vocab_size} must be at least 2: a single one leaves nothing to predict")
        if self.group_size > 1 and not self.sees_z:
            raise ValueError(f"group_size={self.group_size} needs sees_z: its tokens couldn't attend to each other")


class Streams(NamedTuple):
    """Clean and noisy tokens, both (B, N, D)."""

    clean: Tensor
    noisy: Tensor


class Cache:
    """Keys and values (B, H, L, C) of a layer's clean tokens so far."""

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def add(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values; return all of them."""
        self.k = k if self.k is None else torch.cat([self.k, k], 2)
        self.v = v if self.v is None else torch.cat([self.v, v], 2)
        return self.k, self.v

    @property
    def length(self) -> int:
        """Number of cached tokens L."""
        return 0 if self.k is None else self.k.shape[2]


class CausalLayer(nn.Module):
    """Residual attention and gated MLP. Noisy tokens share the weights, modulated by their noise level."""

    def __init__(self, config: CausalLMConfig):
        super().__init__()
        d = config.dim
        self.heads, self.group_size, self.gate_start = config.heads, config.group_size, config.gate_start
        self.eps = config.norm_eps
        self.norm1, self.norm2 = nn.Parameter(torch.ones(d)), nn.Parameter(torch.ones(d))
        self.qkv, self.proj = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.gate_up, self.down = nn.Linear(d, 2 * config.mlp, bias=False), nn.Linear(config.mlp, d, bias=False)
        self.modulation = Modulation(config.cond, d, 6, config.silu_after) if config.sees_z else None

    def forward(self, h: Tensor | Streams, cond: Tensor | None) -> Tensor | Streams:
        if isinstance(h, Tensor):
            q, k, v = self.queries_keys_values(self.norm(h, self.norm1), 0)
            h = h + self.proj(merge(dbkernels.attention(q, k, v, causal=True)))
            return h + self.mlp(self.norm(h, self.norm2))
        return self.two_streams(h.clean, h.noisy, cond)

    def two_streams(self, clean: Tensor, noisy: Tensor, cond: Tensor | None) -> Streams:
        """Apply the layer to both streams (B, N, D); for the mask see dbkernels.two_stream_attention."""
        N = clean.shape[1]
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulate(cond)
        normed = self.norm(clean, self.norm1), self.norm(noisy, self.norm1, shift1, scale1)
        streams = [self.queries_keys_values(part, 0) for part in normed]
        outs = dbkernels.two_stream_attention(*streams[0], *streams[1], group_size=self.group_size)
        out, out_noisy = self.proj(torch.cat([merge(part) for part in outs], 1)).split(N, 1)
        clean = clean + out
        noisy, normed_noisy = self.gated(noisy, out_noisy, gate1, shift2, scale2)
        mixed, mixed_noisy = self.mlp(torch.cat([self.norm(clean, self.norm2), normed_noisy], 1)).split(N, 1)
        return Streams(clean + mixed, torch.addcmul(noisy, gate2, mixed_noisy))

    def extend(self, h: Tensor, cache: Cache) -> Tensor:
        """Apply the layer to the next clean tokens (B, n, D) and append them to the cache."""
        first, n = cache.length, h.shape[1]
        q, k, v = self.queries_keys_values(self.norm(h, self.norm1), first)
        k, v = cache.add(k, v)
        mask = torch.ones(n, first + n, dtype=torch.bool, device=h.device).tril(first)
        # dbkernels.attention's causal mask is square: it has no offset for the cached keys
        h = h + self.proj(merge(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)))
        return h + self.mlp(self.norm(h, self.norm2))

    def decode(self, noisy: Tensor, cond: Tensor, cache: Cache) -> Tensor:
        """Apply the layer to a group of noisy tokens (B, g, D) after the clean ones in the cache; leave the cache."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulate(cond)
        q, k, v = self.queries_keys_values(self.norm(noisy, self.norm1, shift1, scale1), cache.length)
        before = (k[:, :, :0], v[:, :, :0]) if cache.k is None else (cache.k, cache.v)
        out = self.proj(merge(dbkernels.two_stream_decode(q, k, v, *before)))
        noisy, normed = self.gated(noisy, out, gate1, shift2, scale2)
        return torch.addcmul(noisy, gate2, self.mlp(normed))

    def modulate(self, cond: Tensor | None) -> tuple[Tensor, ...]:
        """Return shift, scale and gate of attention, then of the MLP."""
        assert self.modulation is not None and cond is not None
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond)
        return shift1, scale1, self.gate_start + gate1, shift2, scale2, self.gate_start + gate2

    def queries_keys_values(self, h: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Project (B, N, D) to q, k, v (B, H, N, C); q and k are rotated by positions first, first + 1, ..."""
        B, N, _ = h.shape
        q, k, v = self.qkv(h).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return rotary(q, first), rotary(k, first), v

    def norm(self, h: Tensor, weight: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        return dbkernels.ada_rms_norm(h, shift, scale, weight=weight, eps=self.eps)

    def gated(self, h: Tensor, out: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return dbkernels.gated_residual_norm(h, out, gate, shift, scale, weight=self.norm2, eps=self.eps, norm="rms")

    def mlp(self, h: Tensor) -> Tensor:
        gate, up = self.gate_up(h).chunk(2, -1)
        return self.down(functional.silu(gate) * up)


def merge(heads: Tensor) -> Tensor:
    """Join heads (B, H, N, C) to (B, N, H C)."""
    return heads.transpose(1, 2).flatten(2)


class CausalStem(nn.Module):
    """Embed tokens (B, N), and with sees_z their noised embeddings z (B, N, e); return the layers' input and cond.

    One stream: a learned start, then tokens 0 to N - 2, so that output i depends on the tokens before i. Two streams:
    tokens and noisy tokens at the same positions.
    """

    def __init__(self, config: CausalLMConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size + 1, config.dim)  # the last: the start, or a noisy token's base
        nn.init.normal_(self.embedding.weight, std=config.dim**-0.5)
        self.noise = NoiseEmbedding(config.cond) if config.sees_z else None
        self.look = nn.Linear(config.dim, config.dim, bias=False) if config.sees_z else None  # z -> (B, N, D)

    def forward(self, x: Tensor, z: Tensor, c_noise: Tensor) -> tuple[Tensor | Streams, Tensor | None]:
        if not self.sees_z:
            return self.clean(x), None
        noisy, cond = self.noised(z, c_noise)
        return Streams(self.clean(x), noisy), cond

    def clean(self, x: Tensor) -> Tensor:
        """Embed clean tokens (B, N) as (B, N, D); in one stream shifted right by one, after the start."""
        return self.embedding(x if self.sees_z else torch.cat([self.start(x), x[:, :-1]], 1))

    @property
    def sees_z(self) -> bool:
        """Whether noisy tokens pass through the layers."""
        return self.noise is not None

    def start(self, x: Tensor) -> Tensor:
        """Return the start token (B, 1)."""
        return torch.full_like(x[:, :1] if x.shape[1] else x.new_empty(len(x), 1), self.config.vocab_size)

    def noised(self, z: Tensor, c_noise: Tensor) -> tuple[Tensor, Tensor]:
        """Embed c_in z (B, N, e) as noisy tokens (B, N, D), with the conditioning (B, N, C) of c_noise (B, N)."""
        assert self.noise is not None and self.look is not None
        start = self.embedding.weight[self.config.vocab_size]
        return start + self.config.z_gain * self.look(z.to(start.dtype)), self.noise(c_noise)

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless `x` is a non-empty batch of tokens (B, N) int64."""
        if x.dim() != 2 or x.dtype != torch.int64 or x.numel() == 0:
            raise ValueError(f"tokens must be a non-empty (B, N) int64, got {tuple(x.shape)} {x.dtype}")


class CausalHead(nn.Module):
    """Map tokens to logits (B, N, V): `features` is the final norm, (B, N, D)."""

    is_linear = True

    def __init__(self, config: CausalLMConfig):
        super().__init__()
        self.eps = config.norm_eps
        self.norm = nn.Parameter(torch.ones(config.dim))
        self.linear = nn.Linear(config.dim, config.vocab_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def features(self, h: Tensor | Streams) -> Tensor:
        return dbkernels.ada_rms_norm(h if isinstance(h, Tensor) else h.noisy, weight=self.norm, eps=self.eps)

    def forward(self, h: Tensor, cond: Tensor | None) -> Tensor:
        return self.linear(h)


class CausalLM(nn.Module):
    """The ordinary language model, with one stream."""

    def __init__(self, config: CausalLMConfig):
        super().__init__()
        self.stem, self.head = CausalStem(config), CausalHead(config)
        self.layers = nn.ModuleList(CausalLayer(config) for _ in range(config.layers))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, N, V) of each of the tokens (B, N), given those before it."""
        h, cond = self.stem(x, x, x)
        for layer in self.layers:
            h = layer(h, cond)
        return self.head(self.head.features(h), cond)

    def loss(self, x: Tensor, y: Tensor, *, seed: int, step: int) -> Tensor:
        """Return the mean cross-entropy in nats per token; seed and step are unused."""
        return functional.cross_entropy(self(x).flatten(0, 1).float(), y.flatten())
