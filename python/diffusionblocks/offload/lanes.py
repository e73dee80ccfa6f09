"""Copies beside the device's work: their streams, and events between them."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch

from ..checkpoint.layout import Layout

CHUNK = 1 << 25  # bytes per copy, read or write: large enough for full bandwidth


class Lanes(NamedTuple):
    """The streams of copies from the device (`out`) and to it (`into`); None on the host, where copies are at once."""

    out: torch.cuda.Stream | None
    into: torch.cuda.Stream | None

    @classmethod
    def of(cls, device: torch.device) -> Lanes:
        """Return lanes for a device."""
        return cls(torch.cuda.Stream(device), torch.cuda.Stream(device)) if device.type == "cuda" else cls(None, None)


class Place(NamedTuple):
    """A part by its name, and the layout in which it lies in a slot and in the store."""

    name: str
    layout: Layout


Event: TypeAlias = "torch.cuda.Event | None"


def mark(stream: torch.cuda.Stream | None) -> Event:
    """Return an event at the present end of a stream."""
    return stream.record_event() if stream else None


def after(stream: torch.cuda.Stream | None, event: Event) -> None:
    """Let a stream wait for an event; the host doesn't."""
    if stream and event:
        stream.wait_event(event)
