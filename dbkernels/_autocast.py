"""Autocast for ops that PyTorch doesn't know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def autocast(tensor: Any) -> Any:
    """In autocast's dtype where it is on and the tensor isn't float64, as PyTorch's products take their arguments."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    device = tensor.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return tensor.to(torch.get_autocast_dtype(device)) if on else tensor
