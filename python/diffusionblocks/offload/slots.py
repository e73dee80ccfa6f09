"""A few fixed buffers on the device, in which parts come and go."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoint.layout import Layout
from ..checkpoint.parts import Inspected, Stored
from .buffers import device_buffer
from .disk_store import DiskStore
from .host_store import HostStore
from .lanes import Event, Lanes, Place, after, mark


class Move(NamedTuple):
    """An exchange under way: what leaves, whether it is safe by now, and when the arriving part is there."""

    leaving: Place | None
    left: threading.Event
    done: Future[Event]


class Slot:
    """A buffer on the device, the part in it (or coming into it), and whether that differs from the store's."""

    def __init__(self, device: torch.device):
        self.buffer = device_buffer(0, device)
        self.holds: str | None = None
        self.changed = False
        self.move: Move | None = None
        self._views: dict[Layout, dict[str, Tensor]] = {}

    def views(self, layout: Layout) -> dict[str, Tensor]:
        """Return tensors of a layout in the buffer; the same objects each time."""
        if layout not in self._views:
            self._views[layout] = layout.views(self.buffer)
        return self._views[layout]

    def grow(self, nbytes: int) -> None:
        """Make the buffer larger if it is too small; it must hold nothing."""
        if self.buffer.numel() < nbytes:
            device = self.buffer.device
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # copies on other streams may still read it
            self._views.clear()
            self.buffer = device_buffer(0, device)  # first frees the old one
            self.buffer = device_buffer(nbytes, device)


class Slots:
    """Moves parts between a store and a fixed number of slots. Nothing here knows what a part is.

    With two slots one part can come (`prefetch`), and what was there before leave, while another one is worked on.

    Args:
        count: Number of slots.
        device: Where they are.
        store: Where the other parts wait.
    """

    def __init__(self, count: int, device: torch.device, store: HostStore | DiskStore):
        self.device, self.store = device, store
        self.layouts: dict[str, Layout] = {}
        self._slots = [Slot(device) for _ in range(count)]  # the one brought last comes last
        self._worker = ThreadPoolExecutor(1, "diffusionblocks-slots")
        self._process = os.getpid()

    @classmethod
    def of(cls, count: int, device: torch.device, folder: Path | None, pin: bool) -> Slots:
        """Return slots whose parts wait in files under `folder`, or without one in host memory."""
        lanes, pin = Lanes.of(device), pin and device.type == "cuda"
        return cls(count, device, HostStore(lanes, pin=pin) if folder is None else DiskStore(folder, lanes, pin=pin))

    @property
    def buffers(self) -> list[Tensor]:
        """All memory on the device: the slots, and the store's if that is there, too."""
        return [slot.buffer for slot in self._slots] + [b for b in self.store.buffers if b.device == self.device]

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Replace a part's content by tensors, wherever they are, or make a new part. Raises: OSError."""
        self._quiet()
        layout, slot = Layout.of(tensors), self._slot_of(name)
        layout = next((known for known in self.layouts.values() if known == layout), layout)  # one object for all alike
        self.store.put(Place(name, layout), tensors)
        self.layouts[name] = layout
        if slot:
            slot.holds, slot.changed = None, False

    def bring(self, name: str) -> dict[str, Tensor]:
        """Return a part's tensors in a slot, after moving it there if it isn't; what was there before leaves.

        Raises: OSError if the disk refused; what was there is then still there, or in the store.
        """
        slot = self._slot_of(name)
        if slot is None:
            slot = self._exchange(name)
        self._settle(slot)
        self._slots.append(self._slots.pop(self._slots.index(slot)))
        return slot.views(self.layouts[name])

    def prefetch(self, name: str) -> None:
        """Begin to bring a part into the slot that wasn't brought last; with one slot there is none."""
        if len(self._slots) > 1 and self._slot_of(name) is None:
            self._exchange(name)

    def holds(self, name: str) -> bool:
        """Return whether a part is in a slot, or coming."""
        return self._slot_of(name) is not None

    def touch(self, name: str) -> None:
        """Note that a part in a slot has changed."""
        slot = self._slot_of(name)
        assert slot is not None
        slot.changed = True

    def retire(self, name: str) -> None:
        """Send a part from its slot to the store. Raises: OSError; it is then still there."""
        slot = self._slot_of(name)
        if slot is not None:
            self._settle(slot)
            if slot.changed:
                self._start(slot, None)
                self._settle(slot)
            slot.holds = None

    def get(self, name: str) -> dict[str, Tensor]:
        """Return a part's tensors where they are: in a slot, as views of the store's memory, or read from its file."""
        slot = self._slot_of(name)
        if slot is not None:
            self._settle(slot)
            return slot.views(self.layouts[name])
        self._quiet()
        return self.store.get(Place(name, self.layouts[name]))

    def source(self, name: str) -> dict[str, Tensor] | Stored:
        """Return what a checkpoint of a part is written from: its tensors, or its file."""
        slot = self._slot_of(name)
        if slot is not None and slot.changed:
            return self.get(name)
        self._quiet()
        return self.store.source(Place(name, self.layouts[name]))

    def adopt(self, name: str, saved: Inspected) -> bool:
        """Let the store take a part's content from a checkpoint's file, if it can; return whether it did."""
        layout = self.layouts[name]
        self._quiet()
        if saved.head != layout.header or saved.layout.tied != layout.tied or not self.store.adopt(name, saved.path):
            return False
        if slot := self._slot_of(name):
            slot.holds, slot.changed = None, False
        return True

    def close(self) -> None:
        """Give up slots and store."""
        self._quiet()
        self._worker.shutdown()
        self._slots.clear()
        self.store.close(self.layouts)

    def _slot_of(self, name: str) -> Slot | None:
        return next((slot for slot in self._slots if slot.holds == name), None)

    def _quiet(self) -> None:
        for slot in self._slots:
            self._settle(slot)

    def _exchange(self, name: str) -> Slot:
        """Begin to bring a part into the slot that was brought first."""
        slot, needed = self._slots[0], self.layouts[name].nbytes
        self._settle(slot)
        if slot.buffer.numel() < needed:
            if slot.holds:
                self.retire(slot.holds)
            slot.grow(max(layout.nbytes for layout in self.layouts.values()))
        self._start(slot, name)
        return slot

    def _start(self, slot: Slot, name: str | None) -> None:
        ready = mark(torch.cuda.current_stream(self.device)) if self.device.type == "cuda" else None
        leaving = Place(slot.holds, self.layouts[slot.holds]) if slot.holds and slot.changed else None
        arriving = Place(name, self.layouts[name]) if name else None
        left = threading.Event()
        done = self._worker.submit(self.store.exchange, slot.buffer, leaving, arriving, ready, left.set)
        slot.holds, slot.changed, slot.move = name, False, Move(leaving, left, done)

    def _settle(self, slot: Slot) -> None:
        """Finish a slot's move, if one is under way; on a GPU the present stream waits for it, not the host.

        Raises: what the move raised; the slot then holds what it held before, or nothing if that left.
        """
        if os.getpid() != self._process:  # the thread that moves isn't here, and files are the other one's
            raise RuntimeError("this process is a fork of the one whose blocks these are: make the Trainer in it")
        move, slot.move = slot.move, None
        if move is None:
            return
        try:
            arrived = move.done.result()
        except BaseException:
            slot.holds, slot.changed = None, False
            if move.leaving and not move.left.is_set():
                slot.holds, slot.changed = move.leaving.name, True
            raise
        if self.device.type == "cuda":
            after(torch.cuda.current_stream(self.device), arrived)
