"""Waiting blocks in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.layout import Layout
from .buffers import host_buffer
from .lanes import CHUNK, Event, Lanes, Place, after, mark


class HostStore:
    """Parts in host memory, a flat buffer each. pin: page-lock them, for a GPU."""

    def __init__(self, lanes: Lanes, *, pin: bool):
        self.lanes, self.pin = lanes, pin
        self._kept: dict[str, tuple[Layout, Tensor]] = {}

    def put(self, place: Place, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors as a part's content, wherever they are."""
        self._wait()
        place.layout.fill(self._buffer(place), tensors)

    def get(self, place: Place) -> dict[str, Tensor]:
        """Return a part's tensors: views of its buffer."""
        self._wait()
        return place.layout.views(self._kept[place.name][1])

    def source(self, place: Place) -> dict[str, Tensor]:
        """Return what a checkpoint is written from."""
        return self.get(place)

    def adopt(self, name: str, path: Path) -> bool:
        """Return False: a file must be read."""
        return False

    def exchange(
        self, slot: Tensor, leaving: Place | None, arriving: Place | None, ready: Event, left: Callable[[], None]
    ) -> Event:
        """Copy a part out of a slot and another one in, piece by piece: both directions of the bus work at once.

        Args:
            slot: Its bytes on the device.
            leaving: The part in it, if that has changed.
            arriving: The part to bring.
            ready: When the device is done with the slot.
            left: Called once the leaving part is safe.

        Returns:
            When the arriving part is there.
        """
        out, into = self.lanes
        after(out, ready)
        after(into, ready)
        home = self._buffer(leaving) if leaving else slot[:0]
        away = self._kept[arriving.name][1] if arriving else slot[:0]
        for start in range(0, max(home.numel(), away.numel()), CHUNK):
            piece = slice(start, start + CHUNK)
            if start < home.numel():
                with torch.cuda.stream(out):
                    home[piece].copy_(slot[: home.numel()][piece], non_blocking=True)
            if start < away.numel():
                after(into, mark(out))
                with torch.cuda.stream(into):
                    slot[: away.numel()][piece].copy_(away[piece], non_blocking=True)
        left()
        return mark(into)

    @property
    def buffers(self) -> list[Tensor]:
        """All buffers."""
        return [buffer for _, buffer in self._kept.values()]

    def close(self, names: Iterable[str]) -> None:
        """Give up all buffers."""
        self._kept.clear()

    def _wait(self) -> None:
        for lane in self.lanes:
            if lane is not None:
                lane.synchronize()

    def _buffer(self, place: Place) -> Tensor:
        layout, buffer = self._kept.get(place.name, (None, None))
        if buffer is None or buffer.numel() != place.layout.nbytes:
            self._kept.pop(place.name, None)
            buffer = host_buffer(place.layout.nbytes, pin=self.pin)
        if layout != place.layout:
            self._kept[place.name] = place.layout, buffer
        return buffer
