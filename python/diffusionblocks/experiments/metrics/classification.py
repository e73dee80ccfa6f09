"""A classifier's accuracy along the sampling trajectory of its label's estimate, and the information bound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...blocks import DiffusionBlocks
from ...noise.partition import step_levels
from ...sampling.sampler import BATCH, Sampler
from ...sampling.samplers import SAMPLERS
from .bound import accuracy, bound


def trajectory(
    model: DiffusionBlocks,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    sampler: str = "euler",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return each step's number, level, block and logits (N, K), from the highest level to 0."""
    z = model.target.start(len(x), sigmas[0], seed=seed, device=x.device)
    logits: dict[float, Tensor] = {}
    read = Sampler(model, x)

    def denoise(z: Tensor, sigma: float) -> Tensor:
        output = read(z, sigma)
        logits[sigma] = output.raw  # a level's own step comes after Heun has looked ahead to it
        return output.denoised

    SAMPLERS[sampler](denoise, z, sigmas)
    block_of = model.partition.block_of
    return [{"step": i, "sigma": s, "block": int(block_of(s)), "logits": logits[s]} for i, s in enumerate(sigmas[:-1])]


@torch.no_grad()
def evaluate(
    model: DiffusionBlocks,
    x: Tensor,
    labels: Tensor,
    *,
    steps: int,
    levels: str = "karras",
    sampler: str = "euler",
    seed: int = 0,
) -> dict[str, Any]:
    """Return accuracy along a trajectory of `steps` steps, and the information bound read at 32 noise levels.

    Args:
        x: Conditioning, (N, ...).
        labels: (N,).

    Raises: ValueError on an empty split or steps < B.
    """
    if len(x) == 0:
        raise ValueError("nothing to evaluate: the split is empty")
    sigmas = step_levels(model.partition, steps, kind=levels)
    path = [
        {k: step[k] for k in ("step", "sigma", "block")} | {"accuracy": accuracy(step["logits"], labels)}
        for step in trajectory(model, x, sigmas, sampler=sampler, seed=seed)
    ]
    return {
        "accuracy": path[-1]["accuracy"],
        "images": len(x),
        "trajectory": path,
        **bound(model, x, labels, seed=seed),
    }


@torch.no_grad()
def score(network: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Return the accuracy of an ordinary classifier, in percent."""
    network.eval()
    guesses = torch.cat([network(part) for part in x.split(BATCH)])
    network.train()
    return accuracy(guesses, labels)
