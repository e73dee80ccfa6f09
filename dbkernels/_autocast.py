"""Autocast for the ops of this package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def autocast(tensor: Any) -> Any:
    """Cast a tensor, other than float64, to autocast's dtype if autocast is on, as PyTorch's products do."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    device = tensor.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return tensor.to(torch.get_autocast_dtype(device)) if on else tensor
