"""Host and device: send batches without waiting, and check values only where looking at them stops nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return `tensor` on `device`; from the host to a GPU through pinned memory, so that the host goes on at once."""
    if not isinstance(tensor, Tensor):
        kind = type(tensor).__name__
        raise TypeError(f"a batch must be tensors (x, y), got {kind}; fit takes batch=, a function that makes them")
    device = torch.device(device)
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")  # to the host it must wait, or hold garbage


def send_batch(x: Tensor, y: Tensor, device: torch.device, check: Callable[[Tensor], None]) -> tuple[Tensor, Tensor]:
    """Return a batch on `device`. `check` looks at y before it leaves: its values aren't read on a GPU."""
    if isinstance(y, Tensor) and y.device != device:
        check(y)
    return send(x, device), send(y, device)


def on_host(tensor: Tensor) -> bool:
    """Return whether a check may read values: on a device it would wait for all that is queued there."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_labels(name: str, labels: Tensor, end: int, closing: str = "") -> None:
    """Raise ValueError unless integers, not empty, lie in [0, end); on a device they aren't read.

    closing: what the message says of the interval instead of "[0, end)".
    """
    if not on_host(labels):
        return
    low, high = torch.stack(labels.aminmax()).tolist()
    if low < 0 or high >= end:
        raise ValueError(f"{name} must be in {closing or f'[0, {end})'}, got {low} to {high}")
