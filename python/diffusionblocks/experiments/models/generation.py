"""Text generation: each token group is denoised, or drawn from the ensemble's mean logits, with a KV cache per layer.

Ordinary networks generate token by token (`ancestral`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import dbkernels

from ...blocks import DiffusionBlocks
from ...denoiser import StemHead
from ...noise import edm
from ...noise.rng import draw, stream
from ...sampling.decoding import Filter
from .causal_lm import Cache


class Generator:
    """Extend a batch of texts, token group by token group; all blocks must be on one device.

    Args:
        model: trained blocks; set to eval mode.
        sigmas: falling noise levels, the last 0.
        seed: of the noise and the draws.
        keep: filter of the logits before z's evidence is added, e.g. decoding.filtered with a temperature.
    """

    def __init__(self, model: DiffusionBlocks, sigmas: Sequence[float], *, seed: int, keep: Filter = lambda x: x):
        self.model, self.sigmas, self.seed, self.keep = model.eval(), sigmas, seed, keep
        self.table = model.target.table
        self.group_size = model.target.group_size
        self.caches = [[Cache() for _ in block.layers] for block in model.blocks]
        self.next_logits: list[Tensor] = []  # (B, 1, V) per block: with one stream they don't depend on z
        self.length = 0

    @torch.no_grad()
    def generate(self, tokens: Tensor, count: int) -> Tensor:
        """Append `count` tokens to prompts (B, n) and return (B, n + count).

        Raises:
            ValueError: n or count isn't a multiple of the group size.
        """
        if tokens.shape[1] % self.group_size or count % self.group_size:
            raise ValueError(f"prompt and count must be multiples of the group's {self.group_size} tokens")
        self.extend(tokens)
        for _ in range(count // self.group_size):
            group = self.draw() if self.model.ensemble else self.denoise(len(tokens), tokens.device)
            self.extend(group)
            tokens = torch.cat([tokens, group], 1)
        return tokens

    def extend(self, tokens: Tensor) -> None:
        """Append clean tokens (B, n) to every block's caches."""
        self.length += tokens.shape[1]
        stem = self.around(0).stem
        if not stem.sees_z and self.caches[0][0].length == 0:
            tokens = torch.cat([stem.start(tokens), tokens], 1)  # one stream is shifted right by one
        if tokens.shape[1] == 0:
            return
        self.next_logits = []
        for b, block in enumerate(self.model.blocks):
            around = self.around(b)
            h = around.stem.embedding(tokens)
            for layer, cache in zip(block.layers, self.caches[b], strict=True):
                h = layer.extend(h, cache)
            self.next_logits.append(around.head(around.head.features(h[:, -1:]), None).float())
        if self.model.ensemble:
            self.next_logits = [torch.stack(self.next_logits).mean(0)] * len(self.model.blocks)

    def draw(self) -> Tensor:
        """Draw the next token (B, 1) of an ensemble.

        The ensemble's logits don't depend on the noise level, so one draw suffices; 8 denoising steps would cost about
        0.1 bits.
        """
        return draw(self.keep(self.next_logits[0]), seed=stream(self.seed, "generate", self.length))

    def denoise(self, batch: int, device: torch.device) -> Tensor:
        """Sample the next group (B, g) by denoising it from sigmas[0] to 0."""
        shape = (batch, self.group_size, self.table.shape[1])
        key, target = stream(self.seed, "generate", self.length), self.model.target
        z = self.sigmas[0] * dbkernels.philox_normal(shape, seed=key, device=device).to(self.table.dtype)
        for sigma, below in itertools.pairwise(self.sigmas):
            level = torch.full((batch, self.group_size), sigma, device=device)
            logits = self.logits(z, level, int(self.model.partition.block_of(sigma)))
            output = target.posterior(self.keep(logits), z, level)
            z = target.advance(z, output, sigma, below, seed=self.seed, step=0)
        return output.raw.argmax(-1)

    def logits(self, z: Tensor, sigma: Tensor, block: int) -> Tensor:
        """Return the block's logits of the next group (B, g, V) without z's own evidence."""
        around = self.around(block)
        if not around.stem.sees_z:
            return self.next_logits[block]
        c = edm.precondition(sigma, self.model.target.sigma_data)
        h, cond = around.stem.noised(c.c_in.unsqueeze(-1) * z, c.c_noise)
        for layer, cache in zip(self.model.blocks[block].layers, self.caches[block], strict=True):
            h = layer.decode(h, cond, cache)
        return around.head(around.head.features(h), cond).float()

    def around(self, block: int) -> StemHead:
        """Return the stem and head of `block`."""
        return self.model.blocks[block].around(self.model.stem_head)


@torch.no_grad()
def ancestral(network: nn.Module, tokens: Tensor, count: int, *, seed: int) -> Tensor:
    """Append `count` tokens to prompts (B, n), each drawn from an ordinary network's prediction.

    Args:
        network: maps tokens (B, N) to logits (B, N, V) of each, given those before it.
        tokens: prompts (B, n).
        count: tokens to append.
        seed: of the draws.

    Returns:
        (B, n + count).
    """
    for _ in range(count):
        placeholder = tokens.new_zeros(len(tokens), 1)  # logits of the last token don't depend on it
        logits = network(torch.cat([tokens, placeholder], 1))[:, -1:]
        tokens = torch.cat([tokens, draw(logits, seed=stream(seed, "ancestral", tokens.shape[1]))], 1)
    return tokens
