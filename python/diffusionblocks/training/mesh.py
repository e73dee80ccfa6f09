"""Ranks as groups x data: each group trains its share of the blocks, and nothing passes between groups.

A group's ranks are a process group of their own, the only one that any of them belongs to: a rank that dies ends its
group, and no other.
"""

from __future__ import annotations

import atexit
import functools
import os
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..offload.offloader import Offloader
from .optimizer import gradients_of

GROUP = "group_"  # begins the names of the folders that groups save to
TIMEOUT = timedelta(minutes=30)  # for ranks of a group that are late, e.g. because the first one writes a checkpoint
ANSWER = 10.0  # seconds in which ranks that live say so


class RankLost(RuntimeError):
    """A rank of this process's group died or stopped."""


@dataclass(frozen=True)
class Mesh:
    """This process's place among the ranks that torchrun started.

    Attributes:
        group: Number of its group, of `groups`.
        rank: Its number within the group, of `ranks`. Rank 0 writes checkpoints.
    """

    groups: int = 1
    ranks: int = 1
    group: int = 0
    rank: int = 0
    store: Any = field(default=None, repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one of its group that writes."""
        return self.rank == 0

    @property
    def number(self) -> int:
        """Number of this process among all."""
        return self.group * self.ranks + self.rank

    @property
    def draws(self) -> tuple[int, ...]:
        """What dropout's draws are addressed by besides the step: other rows, other draws."""
        return (self.rank,) if self.rank else ()

    def own_folder(self, folder: Path | None) -> Path | None:
        """Return this process's part of a folder that others use, too."""
        return folder if folder is None or self.groups * self.ranks == 1 else Path(folder) / f"rank_{self.number}"

    def group_folder(self, folder: Path) -> Path:
        """Return where a group's blocks are saved."""
        return folder if self.groups == 1 else folder / f"{GROUP}{self.group}"

    def rows(self, count: int) -> slice:
        """Return this rank's rows of a batch. Raises: ValueError if the ranks can't share it evenly."""
        if count % self.ranks:
            raise ValueError(f"a batch of {count} can't be shared by {self.ranks} ranks: make it a multiple of them")
        share = count // self.ranks
        return slice(self.rank * share, (self.rank + 1) * share)

    def sum(self, params: Sequence[Tensor]) -> None:
        """Replace parameters' gradients by their sums over the group's ranks; one that no rank reached gets none.

        A rank that didn't reach a parameter (an expert of other rows) adds zeros: all ranks sum the same tensors.
        Raises: RankLost, naming who didn't answer.
        """
        if self.ranks == 1:
            return
        missing = [i for i, p in enumerate(params) if p.grad is None]
        for i in missing:
            params[i].grad = torch.zeros_like(params[i])
        reached = torch.ones(len(params), dtype=torch.int32, device=params[0].device)
        if missing:
            reached[missing] = 0
        try:
            gradients = gradients_of(params)
            for work in [dist.all_reduce(t, async_op=True) for t in (reached, *gradients)]:
                work.wait()
        except RuntimeError as error:
            raise RankLost(f"{self._lost()}; other groups go on ({_first_line(error)})") from error
        if missing:  # else every parameter was reached, and nothing need be read from the device
            for i in (i for i in missing if not reached[i]):
                params[i].grad = None

    def check_weights(self, offloader: Offloader, parts: Iterable[str]) -> None:
        """Raise ValueError unless all ranks of the group begin with the same weights of these parts."""
        if self.ranks > 1:
            tensors = {part: offloader.part_weights(part).values() for part in sorted(parts)}
            if found := self._different(tensors, offloader.device):
                raise ValueError(
                    f"the ranks of a group begin with different weights of {', '.join(found)}: seed before the model "
                    "is built, the same on every rank"
                )

    def check_buffers(self, modules: Mapping[str, nn.Module], device: torch.device) -> None:
        """Raise ValueError if layers updated buffers by what their rank's rows are: no rank has those of all rows."""
        if self.ranks > 1:
            named = {f"{part}'s {n}": [t] for part, m in sorted(modules.items()) for n, t in m.named_buffers()}
            if found := self._different(named, device):
                raise ValueError(
                    f"a step left different values in {', '.join(found[:3])} on the ranks of a group, each by its own "
                    "rows: use layers that keep no statistics of a batch, or one data rank, mesh=(groups, 1)"
                )

    def _different(self, tensors: Mapping[str, Iterable[Tensor]], device: torch.device) -> list[str]:
        """Return the names of what isn't equal on all ranks of the group."""
        own = torch.tensor([_checksum(given) for given in tensors.values()], dtype=torch.int64, device=device)
        found = [torch.empty_like(own) for _ in range(self.ranks)]
        dist.all_gather(found, own)
        same = (torch.stack(found) == own).all(0).tolist()
        return [name for name, equal in zip(tensors, same, strict=True) if not equal]

    def _lost(self) -> str:
        """Return which ranks don't answer."""
        first = self.group * self.ranks
        others = {first + rank for rank in range(self.ranks)} - {self.number}
        lost = others
        try:
            self.store.set(f"lives/{self.number}", "")
            until = time.monotonic() + ANSWER
            while lost and time.monotonic() < until:
                lost = {rank for rank in lost if not self.store.check([f"lives/{rank}"])}
                time.sleep(0.05)
        except RuntimeError:  # the process that held the store died, too
            pass
        named = ", ".join(map(str, sorted(lost or others)))
        return f"rank {named} of group {self.group} (ranks {first} to {first + self.ranks - 1}) died or stopped"


def open_mesh(shape: tuple[int, int] | None, device: torch.device) -> tuple[Mesh, torch.device]:
    """Join the ranks that torchrun started, and return this one's place and device: consecutive ranks form a group.

    Args:
        shape: Groups, and ranks of a group; None for a process by itself.
        device: Where to train; of GPUs each rank takes its own.

    Raises: ValueError if there aren't as many ranks or GPUs, or torch.distributed is in use already.
    """
    if shape is None:
        return Mesh(), device
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} of this machine has no GPU: start at most {torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    return _join(*shape, device.type), device


@functools.lru_cache(maxsize=1)  # all trainers of a process use one mesh
def _join(groups: int, ranks: int, device_type: str) -> Mesh:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != groups * ranks:
        raise ValueError(
            f"mesh={(groups, ranks)} needs {groups * ranks} processes, and there are {world}: start them by "
            f"torchrun --nproc-per-node {groups * ranks}, or choose another mesh"
        )
    if dist.is_initialized():
        raise ValueError("mesh: torch.distributed is initialized already; leave that to the Trainer, or set mesh=None")
    number = int(os.environ.get("RANK", "0"))
    group, rank = divmod(number, ranks)
    if ranks == 1:  # nobody to talk to
        return Mesh(groups, ranks, group, rank)
    store, _, _ = next(dist.rendezvous("env://", number, world, timeout=TIMEOUT))
    own = dist.PrefixStore(f"group_{group}", store)
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, store=own, rank=rank, world_size=ranks, timeout=TIMEOUT)
    atexit.register(_close)
    return Mesh(groups, ranks, group, rank, own)


def share(blocks: Sequence[int], groups: int, group: int) -> list[int]:
    """Return a group's blocks. Raises: ValueError if there are more groups than blocks."""
    if groups > len(blocks):
        raise ValueError(f"mesh: {groups} groups have {len(blocks)} blocks to train; choose at most a group per block")
    return sorted(blocks)[group::groups]


def _checksum(tensors: Iterable[Tensor]) -> int:
    flat = (t.detach().to("cpu", memory_format=torch.contiguous_format).reshape(-1) for t in tensors)
    return sum(zlib.crc32(t.view(torch.uint8).numpy()) for t in flat)


def _close() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
