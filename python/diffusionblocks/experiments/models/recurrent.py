"""A small recurrent-depth network: a prelude embeds x, a core is iterated, a coda predicts the answers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

import dbkernels

from ...noise.rng import stream
from ..data.puzzles import Puzzle
from .layers import LayerConfig, RotaryLayer, check_rotary


@dataclass(frozen=True)
class RecurrentConfig(LayerConfig):
    """Sizes of a recurrent-depth network.

    Attributes:
        layers: layers of the core.
        mlp: width of the MLP's hidden layer.
        prelude: layers before the core.
        coda: layers after the core.
        passes: mean number of the core's iterations in end-to-end training, drawn from Huginn's log-normal Poisson.
        backprop: last iterations that gradients pass through.
    """

    layers: int = 4
    mlp: int = 128
    prelude: int = 2
    coda: int = 2
    passes: int = 8
    backprop: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rotary(self)

    @property
    def evaluated(self) -> int:
        """Number of layers evaluated by one iteration with prelude and coda."""
        return self.prelude + self.layers + self.coda


class Prelude(nn.Module):
    """Map puzzles (B, T) and the state (B, T, width) to the core's input (B, T, D); there is no conditioning."""

    def __init__(self, config: RecurrentConfig, puzzle: Puzzle, width: int):
        super().__init__()
        self.puzzle = puzzle
        self.embed = nn.Embedding(puzzle.vocab_size, config.dim)
        self.position = nn.Parameter(torch.randn(puzzle.tokens, config.dim) * 0.2)
        self.layers = nn.ModuleList(RotaryLayer(config, conditioned=False) for _ in range(config.prelude))
        self.join = nn.Linear(config.dim + width, config.dim)  # Huginn's "adapter"

    def forward(self, x: Tensor, z: Tensor, c_noise: Tensor | None = None) -> tuple[Tensor, None]:
        return self.add_state(self.embed_puzzle(x), z), None

    def embed_puzzle(self, x: Tensor) -> Tensor:
        """Embed puzzles (B, T) as (B, T, D), once for all iterations."""
        h = self.embed(x) + self.position
        for layer in self.layers:
            h = layer(h, None)
        return h

    def add_state(self, h: Tensor, z: Tensor) -> Tensor:
        """Join embedded puzzles (B, T, D) and the state (B, T, width) to the core's input (B, T, D)."""
        return self.join(torch.cat([h, z.to(h.dtype)], dim=-1))

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless `x` is a non-empty batch of this model's puzzles."""
        if x.dim() != 2 or x.shape[1] != self.puzzle.tokens or len(x) == 0 or x.dtype != torch.int64:
            raise ValueError(
                f"puzzles must be a (B >= 1, {self.puzzle.tokens}) int64 tensor, got {tuple(x.shape)} {x.dtype}"
            )


class Coda(nn.Module):
    """Map the core's output (B, T, D) to features (B, T, D), and these to logits (B, T, K)."""

    def __init__(self, config: RecurrentConfig, puzzle: Puzzle):
        super().__init__()
        self.layers = nn.ModuleList(RotaryLayer(config, conditioned=False) for _ in range(config.coda))
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.linear = nn.Linear(config.dim, puzzle.num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def features(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer(h, None)
        return self.norm(h)

    def forward(self, h: Tensor, cond: Tensor | None) -> Tensor:
        return self.linear(h)


class Recurrent(nn.Module):
    """The ordinary recurrent-depth network: iterate state <- core(join(prelude(x), state)), then apply the coda.

    Source: Geiping et al. 2025, arXiv 2502.05171.
    """

    def __init__(self, config: RecurrentConfig, puzzle: Puzzle):
        super().__init__()
        self.config = config
        self.prelude = Prelude(config, puzzle, config.dim)
        self.layers = nn.ModuleList(RotaryLayer(config, conditioned=False) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.coda = Coda(config, puzzle)

    def forward(self, x: Tensor, passes: int, *, seed: int = 0, step: int = 0) -> Tensor:
        """Return logits (B, T, K) of puzzles (B, T) after `passes` iterations; (seed, step) address the first state."""
        h = self.prelude.embed_puzzle(x)
        noise = dbkernels.philox_normal(h.shape, seed=stream(seed, "state"), offset=step, device=x.device)
        state = noise.clamp(-2, 2).mul(math.sqrt(0.4)).to(h.dtype)
        through = min(passes, self.config.backprop)
        with torch.no_grad():
            for _ in range(passes - through):
                state = self.iterate(h, state)
        for _ in range(through):
            state = self.iterate(h, state)
        return self.coda(self.coda.features(state), None)

    def iterate(self, h: Tensor, state: Tensor) -> Tensor:
        """Apply the core once to the state (B, T, D)."""
        state = self.prelude.add_state(h, state)
        for layer in self.layers:
            state = layer(state, None)
        return self.norm(state)

    def loss(self, x: Tensor, y: Tensor, *, seed: int, step: int) -> Tensor:
        """Return the mean cross-entropy after a number of passes drawn for the step."""
        logits = self(x, drawn_passes(self.config.passes, seed, step), seed=seed, step=step)
        return functional.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


def drawn_passes(mean: int, seed: int, step: int) -> int:
    """Draw 1 + Poisson(log-normal rate), of mean about `mean`. Source: arXiv 2502.05171."""
    spread = 0.5
    generator = torch.Generator().manual_seed(stream(seed, "passes", step))
    rate = math.log(max(mean - 1, 1e-9)) - spread**2 / 2 + spread * torch.randn((), generator=generator)
    return 1 + int(torch.poisson(rate.exp(), generator=generator))


def layer_evaluations(config: RecurrentConfig, *, steps: int, seed: int) -> float:
    """Return the layer evaluations of `steps` end-to-end training steps; forward alone counts a third."""
    total = 0.0
    for step in range(steps):
        passes = drawn_passes(config.passes, seed, step)
        through = min(passes, config.backprop)
        total += config.prelude + config.coda + config.layers * (through + (passes - through) / 3)
    return total
