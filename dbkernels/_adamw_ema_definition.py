"""The definition of adamw_ema_step in plain PyTorch: in place, in pieces, without a host read of device memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dbkernels.philox import round_stochastically

CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm; so do we, to agree with it
PIECE = 2**20  # elements worked on at once, a multiple of 8: temporaries are some MiB, however large the tensors


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of moments, averages and masters of params of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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


def pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Return the tensor in views of at most PIECE elements. A compiler fuses, so it gets the whole."""
    if tensor.numel() <= PIECE or torch.compiler.is_compiling():
        return (tensor,)
    return tensor.view(-1).split(PIECE)


def global_norm(grads: Sequence[Tensor]) -> Tensor:
    """Return the 2-norm of all gradients together, 0-dim on their device, summed in float64, rounded to the state's
    dtype."""
    norms = [torch.linalg.vector_norm(piece, dtype=torch.float64) for grad in grads for piece in pieces(grad)]
    return torch.linalg.vector_norm(torch.stack(norms)).to(state_dtype(grads[0].dtype))


class Rule(NamedTuple):
    """What an update does to one element; tensors are 0-dim, of the state's dtype."""

    skip: Tensor
    clip: Tensor
    minus_step_size: Tensor
    root: Tensor
    one_minus_ema: Tensor
    beta1: float
    beta2: float
    eps: float


class Piece(NamedTuple):
    """Equal stretches of a parameter and of what belongs to it."""

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
) -> Tensor:
    """Update every tensor in place where the norm is finite, and advance `step` if it is a tensor.

    `weight_decay`: one a tensor; `masters`: one a tensor, or none. `step`, `lr`, `ema_decay`, `seed` and `offset`:
    numbers, or 0-dim tensors on the params' device (int64, float64, float64, int64, int64).
    """
    norm = global_norm(grads)

    def scalar(value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(norm.dtype)
        return torch.full((), value, dtype=norm.dtype, device=norm.device)

    clip = torch.ones_like(norm) if max_norm is None else torch.clamp(max_norm / (norm + CLIP_EPS), max=1.0)
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
            new = _advance(piece, rule, factor)
            _store(piece, new, rule, (group, seed, offset) if stochastic_rounding else None)
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


def _advance(piece: Piece, rule: Rule, factor: Tensor) -> Tensor:
    """Update the moments. Returns the new parameter, in the state's dtype."""
    dtype = piece.exp_avg.dtype
    grad = piece.grad.to(dtype) * rule.clip
    square = (piece.exp_avg_sq * rule.beta2).addcmul_(grad, grad, value=1 - rule.beta2)
    moment = torch.lerp(piece.exp_avg, grad, 1 - rule.beta1)
    del grad
    _commit(piece.exp_avg_sq, square, rule)
    _commit(piece.exp_avg, moment, rule)
    update = moment.mul_(rule.minus_step_size).div_(square.sqrt_().div_(rule.root).add_(rule.eps))
    del square
    source = piece.param if piece.master is None else piece.master
    return update.add_(source.to(dtype) * factor)


def _store(piece: Piece, new: Tensor, rule: Rule, address: tuple[int, int | Tensor, int | Tensor] | None) -> None:
    """Store the new parameter, its master and the average. `address`: first random group, seed and offset, or None."""
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
