"""A vocabulary head on a denoised state: its parts, D and the operand of its product, its logits."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from dbkernels import _products as products
from dbkernels._dtypes import compute_dtype

Maybe: TypeAlias = Tensor | None

SMALLEST = 1e-12  # least norm that normalize divides by, as torch.nn.functional.normalize's


class Head(NamedTuple):
    """The inputs of the rows' logits. h, z: (R, d); weight: (V, d); c_skip, c_out, precision (1/sigma²): (R,) in the
    sums' dtype; bias: (V,); logit_scale: (); posterior_z: (R, e), table: (V, e)."""

    h: Tensor
    weight: Tensor
    z: Maybe
    c_skip: Maybe
    c_out: Maybe
    bias: Maybe
    logit_scale: Maybe
    posterior_z: Maybe
    table: Maybe
    precision: Maybe
    normalize: bool
    softcap: float | None


def part(tensor: Tensor, rows: slice) -> Tensor:
    """Return a slice of rows, without a view if it has all of them."""
    return tensor if rows.start == 0 and rows.stop == len(tensor) else tensor[rows]


def times(tensor: Tensor, *factors: Tensor | None) -> Tensor:
    """Multiply by the factors that aren't None."""
    for factor in factors:
        tensor = tensor if factor is None else tensor * factor
    return tensor


def is_plain(head: Head) -> bool:
    """Return whether the head's operand is h itself."""
    return head.z is None and head.c_out is None and head.logit_scale is None and not head.normalize


def is_sized(head: Head) -> bool:
    """Return whether the operand could overflow: float16 on a GPU, unless it is h itself."""
    return head.weight.dtype == torch.float16 and products.mixed(head.weight) and not is_plain(head)


class Operand(NamedTuple):
    """The operand of the head's product: D times the logit scale, in the product's dtype; in float16 each row is
    divided by `size` (R, 1), so that it can't overflow."""

    x: Tensor
    size: Tensor | None


class State:
    """D of some rows (x), the factors that it was computed with, and the operand of their logits."""

    def __init__(self, head: Head, rows: slice):
        self.norm: Tensor | None = None
        self.c_out: Tensor | None = None
        self.c_skip: Tensor | None = None
        self.scale: Tensor | None = None
        self.x = part(head.h, rows)
        self.operand = Operand(self.x, None)
        if not is_plain(head):
            self._make(head, rows)

    def _make(self, head: Head, rows: slice) -> None:
        dtype = compute_dtype(head.h.dtype)
        x = self.x.to(dtype)
        if head.c_out is not None:
            self.c_out = part(head.c_out, rows).unsqueeze(1)
            x = x * self.c_out
        if head.z is not None and head.c_skip is not None:
            self.c_skip = part(head.c_skip, rows).unsqueeze(1)
            x = torch.addcmul(x, part(head.z, rows).to(dtype), self.c_skip)
        if head.normalize:
            self.norm = x.norm(dim=1, keepdim=True)
            x = x / self.norm.clamp(min=SMALLEST)
        self.x = x
        if head.logit_scale is not None:
            self.scale = head.logit_scale.to(dtype)
            x = x * self.scale
        size = None
        if is_sized(head):
            size = x.abs().amax(1, keepdim=True).clamp(min=1)
            x = x / size
        self.operand = Operand(x.to(head.weight.dtype) if products.mixed(head.weight) else x, size)

    def backward(self, grad: Tensor) -> Tensor:
        """Return the gradient of c_out·h + c_skip·z from that of D."""
        if self.norm is None:
            return grad
        # Below SMALLEST the divisor is a constant, and nothing is projected out.
        along = torch.where(self.norm >= SMALLEST, (self.x * grad).sum(1, keepdim=True), 0)
        return (grad - self.x * along) / self.norm.clamp(min=SMALLEST)


def half_norms(head: Head) -> Tensor | None:
    """Return |E_k|²/2 of the posterior's table, (V,)."""
    return None if head.table is None else head.table.to(compute_dtype(head.h.dtype)).square().sum(-1) / 2


def make_logits(
    head: Head, operand: Operand, halved: Tensor | None, out: Tensor, rows: slice, words: slice
) -> Tensor | None:
    """Write the logits of some rows and words to `out`. Return tanh of capped ones, for their gradient."""
    products.logits_of(operand.x, part(head.weight, words), out)
    if operand.size is not None:
        out.mul_(operand.size)
    if head.bias is not None:
        out.add_(part(head.bias, words))
    capped = None
    if head.softcap is not None:
        capped = torch.tanh(out.div_(head.softcap))
        torch.mul(capped, head.softcap, out=out)
    if head.posterior_z is not None and head.table is not None and head.precision is not None:
        evidence = products.logits_of(part(head.posterior_z, rows), part(head.table, words))
        if halved is not None:
            evidence.sub_(part(halved, words))
        out.addcmul_(evidence, part(head.precision, rows).unsqueeze(1))
    return capped
