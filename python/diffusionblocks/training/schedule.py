"""Whose turn it is, and the learning rate: functions of the step alone, so that a resumed run needs no more."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..blocks import DiffusionBlocks
from ..noise.density import Tabulated
from ..noise.rng import stream
from .config import TrainerConfig
from .mesh import Mesh, share


def turn(visit: int, blocks: int, *, seed: int) -> int:
    """Return the block of a visit: every block once per round of visits, in an order drawn for the round."""
    return _order(visit // blocks, blocks, seed)[visit % blocks]


@functools.lru_cache(maxsize=4)
def _order(round_: int, blocks: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(stream(seed, "round", round_))
    order: list[int] = torch.randperm(blocks, generator=generator).tolist()
    return order


def adaptive_density(model: DiffusionBlocks, config: TrainerConfig) -> Tabulated | None:
    """Return the density that training adapts to what it measures; None if it adapts none."""
    density = model.partition.density
    return density if config.adapt and isinstance(density, Tabulated) else None


def own_blocks(model: DiffusionBlocks, config: TrainerConfig, mesh: Mesh) -> frozenset[int]:
    """Return the blocks that a trainer trains: all or those of `train_blocks`, and of these its group's; the model is
    told which it doesn't.

    Raises: ValueError if what is done elsewhere would have a say in them.
    """
    every = range(len(model.blocks))
    given = every if config.train_blocks is None else config.train_blocks
    if unknown := sorted(set(given) - set(every)):
        raise ValueError(f"train_blocks: there is no block {unknown[0]!r}; this model has 0 to {len(every) - 1}")
    own = share(given, mesh.groups, mesh.group)
    what = "train_blocks" if config.train_blocks is not None else "mesh"
    if (len(own) < len(every) or mesh.ranks > 1) and adaptive_density(model, config):
        raise ValueError(
            f"{what} with a partition that adapts to all that is measured: set adapt=False (--no-adapt), which keeps "
            "it, or build the model with a density measured before, and adapt=False"
        )
    if mesh.ranks > 1:
        _check_statistics(model)
    if len(own) < len(every):
        _check_apart(model, config, what)
    _check_trained(model, own)
    model.begun |= set(own)
    return frozenset(own)


def warn_untrained(own: Iterable[int], blocks: int, config: TrainerConfig, steps: int | None) -> None:
    """Warn if training of so many steps, where that is known, ends before each of a trainer's blocks had its turn."""
    if not steps:
        return
    visits = math.ceil(steps / config.visit)
    left = set(own) - {turn(visit, blocks, seed=config.seed) for visit in range(min(visits, blocks))}
    if left and not config.branch:  # else all begin as copies of a trained one
        what = f"set visit={steps // blocks} or less" if steps >= blocks else "train more steps"
        warnings.warn(
            f"{steps} steps in visits of {config.visit} leave {len(left)} of {blocks} blocks untrained "
            f"({', '.join(map(str, sorted(left)))}): {what}",
            stacklevel=3,
        )


def _check_trained(model: DiffusionBlocks, own: Iterable[int]) -> None:
    trained = {name for name, part in model.parts().items() if any(p.requires_grad for p in part.parameters())}
    idle = [b for b in sorted(own) if not trained & {"shared", f"block_{b}"}]
    if idle:
        others = tuple(b for b in sorted(own) if b not in idle)
        rather = f": unfreeze some, or leave it out, train_blocks={others}, adapt=False" if others else ""
        raise ValueError(f"block {idle[0]} has nothing to train: none of its parameters requires a gradient{rather}")


def _check_apart(model: DiffusionBlocks, config: TrainerConfig, what: str) -> None:
    if config.branch:
        raise ValueError(f"{what} with branch: all blocks begin as copies of one trunk, so set branch=0")
    if model.shared == "shared" and any(p.requires_grad for p in model.parts()["shared"].parameters()):
        raise ValueError(
            f"{what} needs blocks that share nothing they train: build the model with shared='per_block' or "
            "shared='frozen', or train all blocks in one group"
        )


def _check_statistics(model: DiffusionBlocks) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
            raise ValueError(
                f"mesh: {name} is a {type(module).__name__}, and each rank of a group would have the statistics of its "
                "own rows: use GroupNorm or LayerNorm, or one data rank, mesh=(groups, 1)"
            )


def learning_rate(step: int, *, steps: int | None, peak: float, warmup: int) -> float:
    """Return the rate of a step: linear warm-up to `peak`, then a cosine to zero from `steps` on; None: constant."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if steps is None:
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * min(1, (step - warmup) / max(1, steps - warmup))))
