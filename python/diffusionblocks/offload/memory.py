"""Bytes: held by tensors, saved by a step for its backward pass, as text."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

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
    """Counts the storage that autograd saves for the backward pass, each once and without weights.

    Of checkpointed calls, what all of them keep and the most that one recomputes: one is recomputed at a time.
    """

    def __init__(self, weights: Iterable[Tensor]):
        self._weights = {w.untyped_storage()._cdata for w in weights}
        self._seen: dict[int, Tensor] = {}
        self._kept = self._recomputed = 0

    @property
    def bytes(self) -> int:
        """Bytes counted."""
        return self._kept + self._recomputed

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that are kept for the backward pass, but not by autograd."""
        self._kept += sum(t.nbytes for t in tensors)

    def _first(self, t: Tensor, seen: dict[int, Tensor]) -> int:
        """Return the bytes of a storage that wasn't counted yet, and keep it alive: no address may come twice."""
        key = t.untyped_storage()._cdata
        if key in self._weights or key in self._seen or key in seen:
            return 0
        seen[key] = t.detach()  # with its graph it would keep itself alive for ever
        return t.untyped_storage().nbytes()

    def _pack(self, t: Tensor) -> Tensor:
        self._kept += self._first(t, self._seen)
        return t

    @contextlib.contextmanager
    def count(self) -> Iterator[SavedTensors]:
        """Return a context within which saved tensors are counted."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t):
            yield self
        self._seen.clear()

    @contextlib.contextmanager
    def recomputed(self) -> Iterator[None]:
        """Return a context for the forward pass of a checkpointed call: all that it drops and will recompute."""
        pack, unpack = torch._C._autograd._top_saved_tensors_default_hooks(False)  # checkpoint's: they drop the tensor
        seen: dict[int, Tensor] = {}
        count = 0

        def counted(t: Tensor) -> Any:
            nonlocal count
            count += self._first(t, seen)
            return pack(t)

        with torch.autograd.graph.saved_tensors_hooks(counted, unpack):
            yield
        seen.clear()  # autograd keeps the hooks
        self._recomputed = max(self._recomputed, count)


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
