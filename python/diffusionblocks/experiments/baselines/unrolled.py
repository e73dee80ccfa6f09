"""The denoising chain of recurrent depth, trained through several of its steps instead of one at a time.

A chain of one step is block-wise training itself. Longer ones are trained on states of their own making, as they are in
use, and keep the activations of all of their steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from ...noise.rng import stream
from ..tasks.base import Batches, Row
from ..tasks.recurrent import RecurrentTask
from .end_to_end import Attempt, Ordinary, Result, Rows, settings_of, train, tuned

PART = 16  # of the noise's mass that a step passes: those of a trajectory of so many steps


class Chain(nn.Module):
    """A task's denoiser, trained through `steps` Euler steps that follow each other.

    The first starts at true answers under noise, each at a level of its own, the others at what the one before left.
    """

    def __init__(self, task: RecurrentTask, steps: int):
        super().__init__()
        self.task, self.steps, self.model = task, steps, task.model()

    def forward(self, x: Tensor, passes: int) -> Tensor:
        """Return logits (B, T, K) at the end of a trajectory, without gradient."""
        logits: Tensor = self.task.trajectory(self.model, x, passes)[-1]["logits"]
        return logits

    def loss(self, x: Tensor, y: Tensor, *, seed: int, step: int) -> Tensor:
        """Return the cross-entropy in nats, the mean over the steps of the chain; gradients pass through all of it."""
        model, target = self.model, self.model.target
        sigma = model.draw_sigma(0, target.level_shape(y), seed=seed, step=step, device=y.device)
        z = target.noised(y, sigma, seed=stream(seed, "eps", 0), offset=step)
        total = torch.zeros((), device=y.device)
        for _ in range(self.steps):
            features = model.blocks[0](x, *target.inputs(z, sigma), model.stem_head)
            output, below = target.read(features, z, sigma), self.below(sigma)
            total = total + functional.cross_entropy(output.raw.flatten(0, 1), y.flatten())
            r = (below / sigma).unsqueeze(-1)
            z, sigma = r * z + (1 - r) * output.denoised, below
        return total / self.steps

    def below(self, sigma: Tensor) -> Tensor:
        """Return the levels a step further down."""
        partition, density = self.model.partition, self.model.partition.density
        ends = torch.tensor([partition.sigma_min, partition.sigma_max], dtype=torch.float64, device=sigma.device)
        low, high = density.cdf(ends)
        mass = (density.cdf(sigma.double()) - (high - low) / PART).clamp(min=low)
        return density.ppf(mass).float().clamp(partition.sigma_min, partition.sigma_max)


def unrolled(task: RecurrentTask, device: torch.device, *callbacks: Any, steps: int) -> Result:
    """Train through chains of so many steps, for as many layer evaluations as block-wise training has."""
    each = float(steps * task.config.model.evaluated)
    name = f"unrolled, {steps} steps" if steps > 1 else "one step"
    return recurrent(name, task, device, lambda: Chain(task, steps), task.batches(device), each, *callbacks)


def recurrent(
    name: str,
    task: RecurrentTask,
    device: torch.device,
    make: Callable[[], nn.Module],
    batches: Batches,
    each: float,
    *callbacks: Any,
) -> Result:
    """Train a network with loss(x, y, seed=, step=) and forward(x, passes) at the compute of block-wise training.

    Args:
        make: Returns the network, freshly initialised.
        each: Layer evaluations of a step, which decide the number of steps.
    """
    config = task.config
    steps = max(1, round(config.share * config.budget / each))

    def run(lr: float, warmup: float) -> Attempt:
        network = make()
        settings = settings_of(config, device, steps=steps, lr=lr, warmup=warmup)

        def score(split: str) -> Row:
            return {**task.score(network, split, device), "layer_evaluations": steps * each}

        return train(name, Ordinary(network).to(device), settings, batches, score, Rows(), *callbacks)

    return tuned(name, task, run, config.tune_lr, config.tune_warmup)
