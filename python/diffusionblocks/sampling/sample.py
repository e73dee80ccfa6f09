"""Samples from a trained model."""

from __future__ import annotations

import itertools
import math
import numbers

from torch import Tensor

from ..arguments import check_whole
from ..blocks import DiffusionBlocks
from ..noise.partition import step_levels
from ..targets.codebook import CodebookTarget
from ..targets.masked import MaskedTarget
from .sampler import BATCH, Sampler
from .samplers import SAMPLERS, guided


def sample(
    model: DiffusionBlocks,
    x: Tensor,
    *,
    steps: int = 50,
    sampler: str = "heun",
    guidance: float = 1.0,
    unconditional: Tensor | None = None,
    seed: int = 0,
    batch: int = BATCH,
) -> Tensor:
    """Return one sample of y per x, from the highest noise to none, with averaged weights where there are any.

    Args:
        model: A trained model.
        x: Conditioning, (N, ...); for masked tokens (N, 0).
        steps: Steps of the trajectory, at least one per block.
        sampler: "euler", "heun" (two evaluations per step) or "dpmpp_2m"; masked tokens have one of their own.
        guidance: Classifier-free guidance scale, 0 or more; 1 disables guidance and halves the cost.
        unconditional: x without the condition, for guidance != 1; by default the stem's `unconditional(x)`.
        seed: Of the noise.
        batch: Samples per call of the network.

    Returns:
        Images or latents (N, ...), labels (N,) or tokens (N, L).

    Raises: ValueError on an argument that doesn't fit, or guidance without an unconditional x.
    """
    _check(model, x, steps, sampler, guidance, batch)
    levels = step_levels(model.partition, steps)
    training = model.training
    try:
        z = _trajectory(model, x, levels, sampler, guidance, unconditional, seed, batch)
    finally:
        model.train(training)
    if isinstance(model.target, CodebookTarget):
        return model.target.evidence(z).argmax(-1)
    return z


def _check(model: DiffusionBlocks, x: Tensor, steps: int, sampler: str, guidance: float, batch: int) -> None:
    if not isinstance(model, DiffusionBlocks) or not isinstance(x, Tensor):
        raise TypeError(f"sample takes DiffusionBlocks and a tensor x, got {type(model).__name__}, {type(x).__name__}")
    if sampler not in list(SAMPLERS):
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if not isinstance(guidance, numbers.Real) or not 0 <= guidance < math.inf:
        raise ValueError(f"guidance must be 0 or more, got {guidance!r}")
    if guidance != 1 and isinstance(model.target, MaskedTarget):
        raise ValueError(f"guidance={guidance}: masked tokens are sampled without guidance, leave it out")
    check_whole("steps", steps, model.partition.blocks, ", the number of blocks")
    check_whole("batch", batch, 1)


def _trajectory(
    model: DiffusionBlocks,
    x: Tensor,
    levels: list[float],
    sampler: str,
    guidance: float,
    unconditional: Tensor | None,
    seed: int,
    batch: int,
) -> Tensor:
    with model.averages():
        z = model.start(x, levels[0], seed=seed)
        read = Sampler(model, x, batch=batch)
        if isinstance(model.target, MaskedTarget):
            for i, (t, below) in enumerate(itertools.pairwise(levels)):
                z = model.target.advance(z, read(z, t), t, below, seed=seed, step=i)
            return z
        if guidance != 1 and unconditional is None:
            unconditional = _unconditional(model, x)
        without = read if unconditional is None else Sampler(model, unconditional, batch=batch)
        denoise = guided(lambda z, s: read(z, s).denoised, lambda z, s: without(z, s).denoised, guidance)
        return SAMPLERS[sampler](denoise, z, levels)


def _unconditional(model: DiffusionBlocks, x: Tensor) -> Tensor:
    stem = model.blocks[0].around(model.stem_head).stem
    if not hasattr(stem, "unconditional"):
        raise ValueError("guidance needs x without the condition: pass unconditional=, e.g. the label of no class")
    made: Tensor = stem.unconditional(x)
    return made
