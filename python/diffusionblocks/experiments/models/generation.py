"""Text from a causal language model: in blocks, for each group of tokens a walk down the noise, or for an ensemble of
blocks a draw, behind a cache of keys and values a layer; from an ordinary network, token by token."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import dbkernels

from ...blocks import DiffusionBlocks
from ...denoiser import Ends
from ...noise import edm
from ...noise.rng import stream
from ...sampling.decoding import Filter, draw
from .causal_lm import Cache


class Generator:
    """A batch of texts that grow; all blocks must be on one device.

    sigmas: falling levels of the walk, the last 0. keep: what of the network's logits is kept, e.g. decoding.filtered
    with a temperature; it acts on what the network says of the context, before z's evidence.
    """

    def __init__(self, model: DiffusionBlocks, sigmas: Sequence[float], *, seed: int, keep: Filter = lambda x: x):
        self.model, self.sigmas, self.seed, self.keep = model.eval(), sigmas, seed, keep
        self.table = model.target.table
        self.group_size = model.target.group_size
        self.caches = [[Cache() for _ in block.layers] for block in model.blocks]
        self.ahead: list[Tensor] = []  # one stream: what each block says of the next token, in its turn
        self.length = 0

    @torch.no_grad()
    def generate(self, tokens: Tensor, count: int) -> Tensor:
        """Tokens (B, n) of a prompt, `count` more behind them. n and count: multiples of the group's size."""
        if tokens.shape[1] % self.group_size or count % self.group_size:
            raise ValueError(f"prompt and count must be multiples of the group's {self.group_size} tokens")
        self.extend(tokens)
        for _ in range(count // self.group_size):
            group = self.draw() if self.model.ensemble else self.walk(len(tokens), tokens.device)
            self.extend(group)
            tokens = torch.cat([tokens, group], 1)
        return tokens

    def extend(self, tokens: Tensor) -> None:
        """Let every block read clean tokens (B, n)."""
        self.length += tokens.shape[1]
        stem, made = self.ends(0).stem, None
        said: list[Tensor] = []
        if not stem.sees_z and self.caches[0][0].length == 0:
            tokens = torch.cat([stem.start(tokens), tokens], 1)  # in one stream places are one behind
        if tokens.shape[1] == 0:
            return
        for b, block in enumerate(self.model.blocks):
            ends = self.ends(b)
            h = ends.stem.embedding(tokens)
            h = h if made is None or block.carry is None else block.carry(h, made)
            for layer, cache in zip(block.layers, self.caches[b], strict=True):
                h = layer.extend(h, cache)
            said.append(ends.head(ends.head.features(h[:, -1:]), None).float())
            made = h
        self.ahead = [torch.stack(said).mean(0)] * len(said) if self.model.ensemble else said

    def draw(self) -> Tensor:
        """The next token (B, 1) of an ensemble, which says the same at all noise: a walk would add only its own error,
        8 steps of it some .1 bits."""
        return draw(self.keep(self.ahead[0]), seed=stream(self.seed, "generate", self.length))

    def walk(self, batch: int, device: torch.device) -> Tensor:
        """The next group (B, g), from noise down."""
        shape = (batch, self.group_size, self.table.shape[1])
        key = stream(self.seed, "generate", self.length)
        z = self.sigmas[0] * dbkernels.philox_normal(shape, seed=key, device=device).to(self.table.dtype)
        for sigma, below in itertools.pairwise(self.sigmas):
            level = torch.full((batch, self.group_size), sigma, device=device)
            logits = self.logits(z, level, int(self.model.partition.block_of(sigma)))
            evidence = z @ self.table.T - self.table.square().sum(-1) / 2
            logits = self.keep(logits) + evidence / sigma**2
            r = below / sigma
            z = r * z + (1 - r) * logits.softmax(-1) @ self.table
        return logits.argmax(-1)

    def logits(self, z: Tensor, sigma: Tensor, block: int) -> Tensor:
        """What `block` says of the next group (B, g, V), z's own evidence left out."""
        ends = self.ends(block)
        if not ends.stem.sees_z:
            return self.ahead[block]
        c = edm.precondition(sigma, self.model.target.sigma_data)
        h, cond = ends.stem.noised(c.c_in.unsqueeze(-1) * z, c.c_noise)
        for layer, cache in zip(self.model.blocks[block].layers, self.caches[block], strict=True):
            h = layer.decode(h, cond, cache)
        return ends.head(ends.head.features(h), cond).float()

    def ends(self, block: int) -> Ends:
        """What stands before and after the layers of `block`."""
        ends = self.model.blocks[block].ends or self.model.ends
        assert ends is not None
        return ends


@torch.no_grad()
def ancestral(network: nn.Module, tokens: Tensor, count: int, *, seed: int) -> Tensor:
    """Tokens (B, n) of a prompt, `count` more behind them, each drawn from what an ordinary network says of it.

    network: tokens (B, N) -> logits (B, N, V) of each from those before it.
    """
    for _ in range(count):
        unknown = tokens.new_zeros(len(tokens), 1)  # what stands last isn't seen
        logits = network(torch.cat([tokens, unknown], 1))[:, -1:]
        tokens = torch.cat([tokens, draw(logits, seed=stream(seed, "ancestral", tokens.shape[1]))], 1)
    return tokens
