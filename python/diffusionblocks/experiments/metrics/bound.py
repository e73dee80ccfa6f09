"""A trained model read where it stands, a block at a time; the information bound with its per-block regret."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from ...noise.information import Bound, information_bound
from ...noise.partition import equal_mass_edges
from ...noise.rng import stream
from ...sampling.sampler import Walker
from ...targets.base import Output


class LabelReader:
    """The owners' outputs for all of x, at falling levels; a block whose layers don't see z is asked once.

    x: conditioning, the same for every level.
    """

    def __init__(self, walker: Walker, x: Tensor):
        self.walker, self.x = walker, x
        self.block, self.said = -1, torch.empty(0)  # what the last block asked said from x alone

    def __call__(self, z: Tensor, sigma: float) -> Output:
        """What the owner of `sigma` makes of z."""
        model = self.walker.model
        block = int(model.partition.block_of(sigma))
        if block == self.block and not model.sees_z:
            return self.updated(self.said, z, sigma)
        output = self.walker.read(self.x, z, sigma)
        self.block, self.said = block, output.raw - self.evidence(z, sigma)
        return output

    def evidence(self, z: Tensor, sigma: float) -> Tensor:
        """What z alone says of each label: log-likelihoods up to a constant."""
        return self.walker.model.target.evidence(z) / sigma**2

    def updated(self, said: Tensor, z: Tensor, sigma: float) -> Output:
        """What was said from x alone, updated by Bayes' rule."""
        logits = said + self.evidence(z, sigma)
        return Output(logits, logits.softmax(-1) @ self.walker.model.target.embeddings().float())


@torch.no_grad()
def bound(walker: Walker, x: Tensor, labels: Tensor, *, count: int = 32, seed: int = 0) -> dict[str, Any]:
    """Cross-entropy, error and bound at `count` levels of equal probability, true labels noised; regret per block.

    x: conditioning; labels: (B,) or (B, N), each a class of the target's codebook. What the network says at the highest
    noise, updated by Bayes' rule alone, has a known bound: its cross-entropy. By how much chance and the integral miss
    that is taken off the model's own, which saw the same noise (a control variate).
    """
    model = walker.model
    model.eval()
    target, shape = model.target, model.target.level_shape(labels)
    sigmas = list(equal_mass_edges(model.partition.density, count - 1))
    clean, prior, read = target.clean(labels), torch.empty(0), LabelReader(walker, x)
    levels: list[dict[str, Any]] = []
    known: list[dict[str, Any]] = []
    for i, sigma in enumerate(sigmas):
        level = torch.full(shape, sigma, device=x.device)
        z = target.noised(labels, level, seed=stream(seed, "bound"), offset=i)
        output = read(z, sigma)
        prior = read.said if i == 0 else prior
        bayes = read.updated(prior, z, sigma)
        block = int(model.partition.block_of(sigma))
        levels.append({"sigma": sigma, "block": block, **_measured(output, clean, labels)})
        known.append({"sigma": sigma, "block": block, **_measured(bayes, clean, labels)})
    truth = cross_entropy(prior, labels)
    missed = [value - truth for value in _bound(known).bound]
    found = [value - miss for value, miss in zip(_bound(levels).bound, missed, strict=True)]
    for level, value in zip(levels, found, strict=True):
        level["bound"] = value
    rises = [0.0] * (levels[-1]["block"] + 1)
    for level, rise in zip(levels[1:], (b - a for a, b in itertools.pairwise(found)), strict=True):
        rises[level["block"]] += rise
    bits = 1 / math.log(2)
    return {"levels": levels, "bound_bits": found[-1] * bits, "regret_bits": [r * bits for r in rises]}


def _measured(output: Output, clean: Tensor, labels: Tensor) -> dict[str, float]:
    return {
        "cross_entropy": cross_entropy(output.raw, labels),
        "error": float((output.denoised - clean).double().square().sum(-1).mean()),
        "accuracy": accuracy(output.raw, labels),
    }


def _bound(levels: list[dict[str, Any]]) -> Bound:
    columns: list[list[Any]] = [[level[k] for level in levels] for k in ("sigma", "cross_entropy", "error", "block")]
    return information_bound(*columns)


@torch.no_grad()
def held_out_loss(walker: Walker, x: Tensor, y: Tensor, *, count: int = 32, seed: int = 0) -> dict[str, Any]:
    """The denoising loss at `count` levels, each standing for the same share of the training noise, and their mean.

    x: conditioning; y: targets.
    """
    model, levels = walker.model, []
    model.eval()
    for i, sigma in enumerate(equal_mass_edges(model.partition.density, 2 * count)[1::2]):
        level = torch.full(model.target.level_shape(y), sigma, device=y.device)
        z = model.target.noised(y, level, seed=stream(seed, "held out"), offset=i)
        loss = model.target.loss(walker.read(x, z, sigma), z, y, level)
        block = int(model.partition.block_of(sigma))
        levels.append({"sigma": sigma, "block": block, "loss": float(loss.double().mean())})
    return {"loss": sum(level["loss"] for level in levels) / count, "levels": levels}


def cross_entropy(logits: Tensor, labels: Tensor) -> float:
    """Mean over labels, in nats."""
    return float(functional.cross_entropy(logits.flatten(0, -2).double(), labels.flatten().long()))


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of right first guesses, in percent."""
    return float((logits.argmax(-1) == labels).double().mean() * 100)
