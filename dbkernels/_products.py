"""Products of a vocabulary head with float32 sums: on a GPU the library's, on a CPU by converted blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dbkernels._dtypes import compute_dtype

CONVERTED = 4096  # rows of the head that a CPU converts at once


def mixed(weight: Tensor) -> bool:
    """Return whether the library multiplies these halves into float32."""
    return weight.device.type == "cuda" and weight.dtype.itemsize == 2


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write a @ b to `out`, of a's dtype or float32; halves on a GPU.

    Use float32 even for a half result: PyTorch lets cuBLAS add the parts of a split sum in the output's dtype.
    """
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def wide(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, in float32 for halves on a GPU."""
    return torch.mm(a, b, out_dtype=torch.float32) if mixed(a) else torch.mm(a, b)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add a @ b to `total` in the product's own pass: no second tensor of its size."""
    if a.dtype == total.dtype:
        return total.addmm_(a, b)
    return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    for at in range(0, len(weight), CONVERTED):
        rows = slice(at, at + CONVERTED)
        yield rows, weight[rows].to(dtype)


def logits_of(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute x @ weight.T, summed and returned in the sums' dtype. x: in it, or as weight on a GPU."""
    dtype = compute_dtype(weight.dtype)
    if out is None:
        out = torch.empty(len(x), len(weight), dtype=dtype, device=x.device)
    if mixed(weight):
        return product(x.to(weight.dtype), weight.T, out)
    x = x.to(dtype)
    if weight.dtype == dtype:
        return torch.mm(x, weight.T, out=out)
    for rows, block in _blocks(weight, dtype):
        torch.mm(x, block.T, out=out[:, rows])
    return out


def expected_rows(p: Tensor, weight: Tensor) -> Tensor:
    """Compute p @ weight, summed and returned in the sums' dtype."""
    dtype = compute_dtype(weight.dtype)
    if mixed(weight) or weight.dtype == p.dtype:
        return wide(p.to(weight.dtype), weight)
    total = torch.zeros(len(p), weight.shape[1], dtype=dtype, device=p.device)
    for rows, block in _blocks(weight, dtype):
        total.addmm_(p[:, rows].to(dtype), block)
    return total
