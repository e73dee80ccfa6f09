"""The tiny recursive model: two layers that refine a latent and an answer, again and again.

Source: Jolicoeur-Martineau 2025, "Less is More: Recursive Reasoning with Tiny Networks", arXiv 2510.04871. Ours, not
the paper's: the layers, their width, the optimizer and the average of the weights are those of the networks it is
compared with (the paper's are RMSNorm, SwiGLU and a width of 512), and no sample halts early, in training or in use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from ...noise.rng import stream
from ..data.puzzles import Puzzle
from ..models.layers import RotaryLayer
from ..models.recurrent import RecurrentConfig
from ..tasks.base import Batches
from ..tasks.recurrent import RecurrentTask
from .end_to_end import Result
from .unrolled import recurrent

LAYERS = 2


@dataclass(frozen=True)
class Recursions:
    """How a tiny network recurs; the defaults are the paper's.

    Attributes:
        latent: updates of the latent before one of the answer, n.
        deep: such rounds in a pass, T; gradients go through the last one.
        supervised: passes, each with its loss and its update of the weights, that a batch is trained for.
    """

    latent: int = 6
    deep: int = 3
    supervised: int = 16

    @property
    def layer_evaluations(self) -> float:
        """Layer evaluations of a pass in training; forward alone counts a third."""
        return LAYERS * (self.latent + 1) * (1 + (self.deep - 1) / 3)


class TinyRecursive(nn.Module):
    """One network of two layers for both updates: latent <- f(x + answer + latent), answer <- f(answer + latent)."""

    def __init__(self, config: RecurrentConfig, puzzle: Puzzle, recursions: Recursions):
        super().__init__()
        d, self.recursions = config.dim, recursions
        self.embed = nn.Embedding(puzzle.vocab_size, d)
        self.position = nn.Parameter(torch.randn(puzzle.tokens, d) * 0.2)
        self.start = nn.Parameter(torch.randn(2, d) * 0.2, requires_grad=False)  # answer and latent, fixed
        self.layers = nn.ModuleList(RotaryLayer(config, conditioned=False) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(d, config.norm_eps)
        self.head = nn.Linear(d, puzzle.num_classes)
        self.state: tuple[Tensor, Tensor] | None = None  # answer and latent that the next pass of a batch starts from

    def forward(self, x: Tensor, passes: int) -> Tensor:
        """Return logits (B, T, K) of puzzles (B, T) after so many passes."""
        h = self.embed(x) + self.position
        answer, latent = self.begin(h)
        for _ in range(passes):
            answer, latent = self.pass_through(h, answer, latent)
        return self.head(answer)

    def begin(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first answer and latent, both (B, T, D)."""
        return self.start[0].expand_as(h), self.start[1].expand_as(h)

    def pass_through(self, h: Tensor, answer: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Return answer and latent after a pass, with gradients of its last round."""
        with torch.no_grad():
            for _ in range(self.recursions.deep - 1):
                answer, latent = self.round(h, answer, latent)
        return self.round(h, answer, latent)

    def round(self, h: Tensor, answer: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Update the latent `recursions.latent` times, then the answer."""
        for _ in range(self.recursions.latent):
            latent = self.update(h + answer + latent)
        return self.update(answer + latent), latent

    def update(self, h: Tensor) -> Tensor:
        """Apply the layers to (B, T, D)."""
        for layer in self.layers:
            h = layer(h, None)
        return self.norm(h)

    def loss(self, x: Tensor, y: Tensor, *, seed: int, step: int) -> Tensor:
        """Return the mean cross-entropy after a pass that starts where the last one of the same batch ended."""
        h = self.embed(x) + self.position
        if step % self.recursions.supervised == 0 or self.state is None:
            self.state = self.begin(h)
        answer, latent = self.pass_through(h, *self.state)
        self.state = answer.detach(), latent.detach()
        return functional.cross_entropy(self.head(answer).flatten(0, 1).float(), y.flatten())


class Repeated:
    """Batches of which each comes as often as it is supervised."""

    def __init__(self, batches: Batches, times: int):
        self.batches, self.times = batches, times

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return batch `step // times`."""
        return self.batches.batch(step // self.times)


def tiny_recursive(
    task: RecurrentTask, device: torch.device, *callbacks: Any, recursions: Recursions = Recursions()
) -> Result:
    """Train a tiny recursive model for as many layer evaluations as block-wise training has."""
    config = task.config

    def make() -> TinyRecursive:
        torch.manual_seed(stream(config.seed, "init") % 2**63)
        return TinyRecursive(config.model, config.puzzle, recursions)

    batches = Repeated(task.batches(device), recursions.supervised)
    return recurrent("tiny recursive", task, device, make, batches, recursions.layer_evaluations, *callbacks)
