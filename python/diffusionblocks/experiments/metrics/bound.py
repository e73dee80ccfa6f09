"""The information bound with its per-block regret, the held-out loss, cross-entropy and accuracy."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from ...blocks import DiffusionBlocks
from ...noise.information import Bound, information_bound
from ...noise.partition import equal_mass_edges
from ...noise.rng import stream
from ...sampling.sampler import BATCH, Sampler
from ...targets.base import Output
from ...targets.codebook import CodebookTarget


@torch.no_grad()
def bound(model: DiffusionBlocks, x: Tensor, labels: Tensor, *, count: int = 32, seed: int = 0) -> dict[str, Any]:
    """Return cross-entropy, error and bound at `count` levels of equal probability, true labels noised; regret per
    block.

    Monte-Carlo and integration error, measured on a prediction whose bound is known, is subtracted (control variate):
    the logits at the highest noise, updated by Bayes' rule alone, have their cross-entropy as bound.

    Args:
        model: With a CodebookTarget.
        x: Conditioning.
        labels: (B,) or (B, N), classes of the target's codebook.
    """
    target, shape = model.target, model.target.level_shape(labels)
    assert isinstance(target, CodebookTarget)
    sigmas = list(equal_mass_edges(model.partition.density, count - 1))
    clean, prior, sampler = target.clean(labels), torch.empty(0), Sampler(model, x)
    levels: list[dict[str, Any]] = []
    known: list[dict[str, Any]] = []
    for i, sigma in enumerate(sigmas):
        level = torch.full(shape, sigma, device=x.device)
        z = target.noised(labels, level, seed=stream(seed, "bound"), offset=i)
        output = sampler(z, sigma)
        if i == 0:
            prior = output.raw - target.evidence(z) / sigma**2
        block = int(model.partition.block_of(sigma))
        levels.append({"sigma": sigma, "block": block, **_measured(output, clean, labels)})
        known.append({"sigma": sigma, "block": block, **_measured(target.posterior(prior, z, level), clean, labels)})
    truth = cross_entropy(prior, labels)
    missed = [value - truth for value in _bound(known).bound]
    corrected = [value - miss for value, miss in zip(_bound(levels).bound, missed, strict=True)]
    for row, value in zip(levels, corrected, strict=True):
        row["bound"] = value
    rises = [0.0] * (levels[-1]["block"] + 1)
    for row, rise in zip(levels[1:], (b - a for a, b in itertools.pairwise(corrected)), strict=True):
        rises[row["block"]] += rise
    bits = 1 / math.log(2)
    return {"levels": levels, "bound_bits": corrected[-1] * bits, "regret_bits": [r * bits for r in rises]}


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
def held_out_loss(model: DiffusionBlocks, x: Tensor, y: Tensor, *, count: int = 32, seed: int = 0) -> dict[str, Any]:
    """Return the denoising loss at `count` levels, each for the same share of the training noise, and their mean.

    x: conditioning; y: targets.
    """
    model.eval()
    levels = []
    for i, sigma in enumerate(equal_mass_edges(model.partition.density, 2 * count)[1::2]):
        block = int(model.partition.block_of(sigma))
        total = torch.zeros((), dtype=torch.float64)
        for k, (x_, y_) in enumerate(zip(x.split(BATCH), y.split(BATCH), strict=True)):
            level = torch.full(model.target.level_shape(y_), sigma, device=y.device)
            loss = model.loss(block, x_, y_, sigma=level, seed=stream(seed, "held out"), step=i + count * k)
            total += loss.per_sample.double().mean().cpu() * len(y_)
        levels.append({"sigma": sigma, "block": block, "loss": float(total / len(y))})
    return {"loss": sum(level["loss"] for level in levels) / count, "levels": levels}


def cross_entropy(logits: Tensor, labels: Tensor) -> float:
    """Return the mean over labels, in nats."""
    return float(functional.cross_entropy(logits.flatten(0, -2).double(), labels.flatten().long()))


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of right first guesses, in percent."""
    return float((logits.argmax(-1) == labels).double().mean() * 100)
