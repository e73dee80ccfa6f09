"""Bytes: held by tensors, saved by a step for its backward pass, as text."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CATEGORIES = ("weights", "gradients", "moments", "averages", "buffers", "activations")  # buffers: for other blocks


@dataclass(frozen=True)
class Usage:
    """Bytes by category (CATEGORIES). allocated, reserved: peaks of the allocator, where they were asked for."""

    by_category: dict[str, int]
    allocated: int = 0
    reserved: int = 0

    @property
    def total(self) -> int:
        """Sum of all categories."""
        return sum(self.by_category.values())

    def with_(self, **bytes_: int) -> Usage:
        """Return the same with some categories replaced."""
        return Usage(self.by_category | bytes_)


def count_bytes(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Return the bytes of storage that tensors hold on `device`, a shared storage counted once."""
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t.device.type == device.type
    }
    return sum(storages.values())


class SavedTensors:
    """Counts the storage that autograd saves for the backward pass, each once and without weights. `bytes`: the sum."""

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
        """Return a context within which saved tensors are counted, and kept alive so that no address comes twice."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t):
            yield self
        self._seen.clear()


def allocated(device: torch.device) -> tuple[int, int]:
    """Return peak bytes (allocated, reserved) of the CUDA allocator; on the host the peak resident set size, twice."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak


def reset_peak(device: torch.device) -> None:
    """Reset the peaks of `allocated`, which else are those of anything that ran before; the host's can't be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def parse_bytes(text: str) -> int:
    """Return "24GiB", "512MB" or "1e9" as a number of bytes. Raises: ValueError on anything else."""
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    unit = text.strip().lower().lstrip("0123456789.e+- ")
    number = text.strip()[: len(text.strip()) - len(unit)]
    try:
        value = float(number)
    except ValueError:
        value = -1
    count = value * units.get(unit, 0)
    if not 1 <= count < float("inf"):
        raise ValueError(f"memory must be like 24GiB, 512MB or 1000000, got {text!r}")
    return int(count)


def readable(count: float) -> str:
    """Return bytes as text: "1.5 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def compact(count: int) -> str:
    """Return bytes in few characters, as file listings do: "1.5G" is 1.5 GiB."""
    return readable(count).replace("iB", "").replace("B", "").replace(" ", "")
