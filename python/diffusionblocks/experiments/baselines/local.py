"""The local baseline: every block of layers learns to classify by a small head of its own, and no gradient crosses.

Source: Belilovsky, Eickenberg and Oyallon 2020, arXiv 1901.08164 (decoupled greedy learning), after Nøkland and Eidnes
2019, arXiv 1901.06656. Ours, not the papers': the layers are a ViT's, in as many blocks as block-wise training has, and
a head classifies by [CLS], as the ordinary network's does, through one hidden layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from ...noise.rng import stream
from ..models.vit import Head, ViT, ViTConfig
from ..tasks.vit import ViTTask
from .end_to_end import Result, end_to_end
from .one_by_one import backward_one_by_one


class Auxiliary(nn.Module):
    """Logits (B, K) from the first token, through one hidden layer of the network's width."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.hidden, self.head = nn.Linear(config.dim, config.dim), Head(config, conditioned=False)

    def forward(self, h: Tensor) -> Tensor:
        h = h[:, :1] + functional.gelu(self.hidden(functional.layer_norm(h[:, :1], h.shape[-1:])))
        return self.head(self.head.features(h), None)


class Local(nn.Module):
    """An ordinary ViT in blocks of layers, each with a head; the last block's head is the network's.

    blocks: Layers of each block, from the first.
    """

    def __init__(self, config: ViTConfig, blocks: Sequence[int]):
        super().__init__()
        network = ViT(config, conditioned=False)
        self.stem, self.layers, self.blocks = network.stem, network.layers, tuple(blocks)
        self.heads = nn.ModuleList(Auxiliary(config) for _ in blocks)

    def outputs(self, x: Tensor) -> Iterator[Tensor]:
        """Return each block's logits (B, K); no gradient flows back into the block before."""
        h, first = self.stem(x)[0], 0
        for count, head in zip(self.blocks, self.heads, strict=True):
            h = h.detach() if first else h
            for layer in self.layers[first : first + count]:
                h = layer(h, None)
            first += count
            yield head(h)

    def loss(self, x: Tensor, y: Tensor, *, seed: int, step: int) -> Tensor:
        """Return the mean of the blocks' cross-entropies; seed and step are unused.

        Each block's backward pass runs before the next block's forward pass, so that the activations of one are held at
        a time. The last block's is the caller's: its gradient alone flows from the result.
        """
        losses = (functional.cross_entropy(logits.float(), y) for logits in self.outputs(x))
        return backward_one_by_one(losses, len(self.blocks))

    def forward(self, x: Tensor) -> Tensor:
        """Return the last block's logits (B, K)."""
        *_, logits = self.outputs(x)
        return logits


class LocalTask(ViTTask):
    """Image labels by local losses."""

    def network(self) -> nn.Module:
        """Return the network, initialised from the config's seed."""
        torch.manual_seed(stream(self.config.seed, "init") % 2**63)
        return Local(self.config.model, self.config.layer_counts)


def local(task: ViTTask, device: torch.device, *callbacks: Any) -> Result:
    """Train at equal layer evaluations: a step runs every layer once, as end to end does. Rates are end to end's.

    Raises: NonFiniteLoss if no rate gives a finite loss.
    """
    own = LocalTask(task.config)
    own.data = task.data
    return end_to_end(own, device, *callbacks, name="local")
