"""What can't be blocks of one model, or their noise levels: refused by name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .denoiser import StemHead
from .noise import edm
from .noise.partition import Partition
from .targets.base import Target
from .targets.devices import on_host


def check_ties(parts: dict[str, nn.Module]) -> None:
    """Raise ValueError if a trained parameter is in two parts: each would train it, and none could leave the device."""
    owners: dict[int, str] = {}
    for part, module in parts.items():
        for name, p in module.named_parameters():
            owner = owners.setdefault(id(p), f"{part}'s {name}")
            if p.requires_grad and not owner.startswith(f"{part}'s "):
                raise ValueError(
                    f"{part}'s {name} is the same parameter as {owner}: weights tied across blocks can't be trained "
                    "apart; give each block its own copy, put the layers that share it in one block, or freeze it"
                )


def check_levels(sigma: Tensor, y: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless noise levels are a batch's; on a device their values aren't read."""
    if sigma.shape != shape or not sigma.is_floating_point() or sigma.device != y.device:
        raise ValueError(
            f"sigma must be floating, of shape {shape} and on {y.device}, "
            f"got {tuple(sigma.shape)} {sigma.dtype} on {sigma.device}"
        )
    if on_host(sigma):
        edm.check_sigma(sigma)


def check_parts(
    around: list[StemHead], layers: Sequence[nn.Module], target: Target, partition: Partition, shared: str
) -> None:
    """Raise ValueError unless layers, stems and heads are as many as the partition and `shared` say."""
    if sum(partition.layers) != len(layers):
        raise ValueError(f"the partition places {sum(partition.layers)} layers, the network has {len(layers)}")
    wanted = partition.blocks if shared == "per_block" else 1
    if len(around) != wanted:
        raise ValueError(f"shared={shared!r} with {partition.blocks} blocks needs {wanted} StemHead, got {len(around)}")
    if len({id(p) for a in around for p in a.parameters()}) < sum(len(list(a.parameters())) for a in around):
        raise ValueError(f"shared={shared!r} needs a StemHead of its own for every block; two share a parameter")
    if shared != "shared" and any(p.requires_grad for p in target.parameters()):
        raise ValueError(f"shared={shared!r} needs a fixed codebook: the blocks must agree on the space of z")
