"""cross_entropy_rows: losses of rows of logits, and their gradient, in the logits' place or beside them; and
cross_entropy_columns: the gradient of some columns, once the losses are known.

The definitions first, then the ops. The kernels are csrc/cpu/cross_entropy_rows.cpp and
dbkernels/triton/cross_entropy_rows.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dbkernels._direct import direct
from dbkernels._library import define, register_triton


def cross_entropy_rows_definition(
    logits: Tensor, target: Tensor, factor: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Return the losses (R,) of logits (R, V), which are overwritten.

    target: (R,) int64; -1 gives a loss of 0, others outside [0, V) give NaN. With `factor` (R,), factor·(p - onehot)
    goes to `out`, of any dtype, which may be the first part of each row of the logits, or to the logits' place.

    With rest = Σ exp(l_k - m) over k other than the target, the loss is log1p(rest + expm1(l_y - m)) - (l_y - m) and
    p_y - 1 is -rest / (rest + exp(l_y - m)): neither cancels where the target is nearly certain.
    """
    ignored, wrong = target == -1, (target < -1) | (target >= logits.shape[1])
    index = target.clamp(0, logits.shape[1] - 1).unsqueeze(1)
    logits.sub_(logits.amax(1, keepdim=True))
    at = logits.gather(1, index)
    logits.exp_().scatter_(1, index, 0)
    rest = logits.sum(1, keepdim=True).masked_fill(wrong.unsqueeze(1), math.nan)
    loss = torch.log1p(rest + torch.expm1(at)) - at
    if factor is not None:
        share = torch.where(ignored, 0, factor).unsqueeze(1) / (rest + at.exp())
        logits.mul_(share).scatter_(1, index, -share * rest)
        if out is not None:
            out.copy_(logits.to(out.dtype))
    return torch.where(ignored, 0, loss.squeeze(1))


def cross_entropy_columns_definition(
    logits: Tensor, target: Tensor, at: Tensor, loss: Tensor, factor: Tensor, first: int, out: Tensor
) -> None:
    """Write factor·(p - onehot) of columns [first, first + C) of logits, (R, C), to `out`, of any dtype, which may be
    the first part of each row of the logits. target, loss: (R,), as for `cross_entropy_rows`; at: (R, 1), the targets'
    logits.

    p = exp((l - l_y) - loss), and p_y - 1 = expm1(-loss), which doesn't cancel where the target is nearly certain.
    """
    place = (target - first).unsqueeze(1)
    is_target = torch.arange(logits.shape[1], device=logits.device) == place
    slope = torch.where(is_target, torch.expm1(-loss).unsqueeze(1), torch.exp((logits - at) - loss.unsqueeze(1)))
    out.copy_(torch.where((target == -1).unsqueeze(1), 0, slope * factor.unsqueeze(1)).to(out.dtype))


def _triton_rows(logits: Tensor, target: Tensor, factor: Tensor | None, out: Tensor | None) -> Tensor:
    from dbkernels.triton.cross_entropy_rows import rows

    return rows(logits, target, factor, logits if out is None else out)


def _triton_columns(
    logits: Tensor, target: Tensor, at: Tensor, loss: Tensor, factor: Tensor, first: int, out: Tensor
) -> None:
    from dbkernels.triton.cross_entropy_rows import columns

    columns(logits, target, at, loss, factor, first, out)


define(
    "cross_entropy_rows(Tensor(a!) logits, Tensor target, Tensor? factor, Tensor(b!)? out) -> Tensor",
    cross_entropy_rows_definition,
    lambda logits, target, factor, out: logits.new_empty(len(logits)),
)
define(
    "cross_entropy_columns(Tensor logits, Tensor target, Tensor at, Tensor loss, Tensor factor, int first, "
    "Tensor(a!) out) -> ()",
    cross_entropy_columns_definition,
    lambda logits, target, at, loss, factor, first, out: None,
)
register_triton("cross_entropy_rows", _triton_rows)
register_triton("cross_entropy_columns", _triton_columns)


def cross_entropy_rows(logits: Tensor, target: Tensor, factor: Tensor | None, out: Tensor | None) -> Tensor:
    """Call the op's kernel."""
    if direct(logits):
        return _triton_rows(logits, target, factor, out)
    return torch.ops.dbkernels.cross_entropy_rows.default(logits, target, factor, out)


def cross_entropy_columns(
    logits: Tensor, target: Tensor, at: Tensor, loss: Tensor, factor: Tensor, first: int, out: Tensor
) -> None:
    """Call the op's kernel."""
    if direct(logits):
        _triton_columns(logits, target, at, loss, factor, first, out)
    else:
        torch.ops.dbkernels.cross_entropy_columns.default(logits, target, at, loss, factor, first, out)
