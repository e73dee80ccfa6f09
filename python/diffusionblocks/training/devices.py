"""The device to train on."""

from __future__ import annotations

import torch


def pick_device(name: str | torch.device) -> torch.device:
    """Return a device by name; "auto" is the GPU if there is one.

    Raises: ValueError if it isn't there, or can't train.
    """
    device = known_device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r} but this PyTorch sees no GPU; use device='cpu' or 'auto'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name!r} but there are {torch.cuda.device_count()} GPUs; count from cuda:0")
    return device


def known_device(name: str | torch.device) -> torch.device:
    """Return what `pick_device` does, whether or not it is there.

    Raises: ValueError if it can't train.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={name!r} is none that PyTorch knows; use 'cpu', 'cuda' or 'auto'") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={name!r} can't train here; use 'cpu', 'cuda' or 'auto'")
    return device
