"""What is trained on from a base that was trained for all noise: the arms of forks.py.

An arm is a list of forks. A fork's leaves are trained together, for its ranges of noise by turns; the network's weights
for a range are made of them. Range 0 has the highest noise; None stands for all noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = dict[str, Tensor]
RANK = 8  # of LoRA's matrices
MIXED = 2  # bases that are mixed, each begun as the base
PRIOR = 2.0  # logit of the base that lies nearest to a range, at the start of a mixture
GUIDED = 0.5  # share of a mixture's training over which its coefficients go from the prior's to their own


@dataclass
class Fork:
    """Leaves that are trained together.

    leaves: Named tensors to train; a name's part behind "#" is that of a weight of the base, where it begins.
    ranges: Ranges of noise that its steps train by turns.
    weights: The network's weights for a range, of the leaves and the share of the training that is done.
    everywhere: Share of the draws that come from all noise.
    agreement: Factor of the distance from the base's output, a second loss.
    lr: Factor of the learning rate.
    """

    leaves: Weights
    ranges: tuple[int | None, ...]
    weights: Callable[[Weights, int | None, float], Weights]
    everywhere: float = 0.0
    agreement: float = 0.0
    lr: float = 1.0


@dataclass(frozen=True)
class Arm:
    """How the extra steps are spent.

    forks: Makes the forks of a base's weights, for so many ranges of noise; they share the steps evenly.
    finer: Ranges of noise for each block.
    early: Begin before the base's learning rate cooled down, and take the steps of its cooling, too.
    merged: The forks become one network again: the base plus a share of the sum of what each changed.
    cost: Of a step, in steps of the others.
    rates: Where the learning rate begins to fall to zero, as shares of the base's peak; the better one counts.
    """

    forks: Callable[[Weights, int], list[Fork]]
    finer: int = 1
    early: bool = False
    merged: bool = False
    cost: float = 1.0
    rates: tuple[float, ...] = (0.1, 0.3)


def copies(base: Weights) -> Weights:
    """Return the base's weights, to be trained."""
    return {f"#{name}": t.clone() for name, t in base.items()}


def whole(leaves: Weights, range_: int | None, done: float) -> Weights:
    """Return leaves that are a network's weights."""
    return {name.partition("#")[2]: t for name, t in leaves.items()}


def lone(base: Weights, ranges: int) -> list[Fork]:
    """One network for all noise."""
    return [Fork(copies(base), (None,), whole)]


def experts(
    everywhere: float = 0.0, agreement: float = 0.0, only: int | None = None
) -> Callable[[Weights, int], list[Fork]]:
    """Return what makes a network for each range, or only for one; the base stays for the others."""

    def forks(base: Weights, ranges: int) -> list[Fork]:
        chosen = range(ranges) if only is None else [only % ranges]
        return [Fork(copies(base), (r,), whole, everywhere, agreement) for r in chosen]

    return forks


def mixture(base: Weights, ranges: int) -> list[Fork]:
    """Networks whose weights are mixed for each range, with coefficients that are learnt.

    Source: Remix-DiT, NeurIPS 2024, arXiv 2412.05628: softmax coefficients, guided by a prior at first.
    """
    place = torch.arange(ranges) * MIXED // ranges
    prior = PRIOR * torch.nn.functional.one_hot(place, MIXED).float()
    leaves = {f"{k}#{name}": t.clone() for k in range(MIXED) for name, t in base.items()}

    def weights(leaves: Weights, range_: int | None, done: float) -> Weights:
        assert range_ is not None
        own = min(1.0, done / GUIDED)
        shares = (1 - own) * prior[range_].to(leaves["logits"]).softmax(0) + own * leaves["logits"][range_].softmax(0)
        return {name: sum(shares[k] * leaves[f"{k}#{name}"] for k in range(MIXED)) for name in base}

    return [Fork({**leaves, "logits": prior}, tuple(range(ranges)), weights)]


def lora(base: Weights, ranges: int) -> list[Fork]:
    """A low-rank change of the layers' matrices for each range; the base stays as it is."""
    matrices = {name: t for name, t in base.items() if ".layers." in name and t.dim() == 2}
    generator = torch.Generator().manual_seed(0)

    def begun() -> Weights:
        down = {n: torch.randn(RANK, t.shape[1], generator=generator) / math.sqrt(RANK) for n, t in matrices.items()}
        zeros = {n: torch.zeros(t.shape[0], RANK) for n, t in matrices.items()}
        named = {f"down {n}": t for n, t in down.items()} | {f"up {n}": t for n, t in zeros.items()}
        device = next(iter(base.values())).device
        return {n: t.to(device) for n, t in named.items()}

    def weights(leaves: Weights, range_: int | None, done: float) -> Weights:
        return base | {n: t + leaves[f"up {n}"] @ leaves[f"down {n}"] for n, t in matrices.items()}

    return [Fork(begun(), (r,), weights, lr=2.0) for r in range(ranges)]


def last_layers(base: Weights, ranges: int) -> list[Fork]:
    """One network but for its last layer, of which every range has its own."""
    last = max(int(name.split(".layers.")[1].split(".")[0]) for name in base if ".layers." in name)
    own = {name for name in base if f".layers.{last}." in name}
    shared = {f"#{name}": t.clone() for name, t in base.items() if name not in own}
    layers = {f"{r}#{name}": base[name].clone() for r in range(ranges) for name in own}

    def weights(leaves: Weights, range_: int | None, done: float) -> Weights:
        return {name: leaves[f"{range_}#{name}" if name in own else f"#{name}"] for name in base}

    return [Fork(shared | layers, tuple(range(ranges)), weights)]


LONE = "A0 lone"  # what the others are compared with
ARMS = {
    LONE: Arm(lone),
    "A1 ranges": Arm(experts()),
    "A2 ranges, 30 % of all noise": Arm(experts(everywhere=0.3)),
    "A3 A2 + agreement with the base": Arm(experts(everywhere=0.3, agreement=0.1), cost=4 / 3),
    "A4 mixture of two": Arm(mixture, finer=2),
    "A5 LoRA a range": Arm(lora),
    "A6 the lowest noise alone": Arm(experts(only=-1)),
    "A7 A2, merged": Arm(experts(everywhere=0.3), merged=True),
    "A8 last layer a range": Arm(last_layers),
    "A9 ranges while the rate cools": Arm(experts(everywhere=0.3), early=True, rates=(0.5, 1.0)),
    "A10 lone while the rate cools": Arm(lone, early=True, rates=(0.5, 1.0)),
}
