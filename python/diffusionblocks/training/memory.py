"""Bytes: what tensors hold, what a step saves for its backward pass, what a plan will take."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CATEGORIES = ("weights", "gradients", "moments", "averages", "activations")


@dataclass(frozen=True)
class Usage:
    """Bytes by category (CATEGORIES)."""

    by_category: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all categories."""
        return sum(self.by_category.values())

    def with_(self, **bytes_: int) -> Usage:
        """The same with some categories replaced."""
        return Usage(self.by_category | bytes_)


def count_bytes(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Bytes of storage that the tensors hold on `device`, a shared storage counted once."""
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t.device.type == device.type
    }
    return sum(storages.values())


class SavedTensors:
    """Counts the storage that autograd saves for backward, a storage once; weights are left out. `bytes` is the sum."""

    def __init__(self, weights: Iterable[Tensor]):
        self.bytes = 0
        self._weights = {w.untyped_storage()._cdata for w in weights}
        self._seen: dict[int, Tensor] = {}

    def _pack(self, t: Tensor) -> Tensor:
        key = t.untyped_storage()._cdata
        if key not in self._weights and key not in self._seen:
            self._seen[key] = t.detach()  # with its graph it would keep itself alive for ever
            self.bytes += t.untyped_storage().nbytes()
        return t

    @contextlib.contextmanager
    def count(self) -> Iterator[SavedTensors]:
        """Within it, what autograd saves is counted, and kept alive so that no address comes twice."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t):
            yield self
        self._seen.clear()


def allocated(device: torch.device) -> tuple[int, int]:
    """(allocated, reserved) peak bytes: the CUDA allocator's; on the host the peak resident set size, twice."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak


def reset_peak(device: torch.device) -> None:
    """Forget the peaks of `allocated`, which else are of whatever the process ran before; a host keeps its own."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def parse_bytes(text: str) -> int:
    """ "24GiB", "512MB", "1e9" -> bytes. Raises: ValueError on anything else."""
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    unit = text.strip().lower().lstrip("0123456789.e+- ")
    number = text.strip()[: len(text.strip()) - len(unit)]
    try:
        value = float(number)
    except ValueError:
        value = -1
    if unit not in units or not 0 < value < float("inf"):
        raise ValueError(f"memory must be like 24GiB, 512MB or 1000000, got {text!r}")
    return int(value * units[unit])


def readable(count: float) -> str:
    """Bytes as "1.5 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
