"""Checks shared by the ops with a vocabulary head."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dbkernels._direct import direct
from dbkernels._dtypes import compute_dtype
from dbkernels._levels import check_floating, readable

REDUCTIONS = ("mean", "sum", "none")


def check_rows(
    h: Any, weight: Any, target: Any, z: Any, bias: Any, logit_scale: Any, posterior: Any, softcap: float | None
) -> int:  # fmt: skip
    """Check the arguments and return the number of rows. Raises: TypeError, ValueError naming the argument."""
    check_head(h, weight, bias, logit_scale)
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        raise TypeError(f"target must be an int64 tensor, got {getattr(target, 'dtype', type(target).__name__)}")
    if target.shape != h.shape[:-1] or target.device != h.device:
        raise ValueError(f"target has shape {tuple(target.shape)} on {target.device}, not h's {tuple(h.shape[:-1])}")
    if z is not None:
        _check_alike("z", z, h, h.shape)
    if posterior is not None:
        check_posterior(posterior, h, weight)
    check_softcap(softcap)
    return math.prod(h.shape[:-1])


def all_words(target: Tensor, width: int, ignore_index: int) -> bool:
    """Return whether all targets are known to be words. Raises: ValueError if one is neither a word nor ignored."""
    if not readable(target):
        return False
    low, high = torch.stack(target.aminmax()).tolist()
    if low >= 0 and high < width:
        return not low <= ignore_index <= high
    wrong = (target != ignore_index) & ((target < 0) | (target >= width))
    if wrong.any():
        raise ValueError(f"target {int(target[wrong][0])} is outside [0, {width}) and isn't ignore_index")
    return False


def mark_targets(
    target: Tensor, width: int, ignore_index: int, row_weight: Tensor | None, mean: bool, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the targets as the rows' kernels take them, -1 where ignored and -2 where not a word, and the factors of
    the rows' losses: row_weight, 0 where ignored, divided by the count of rows for a mean. All (R,)."""
    dtype = compute_dtype(like.dtype)
    if all_words(target, width, ignore_index):
        count = len(target) if mean else 1
        return target, (torch.full(target.shape, 1 / count, dtype=dtype) if row_weight is None else row_weight / count)
    if len(target) and direct(target, row_weight):
        from dbkernels.triton.cross_entropy_rows import mark

        return mark(target.contiguous(), width, ignore_index, row_weight, mean, dtype)
    counts = target != ignore_index
    marked = torch.where(counts, torch.where((target >= 0) & (target < width), target, -2), -1)
    factor = counts.to(dtype) if row_weight is None else torch.where(counts, row_weight, 0)
    return marked, factor / counts.sum() if mean else factor


def check_head(h: Any, weight: Any, bias: Any, logit_scale: Any) -> None:
    """Raise unless h (..., d), weight (V, d), bias (V,) or None, logit_scale () or None fit each other."""
    check_floating("h", h)
    check_floating("weight", weight)
    if h.dim() == 0 or weight.dim() != 2 or weight.shape[1] != h.shape[-1] or 0 in weight.shape:
        raise ValueError(f"weight must be (V, d) with h's d, got {tuple(weight.shape)} for h {tuple(h.shape)}")
    _check_alike("weight", weight, h, weight.shape)
    for name, tensor, shape in (("bias", bias, weight.shape[:1]), ("logit_scale", logit_scale, torch.Size())):
        if tensor is None:
            continue
        check_floating(name, tensor)
        if tensor.shape != shape or tensor.device != h.device:
            raise ValueError(f"{name} must have shape {tuple(shape)} on {h.device}, got {tuple(tensor.shape)}")


def _check_alike(name: str, tensor: Any, h: Tensor, shape: torch.Size) -> None:
    check_floating(name, tensor)
    if tensor.shape != shape or tensor.dtype != h.dtype or tensor.device != h.device:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, and h {tuple(h.shape)} {h.dtype} on "
            f"{h.device}: they must fit"
        )


def check_softcap(softcap: float | None) -> None:
    """Raise unless softcap is positive and finite, or None."""
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap={softcap} must be positive and finite, or None")


def check_posterior(posterior: Any, h: Tensor, weight: Tensor) -> None:
    """Raise unless posterior is (z, table, sigma) with one table row per word, not to be trained."""
    if not isinstance(posterior, tuple) or len(posterior) != 3:
        raise ValueError("posterior must be (z, table, sigma)")
    z, table, _ = posterior
    check_floating("posterior's z", z)
    check_floating("posterior's table", table)
    if z.shape[:-1] != h.shape[:-1] or table.shape != (len(weight), z.shape[-1]):
        raise ValueError(f"posterior's z {tuple(z.shape)} and table {tuple(table.shape)} must be (..., e) and (V, e)")
    if table.requires_grad:
        raise ValueError("posterior's table requires a gradient, but only its z gets one: detach it, or tie the head")


def coefficient(name: str, value: Any, shape: torch.Size, h: Tensor) -> Tensor:
    """Return `value` as one number per row, (R,), in the sums' dtype."""
    dtype = compute_dtype(h.dtype)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.full((math.prod(shape),), float(value), dtype=dtype, device=h.device)
    check_floating(name, value)
    if value.shape not in (shape, torch.Size()) or value.device != h.device:
        raise ValueError(f"{name} must be a float or have shape {tuple(shape)} on {h.device}, got {tuple(value.shape)}")
    if value.requires_grad:
        raise ValueError(f"{name} requires a gradient, but gets none: detach it")
    return value.to(dtype).expand(shape).reshape(-1)
