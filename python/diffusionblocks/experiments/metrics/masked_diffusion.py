"""A masked language model's exact likelihood bound, and text generated from masks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

from ...blocks import DiffusionBlocks
from ...noise import mask_schedule
from ...noise.partition import Partition, Range
from ...noise.rng import stream
from ...sampling.decoding import Filter
from ...sampling.generate import fill
from ...targets.base import Noised

BATCH = 64


class Step(NamedTuple):
    """A step of the trajectory: its time, the block that owns it, and the tokens with masks after it, (count, N)."""

    t: float
    block: int
    z: Tensor


@torch.no_grad()
def bound(model: DiffusionBlocks, tokens: Tensor, *, levels: int, seed: int = 0) -> dict[str, Any]:
    """Return an upper bound on the likelihood in bits per token: a mean over windows (W, N), with its standard error.

    An integral over time, by the owner of each part: "block_0", "block_1", ... are the shares. The rest:
    "prior", the tokens that are still there at t = 1, coded by block 0 given masks alone; "reconstruction",
    those masked at the lowest time. levels: parts of time, in each of which a window is evaluated at one random
    time; every block has at least one. The estimate has no bias.
    Raises: ValueError on fewer than two windows or levels < B. Source: Shi et al. 2024 (MD4), eq. 4 and 5.
    """
    partition = model.partition
    if len(tokens) < 2 or levels < partition.blocks:
        raise ValueError(
            f"the bound needs two windows or more, and levels >= B = {partition.blocks}, got {len(tokens)} and {levels}"
        )
    model.eval()
    shares: dict[str, Tensor] = {}
    rows = []
    for i, (block, part) in enumerate(_parts(partition, levels)):
        t = mask_schedule.times(
            part.high, part.low, len(tokens), seed=stream(seed, "times"), offset=i, device=tokens.device
        )
        z = model.target.noised(tokens, t, seed=stream(seed, "masks"), offset=i)
        entropy = masked_entropy(model, tokens, z, t, block)
        share = (part.high - part.low) * mask_schedule.weight(t) * entropy
        name = f"block_{block}"
        shares[name] = shares.get(name, torch.zeros_like(share)) + share
        masked = float((z == model.target.mask_id).double().mean())
        if masked:
            level = {"sigma": (part.high + part.low) / 2, "block": block}
            rows.append(level | {"cross_entropy": float(entropy.mean()) / masked})
    shares |= _ends(model, tokens, seed)
    total = torch.stack(list(shares.values())).sum(0) / math.log(2)
    return {
        "bits": float(total.mean()),
        "standard_error": float(total.std() / math.sqrt(len(total))),
        **{name: float(share.mean()) / math.log(2) for name, share in shares.items()},
        "levels": rows,
    }


def _parts(partition: Partition, levels: int) -> list[tuple[int, Range]]:
    """Return `levels` falling parts of time, each of one block alone: about as many for all blocks."""
    parts = []
    for block in range(partition.blocks):
        low, high = partition.owned(block)
        count = levels // partition.blocks + (block < levels % partition.blocks)
        ends = torch.linspace(high, low, count + 1, dtype=torch.float64).tolist()
        parts += [(block, Range(b, a)) for a, b in itertools.pairwise(ends)]
    return parts


def _ends(model: DiffusionBlocks, tokens: Tensor, seed: int) -> dict[str, Tensor]:
    """Return the bound's terms beyond the integral, (W,) each: above the highest time and below the lowest."""
    target, partition = model.target, model.partition
    high, low = (
        torch.full((len(tokens),), t, device=tokens.device) for t in (partition.sigma_max, partition.sigma_min)
    )
    nothing = torch.full_like(tokens, target.mask_id)
    nearly_all = target.noised(tokens, low, seed=stream(seed, "reconstruction"), offset=0)
    return {
        "prior": mask_schedule.alpha(high) * masked_entropy(model, tokens, nothing, high, 0),
        "reconstruction": masked_entropy(model, tokens, nearly_all, low, partition.blocks - 1),
    }


@torch.no_grad()
def masked_entropy(model: DiffusionBlocks, tokens: Tensor, z: Tensor, t: Tensor, block: int) -> Tensor:
    """Return a block's cross-entropy of the masked places, summed over a window and divided by N: (W,) float64, nats.

    tokens, z: (W, N); t: (W,).
    """
    model.activate(block)
    pieces = []
    for y_, z_, t_ in zip(tokens.split(BATCH), z.split(BATCH), t.split(BATCH), strict=True):
        noised = Noised(z_, *model.target.inputs(z_, t_))
        features = model.blocks[block](given(y_), noised.scaled, noised.c_noise, model.stem_head)
        pieces.append(model.target.loss(features, noised, y_, t_).per_sample / mask_schedule.weight(t_))
    return torch.cat(pieces).double()


def given(tokens: Tensor) -> Tensor:
    """Return the empty conditioning of a model that is given nothing but the noised tokens: (B, 0)."""
    return tokens[:, :0]


def generate(
    model: DiffusionBlocks, levels: Sequence[float], z: Tensor, *, seed: int, keep: Filter = lambda x: x
) -> Iterator[Step]:
    """Denoise tokens z (count, N), masked where they are to be filled in, to tokens without masks. levels, keep: as
    sampling.generate.fill takes them."""
    for t, filled in fill(model, z, levels, seed=seed, keep=keep):
        yield Step(t, int(model.partition.block_of(t)), filled)


def unigram_bits(train: Tensor, tokens: Tensor, symbols: int) -> float:
    """Return bits per token of a model without context: the training split's frequencies, each count one more."""
    counts = torch.bincount(train.flatten(), minlength=symbols).double() + 1
    return float(functional.cross_entropy(counts.log().expand(tokens.numel(), -1), tokens.flatten()) / math.log(2))
