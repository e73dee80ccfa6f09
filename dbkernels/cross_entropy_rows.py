"""cross_entropy_rows: losses of rows of logits, and their gradient written where the logits were or beside them.

The definition first, then the op. The kernels are csrc/cpu/cross_entropy_rows.cpp and
dbkernels/triton/cross_entropy_rows.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dbkernels._library import define, register_triton


def cross_entropy_rows_definition(
    logits: Tensor, target: Tensor, factor: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Losses (R,) of logits (R, V), which are overwritten. target: (R,) int64, -1 for a loss of 0. With `factor` (R,),
    factor·(p - onehot) goes to `out`, of any dtype, or to the logits' place.

    With rest = Σ exp(l_k - m) over k other than the target, the loss is log1p(rest + expm1(l_y - m)) - (l_y - m) and
    p_y - 1 is -rest / (rest + exp(l_y - m)): neither cancels where the target is nearly certain.
    """
    valid = target >= 0
    index = target.clamp(min=0).unsqueeze(1)
    logits.sub_(logits.amax(1, keepdim=True))
    at = logits.gather(1, index)
    logits.exp_().scatter_(1, index, 0)
    rest = logits.sum(1, keepdim=True)
    loss = torch.log1p(rest + torch.expm1(at)) - at
    if factor is not None:
        share = torch.where(valid, factor, 0).unsqueeze(1) / (rest + at.exp())
        logits.mul_(share).scatter_(1, index, -share * rest)
        if out is not None:
            out.copy_(logits)
    return torch.where(valid, loss.squeeze(1), 0)


def _triton_rows(logits: Tensor, target: Tensor, factor: Tensor | None, out: Tensor | None) -> Tensor:
    from dbkernels.triton.cross_entropy_rows import launch

    return launch(logits, target, factor, logits if out is None else out)


define(
    "cross_entropy_rows(Tensor(a!) logits, Tensor target, Tensor? factor, Tensor(b!)? out) -> Tensor",
    cross_entropy_rows_definition,
    lambda logits, target, factor, out: logits.new_empty(len(logits)),
)
register_triton("cross_entropy_rows", _triton_rows)
