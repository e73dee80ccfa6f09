"""How fast blocks move here."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from ..checkpoint.layout import Layout
from .buffers import device_buffer
from .disk_store import DiskStore
from .host_store import HostStore
from .lanes import Lanes, Place

SIZE = 1 << 26


def measured_bandwidth(device: torch.device, offload: str, folder: Path | None, *, pin: bool) -> dict[str, float]:
    """Return bytes per second of an exchange, both directions counted once, by where blocks wait.

    Nothing where the device isn't here, or for the disk without a folder.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        return {}
    lanes = Lanes.of(device)
    if offload == "cpu":
        return {"cpu": _measure(HostStore(lanes, pin=pin and device.type == "cuda"), device)}
    if folder is None:
        return {}
    return {"disk": _measure(DiskStore(Path(folder) / "bandwidth", lanes, pin=pin and device.type == "cuda"), device)}


def _measure(store: HostStore | DiskStore, device: torch.device) -> float:
    tensors = {"t": torch.zeros(SIZE, dtype=torch.uint8)}
    places = [Place(name, Layout.of(tensors)) for name in ("one", "two")]
    for place in places:
        store.put(place, tensors)
    slot = device_buffer(SIZE, device)
    seconds = []
    for leaving, arriving in (places, places[::-1], places):
        start = time.perf_counter()
        store.exchange(slot, leaving, arriving, None, lambda: None)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    store.close([place.name for place in places])
    return SIZE / min(seconds)
