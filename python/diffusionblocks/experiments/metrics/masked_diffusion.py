"""What a masked language model is worth: the exact likelihood bound; and text out of masks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

import dbkernels

from ...noise import mask_schedule as masking
from ...noise.partition import Partition, Range
from ...noise.rng import stream
from ...sampling.decoding import Filter, draw
from ...sampling.sampler import Walker

BATCH = 64


class Step(NamedTuple):
    """A step of a walk: its time, the block that owns it, and the tokens with masks after it, (count, N)."""

    t: float
    block: int
    z: Tensor


@torch.no_grad()
def bound(walker: Walker, tokens: Tensor, *, levels: int, seed: int = 0) -> dict[str, Any]:
    """Bits a token that the model's likelihood costs at most: a mean over windows (W, N), with its standard error.

    An integral over time, by the owner of each part: "block_0", "block_1", ... are the shares. The rest:
    "prior", the tokens that are still there at t = 1, coded by what block 0 says of masks alone; "reconstruction",
    those masked at the lowest time, told at once. levels: parts of time, in each of which a window is read at one
    random time; every block has at least one. The estimate has no bias.
    Raises: ValueError on fewer than two windows or levels < B. Source: Shi et al. 2024 (MD4), eq. 4 and 5.
    """
    model, partition = walker.model, walker.model.partition
    if len(tokens) < 2 or levels < partition.blocks:
        raise ValueError(
            f"the bound needs two windows or more, and levels >= B = {partition.blocks}, got {len(tokens)} and {levels}"
        )
    model.eval()
    shares: dict[str, Tensor] = {}
    found = []
    for i, (block, part) in enumerate(_parts(partition, levels)):
        t = masking.times(part.high, part.low, len(tokens), seed=stream(seed, "times"), offset=i, device=tokens.device)
        z = model.target.noised(tokens, t, seed=stream(seed, "masks"), offset=i)
        entropy = masked_entropy(walker, tokens, z, t, block)
        share = (part.high - part.low) * masking.weight(t) * entropy
        name = f"block_{block}"
        shares[name] = shares.get(name, torch.zeros_like(share)) + share
        masked = float((z == model.target.mask_id).double().mean())
        if masked:
            level = {"sigma": (part.high + part.low) / 2, "block": block}
            found.append(level | {"cross_entropy": float(entropy.mean()) / masked})
    shares |= _ends(walker, tokens, seed)
    total = torch.stack(list(shares.values())).sum(0) / math.log(2)
    return {
        "bits": float(total.mean()),
        "standard_error": float(total.std() / math.sqrt(len(total))),
        **{name: float(share.mean()) / math.log(2) for name, share in shares.items()},
        "levels": found,
    }


def _parts(partition: Partition, levels: int) -> list[tuple[int, Range]]:
    """`levels` falling parts of time, each of one block alone: about as many for all blocks."""
    found = []
    for block in range(partition.blocks):
        low, high = partition.owned(block)
        count = levels // partition.blocks + (block < levels % partition.blocks)
        ends = torch.linspace(high, low, count + 1, dtype=torch.float64).tolist()
        found += [(block, Range(b, a)) for a, b in itertools.pairwise(ends)]
    return found


def _ends(walker: Walker, tokens: Tensor, seed: int) -> dict[str, Tensor]:
    """What the integral leaves out, (W,) each: above the highest time, where alpha isn't 0, and below the lowest."""
    target, partition = walker.model.target, walker.model.partition
    high, low = (
        torch.full((len(tokens),), t, device=tokens.device) for t in (partition.sigma_max, partition.sigma_min)
    )
    nothing = torch.full_like(tokens, target.mask_id)
    nearly_all = target.noised(tokens, low, seed=stream(seed, "reconstruction"), offset=0)
    return {
        "prior": masking.alpha(high) * masked_entropy(walker, tokens, nothing, high, 0),
        "reconstruction": masked_entropy(walker, tokens, nearly_all, low, partition.blocks - 1),
    }


@torch.no_grad()
def masked_entropy(walker: Walker, tokens: Tensor, z: Tensor, t: Tensor, block: int) -> Tensor:
    """Cross-entropy of the masked places summed over a window and divided by N, (W,) float64, nats, as `block` reads z.

    tokens, z: (W, N); t: (W,).
    """
    model = walker.model
    walker.activate(block)
    pieces = []
    for y_, z_, t_ in zip(tokens.split(BATCH), z.split(BATCH), t.split(BATCH), strict=True):
        head, h, cond = model.blocks[block](given(y_), z_, t_, model.target, model.ends)
        pieces.append(model.target.objective(head, h, cond, z_, y_, t_).per_sample / masking.weight(t_))
    return torch.cat(pieces).double()


def given(tokens: Tensor) -> Tensor:
    """The x of a model that is given nothing but the noised tokens: (B, 0)."""
    return tokens[:, :0]


def generate(
    walker: Walker, levels: Sequence[float], z: Tensor, *, seed: int, keep: Filter = lambda x: x
) -> Iterator[Step]:
    """Walk from tokens z (count, N), masked where they are to be found, to tokens without masks: a step from t to s
    reveals each mask with probability (alpha(s) - alpha(t)) / (1 - alpha(t)), a step to 0 the last of them.

    levels: falling times, then 0. keep: what of the logits is kept, e.g. decoding.filtered with a temperature.
    Source: Shi et al. 2024 (MD4), algorithm 2.
    """
    model, mask_id = walker.model.eval(), walker.model.target.mask_id
    for i, (t, s) in enumerate(itertools.pairwise(levels)):
        logits = walker.read(given(z), z, t, BATCH).raw
        guesses = draw(keep(logits), seed=stream(seed, "tokens"), offset=i)
        kept = masking.alpha(torch.tensor([t, s], dtype=torch.float64))
        reveal = float((kept[1] - kept[0]) / (1 - kept[0])) if s > 0 else 1.0
        now = dbkernels.philox_uniform(tuple(z.shape), seed=stream(seed, "reveal"), offset=i, device=z.device) < reveal
        z = torch.where((z == mask_id) & now, guesses, z)
        yield Step(t, int(model.partition.block_of(t)), z)


def unigram_bits(train: Tensor, tokens: Tensor, symbols: int) -> float:
    """Bits a token by the training split's frequencies, each count one more: what a model without context reaches."""
    counts = torch.bincount(train.flatten(), minlength=symbols).double() + 1
    return float(functional.cross_entropy(counts.log().expand(tokens.numel(), -1), tokens.flatten()) / math.log(2))
