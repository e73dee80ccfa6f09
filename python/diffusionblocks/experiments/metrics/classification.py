"""What a classifier is worth: accuracy along the walk of the label's estimate, and the information bound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import dbkernels

from ...noise.partition import step_levels
from ...noise.rng import stream
from ...sampling.sampler import BATCH, Walker
from ...sampling.samplers import SAMPLERS
from .bound import accuracy, bound


def walk(
    walker: Walker, x: Tensor, sigmas: Sequence[float], *, start: str = "mean", sampler: str = "euler", seed: int = 0
) -> list[dict[str, Any]]:
    """From the highest level to 0: each step's number, level, block and logits (N, K).

    start: "mean" is z = 0, the centre of the noise; "noise" is sigma_max eps.
    """
    z = torch.zeros(len(x), walker.model.target.table.shape[1], device=x.device)
    if start == "noise":
        z = dbkernels.inject_noise(z, torch.tensor(sigmas[0], device=x.device), seed=stream(seed, "walk"), offset=0)
    logits: dict[float, Tensor] = {}

    def denoise(z: Tensor, sigma: float) -> Tensor:
        output = walker.read(x, z, sigma)
        logits[sigma] = output.raw  # a level's own step comes after Heun has looked ahead to it
        return output.denoised

    walker.model.eval()
    SAMPLERS[sampler](denoise, z, sigmas)
    block_of = walker.model.partition.block_of
    return [{"step": i, "sigma": s, "block": int(block_of(s)), "logits": logits[s]} for i, s in enumerate(sigmas[:-1])]


@torch.no_grad()
def evaluate(
    walker: Walker,
    x: Tensor,
    labels: Tensor,
    *,
    steps: int,
    levels: str = "karras",
    start: str = "mean",
    sampler: str = "euler",
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy along a walk of `steps` steps, and the information bound read at 32 noise levels.

    x: (N, ...) conditioning; labels: (N,). Raises: ValueError on an empty split or steps < B.
    """
    if len(x) == 0:
        raise ValueError("nothing to evaluate: the split is empty")
    sigmas = step_levels(walker.model.partition, steps, kind=levels)
    path = [
        {k: step[k] for k in ("step", "sigma", "block")} | {"accuracy": accuracy(step["logits"], labels)}
        for step in walk(walker, x, sigmas, start=start, sampler=sampler, seed=seed)
    ]
    return {
        "accuracy": path[-1]["accuracy"],
        "images": len(x),
        "walk": path,
        **bound(walker, x, labels, seed=seed),
    }


@torch.no_grad()
def score(network: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Accuracy of an ordinary classifier, in percent."""
    network.eval()
    guesses = torch.cat([network(part) for part in x.split(BATCH)])
    network.train()
    return accuracy(guesses, labels)
