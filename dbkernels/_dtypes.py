"""Which dtypes ops take, compute in and keep gradients in."""

from __future__ import annotations

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the arithmetic's dtype: float64 if any input is float64, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of stored gradients: float32 for float16, whose mean gradients underflow before loss scaling."""
    return torch.float32 if dtype == torch.float16 else dtype
