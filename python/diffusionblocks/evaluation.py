"""What a trained model is worth: accuracy along the walk, and the information bound with its per-block regret."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import dbkernels

from .blocks import DiffusionBlocks
from .information import information_bound
from .partition import equal_mass_edges, step_levels
from .residency import Residency
from .rng import stream
from .sampling import SAMPLERS
from .targets import Output

BATCH = 512


class Walker:
    """Denoises whole splits, one resident block at a time.

    walk_start: "mean" starts at z = 0, the centre of the noise; "noise" at sigma_max eps.
    """

    def __init__(self, model: DiffusionBlocks, residency: Residency, *, walk_start: str = "mean"):
        self.model, self.residency, self.walk_start = model, residency, walk_start

    def read(self, x: Tensor, z: Tensor, sigma: float) -> Output:
        """The owner's output for all of x, in batches; z is (N, d)."""
        block = int(self.model.partition.block_of(sigma))
        self.residency.activate(block)
        pieces = [
            self.model.denoise(x_, z_, sigma, block=block)
            for x_, z_ in zip(x.split(BATCH), z.split(BATCH), strict=True)
        ]
        return Output(torch.cat([p.raw for p in pieces]), torch.cat([p.denoised for p in pieces]))

    def walk(
        self, x: Tensor, levels: list[float], *, sampler: str = "euler", seed: int = 0
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """From the highest level to 0: the last step's logits (N, K), and each step's level, block and logits."""
        start = torch.zeros(len(x), self.model.target.table.shape[1], device=x.device)
        if self.walk_start == "noise":
            sigma = torch.tensor(levels[0], device=x.device)
            start = dbkernels.inject_noise(start, sigma, seed=stream(seed, "walk"), offset=0)
        logits: dict[float, Tensor] = {}

        def denoise(z: Tensor, sigma: float) -> Tensor:
            output = self.read(x, z, sigma)
            logits[sigma] = output.raw  # a level's own step comes after Heun has looked ahead to it
            return output.denoised

        SAMPLERS[sampler](denoise, start, levels)
        steps = [
            {"step": i, "sigma": s, "block": int(self.model.partition.block_of(s)), "logits": logits[s]}
            for i, s in enumerate(levels[:-1])
        ]
        return steps[-1]["logits"], steps


@torch.no_grad()
def evaluate(
    walker: Walker,
    x: Tensor,
    labels: Tensor,
    *,
    steps: int,
    levels: str = "karras",
    sampler: str = "euler",
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy along a walk of `steps` steps, and the information bound read at 32 noise levels.

    x: (N, ...) conditioning; labels: (N,). Weights are used as they are: enter `residency.averages()` for averages.
    Raises: ValueError on an empty split or steps < B.
    """
    if len(x) == 0:
        raise ValueError("nothing to evaluate: the split is empty")
    walker.model.eval()
    sigmas = step_levels(walker.model.partition, steps, kind=levels)
    logits, path = walker.walk(x, sigmas, sampler=sampler, seed=seed)
    walk = [
        {k: step[k] for k in ("step", "sigma", "block")} | {"accuracy": accuracy(step["logits"], labels)}
        for step in path
    ]
    return {
        "accuracy": accuracy(logits, labels),
        "images": len(x),
        "walk": walk,
        **bound(walker, x, labels, seed=seed),
    }


def bound(walker: Walker, x: Tensor, labels: Tensor, *, count: int = 32, seed: int = 0) -> dict[str, Any]:
    """Cross-entropy, error and bound at `count` levels of equal probability, true labels noised; regret per block."""
    model = walker.model
    sigmas = list(equal_mass_edges(model.partition.density, count - 1))
    clean = model.target.clean(labels)
    levels = []
    for sigma in sigmas:
        level = torch.full((len(x),), sigma, device=x.device)
        z = dbkernels.inject_noise(clean, level, seed=stream(seed, "bound"))  # one draw for all levels
        output = walker.read(x, z, sigma)
        levels.append(
            {
                "sigma": sigma,
                "block": int(model.partition.block_of(sigma)),
                "cross_entropy": float(model.target.loss(output, z, labels, level).double().mean()),
                "error": float((output.denoised - clean).double().square().sum(-1).mean()),
                "accuracy": accuracy(output.raw, labels),
            }
        )
    columns: list[list[Any]] = [[level[k] for level in levels] for k in ("cross_entropy", "error", "block")]
    read = information_bound(sigmas, *columns)
    for level, value in zip(levels, read.bound, strict=True):
        level["bound"] = value
    bits = 1 / math.log(2)
    return {"levels": levels, "bound_bits": read.bound[-1] * bits, "regret_bits": [r * bits for r in read.regret]}


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of right first guesses, in percent."""
    return float((logits.argmax(-1) == labels).double().mean() * 100)
