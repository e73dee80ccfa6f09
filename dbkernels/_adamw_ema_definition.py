"""The definition of adamw_ema_step in plain PyTorch: in place, in pieces, without a host read of device memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dbkernels._pieces import pieces
from dbkernels.philox import round_moments, round_stochastically
from dbkernels.total_norm import total_norm_reference

CLIP_EPS = 1e-6  # added to the norm, as torch.nn.utils.clip_grad_norm_ does


def power(base: float, exponent: int | Tensor) -> float | Tensor:
    """Return base^exponent in float64 by squaring.

    Every form of the op takes these products, so that the step number's form (a Python int, an int64 tensor) and its
    place (host, device) don't change a bit.
    """
    if isinstance(exponent, Tensor):
        result = torch.ones((), dtype=torch.float64, device=exponent.device)
        square = torch.full_like(result, base)
        for bit in range(63):
            result = torch.where((exponent >> bit & 1) == 1, result * square, result)
            square = square * square
        return result
    product = 1.0
    while exponent > 0:
        if exponent & 1:
            product *= base
        base *= base
        exponent >>= 1
    return product


Address = tuple[int, int | Tensor, int | Tensor]  # first random group, seed and offset of stochastic rounding


class Rule(NamedTuple):
    """The factors of an update, alike for every element; tensors are 0-dim, of the arithmetic's dtype."""

    skip: Tensor
    clip: Tensor
    minus_step_size: Tensor
    root: Tensor
    one_minus_ema: Tensor
    beta1: float
    beta2: float
    eps: float


class Piece(NamedTuple):
    """The same elements of a parameter, of its gradient and of its state."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    ema: Tensor | None
    master: Tensor | None


def adamw_ema_step_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor],
    step: int | Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: Sequence[float],
    max_norm: float | None,
    ema_decay: float | Tensor | None,
    masters: Sequence[Tensor] = (),
    stochastic_rounding: bool = False,
    seed: int | Tensor = 0,
    offset: int | Tensor = 0,
    norm: Tensor | None = None,
) -> Tensor:
    """Update every tensor in place where the norm is finite, and advance `step` if it is a tensor.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: as in `adamw_ema_step`, contiguous.
        emas, masters: one per parameter, or empty.
        weight_decay: one per parameter.
        step, lr, ema_decay, seed, offset: numbers, or 0-dim tensors on the params' device (int64, float64, float64,
            int64, int64).
        beta1, beta2, eps, max_norm, stochastic_rounding, norm: as in `adamw_ema_step`.

    Returns:
        The norm, 0-dim, in the arithmetic's dtype.
    """
    norm = total_norm_reference(grads) if norm is None else norm.clone()

    def scalar(value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(norm.dtype)
        return torch.full((), value, dtype=norm.dtype, device=norm.device)

    inverse = (norm + CLIP_EPS).reciprocal()
    clip = torch.ones_like(norm) if max_norm is None else torch.clamp(inverse * max_norm, max=1.0)
    correction = 1 - power(beta2, step)
    rule = Rule(
        ~torch.isfinite(norm), clip, scalar(-(lr / (1 - power(beta1, step)))),
        scalar(correction.sqrt() if isinstance(correction, Tensor) else math.sqrt(correction)),
        scalar(1 - (1.0 if ema_decay is None else ema_decay)), beta1, beta2, eps,
    )  # fmt: skip
    group = 0
    averaged = emas if ema_decay is not None else ()
    for i, decay in enumerate(weight_decay):
        factor = scalar(1 - lr * decay)
        for piece in _cut([x[i] if x else None for x in (params, grads, exp_avgs, exp_avg_sqs, averaged, masters)]):
            address = group, seed, offset
            new = _advance(piece, rule, factor, address)
            _store(piece, new, rule, address if stochastic_rounding else None)
            group += (piece.param.numel() + 7) // 8
    if isinstance(step, Tensor):
        step.add_(~rule.skip)
    return norm


def _cut(of_tensor: Sequence[Tensor | None]) -> Iterator[Piece]:
    parts = [None if tensor is None else pieces(tensor) for tensor in of_tensor]
    for i in range(len(parts[0] or ())):
        yield Piece(*(None if part is None else part[i] for part in parts))  # type: ignore[arg-type]


def _commit(target: Tensor, value: Tensor, rule: Rule) -> None:
    # Chosen, not weighted by zero: a skipped update may be NaN, and zero times NaN is NaN.
    target.copy_(torch.where(rule.skip, target, value.to(target.dtype)))


def _advance(piece: Piece, rule: Rule, factor: Tensor, address: Address) -> Tensor:
    """Update the moments and return the new parameter, in the arithmetic's dtype, by the moments before rounding."""
    dtype = rule.root.dtype
    grad = piece.grad.to(dtype) * rule.clip
    square = (piece.exp_avg_sq.to(dtype) * rule.beta2).addcmul_(grad, grad, value=1 - rule.beta2)
    moment = torch.lerp(piece.exp_avg.to(dtype), grad, 1 - rule.beta1)
    del grad
    stored = [moment, square]
    if piece.exp_avg.dtype != dtype:
        stored = round_moments(moment, square, address[0], seed=address[1], offset=address[2])  # type: ignore[arg-type]
    _commit(piece.exp_avg, stored[0], rule)
    _commit(piece.exp_avg_sq, stored[1], rule)
    del stored
    update = moment.mul_(rule.minus_step_size).div_(square.sqrt_().div_(rule.root).add_(rule.eps))
    del square
    source = piece.param if piece.master is None else piece.master
    return update.add_(source.to(dtype) * factor)


def _store(piece: Piece, new: Tensor, rule: Rule, address: Address | None) -> None:
    """Store the new parameter, its master and its average. address: None to round to nearest."""
    if address is None:
        stored = new.to(piece.param.dtype)
    else:
        stored = round_stochastically(new, address[0], seed=address[1], offset=address[2])  # type: ignore[arg-type]
    _commit(piece.param, stored, rule)
    if piece.master is not None:
        _commit(piece.master, new, rule)
    if piece.ema is not None:
        # The average is of the master, or of the parameter as stored: a half type's rounding is part of it.
        now = new if piece.master is not None else stored.to(new.dtype)
        _commit(piece.ema, torch.lerp(piece.ema, now, rule.one_minus_ema), rule)
