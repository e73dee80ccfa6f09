"""edm_loss: the definition, the ops, and the gradient. The formula is explained in dbkernels/edm_loss.py."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dbkernels._address import SCHEMA, Number, define_at, joined, on_host, tensor_or_none
from dbkernels._direct import direct
from dbkernels._dtypes import kept_dtype
from dbkernels._inject_noise import c_in
from dbkernels._levels import broadcast
from dbkernels._library import define, register_triton
from dbkernels.philox import ROUNDS, normal_reference

Four = tuple[Tensor, Tensor, Tensor, Tensor]


class _Coefficients(NamedTuple):
    """target = of_y·y − of_noise·n, where n is z − clean·y, or eps where z is drawn again: clean is 1, c_in, or 0."""

    of_y: Tensor
    of_noise: Tensor
    clean: Tensor | float


def _coefficients(sigma: Tensor, sigma_data: float, drawn: bool, z_scaled: bool) -> _Coefficients:
    root = torch.hypot(sigma, torch.full_like(sigma, sigma_data))
    of_y, cos = sigma / root / sigma_data, sigma_data / root
    if drawn:
        return _Coefficients(of_y, cos, 0.0)
    if z_scaled:
        return _Coefficients(of_y, sigma_data / sigma, c_in(sigma, sigma_data, sigma.dim()))
    return _Coefficients(of_y, cos / sigma, 1.0)


def _residual(
    F: Tensor, z: Tensor | None, y: Tensor, c: _Coefficients, seed: Number, offset: Number, rounds: int
) -> Tensor:
    dtype = c.of_y.dtype
    if z is None:
        noise = normal_reference(y.shape, seed=seed, offset=offset, rounds=rounds, device=y.device).to(dtype)
    else:
        noise = z.to(dtype) - c.clean * y.to(dtype)
    return F.to(dtype) - c.of_y * y.to(dtype) + c.of_noise * noise


def _reduce(square: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return square
    if reduction == "sample":
        return square.reshape(len(square), mean_over(square.shape, reduction)).mean(1)
    return square.mean() if reduction == "mean" else square.sum()


def mean_over(shape: torch.Size, reduction: str) -> int:
    """Return how many elements a mean is taken over; 1 where none is."""
    if reduction == "sample":
        return shape[1:].numel()
    return shape.numel() if reduction == "mean" else 1


def edm_loss_reference(
    F: Tensor,
    z: Tensor | None,
    y: Tensor,
    sigma: Tensor,
    sigma_data: float,
    reduction: str = "mean",
    seed: Number = 0,
    offset: Number = 0,
    rounds: int = ROUNDS,
    weight: float = 1.0,
    z_scaled: bool = False,
) -> Tensor:
    """Compute `edm_loss` by its definition, differentiable in F, z and y.

    Args:
        sigma: (), (B,) or (B, N), in the arithmetic's dtype. The others: as for `edm_loss`.
    """
    coefficients = _coefficients(broadcast(sigma, F.dim()), sigma_data, z is None, z_scaled)
    return weight * _reduce(_residual(F, z, y, coefficients, seed, offset, rounds).square(), reduction)


def empty_gradients(
    F: Tensor, z: Tensor | None, y: Tensor, want_F: bool, want_z: bool, want_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the gradients of F, z and y; none of an element where one isn't wanted."""
    return room(F, want_F), room(y if z is None else z, want_z), room(y, want_y)


def room(x: Tensor, wanted: bool) -> Tensor:
    """Allocate the gradient of x, contiguous, of x's dtype (float32 for float16); without elements if not wanted."""
    return torch.empty(x.shape if wanted else (0,), dtype=kept_dtype(x.dtype), device=x.device)


def _with_gradients(
    F: Tensor, z: Tensor | None, y: Tensor, sigma: Tensor, sigma_data: float, reduction: str, z_scaled: bool,
    seed: Number, offset: Number, rounds: int, weight: float, expected: float, wanted: tuple[bool, bool, bool],
) -> Four:  # fmt: skip
    c = _coefficients(broadcast(sigma, F.dim()), sigma_data, z is None, z_scaled)
    residual = _residual(F, z, y, c, seed, offset, rounds)
    slope = 2 * residual / max(1, mean_over(F.shape, reduction)) * (weight * expected)
    loss = (weight * _reduce(residual.square(), reduction)).contiguous()
    grads = empty_gradients(F, z, y, *wanted)
    factors = 1, c.of_noise, -(c.of_y + c.of_noise * c.clean)
    for grad, want, factor in zip(grads, wanted, factors, strict=True):
        if want:
            grad.copy_(slope * factor)
    return loss, *grads


def _definition(
    F: Tensor, z: Tensor | None, y: Tensor, sigma: Tensor, sigma_data: float, reduction: str, z_scaled: bool,
    seed: int, offset: int, want_F: bool, want_z: bool, want_y: bool,
) -> Four:  # fmt: skip
    wanted = want_F, want_z, want_y
    return _with_gradients(F, z, y, sigma, sigma_data, reduction, z_scaled, seed, offset, ROUNDS, 1.0, 1.0, wanted)


def _definition_at(
    F: Tensor, z: Tensor | None, y: Tensor, sigma: Tensor, sigma_data: float, reduction: str, z_scaled: bool,
    seed_at: Tensor | None, offset_at: Tensor | None, seed: int, offset: int, rounds: int, weight: float,
    expected: float, *wanted: bool,
) -> Four:  # fmt: skip
    address, given = joined(seed_at, offset_at, seed, offset), (F, z, y, sigma, sigma_data, reduction, z_scaled)
    if F.device.type != "cpu" or (z is None and rounds != ROUNDS):
        return _with_gradients(*given, *address, rounds, weight, expected, wanted)  # type: ignore[arg-type]
    loss, *grads = torch.ops.dbkernels.edm_loss.default(*given, *on_host(*address), *wanted)
    factor = sigma.new_full((), weight * expected)
    for grad in grads:
        torch.ops.dbkernels.edm_loss_scale_.default(grad, factor)
    return (loss if weight == 1.0 else weight * loss), *grads


def _fake(F: Tensor, z: Tensor | None, y: Tensor, sigma: Tensor, sigma_data: float, reduction: str, *rest: Any) -> Four:
    shape = {"none": F.shape, "sample": F.shape[:1]}.get(reduction, ())
    return F.new_empty(shape, dtype=sigma.dtype), *empty_gradients(F, z, y, *rest[-3:])


def _launch(F: Tensor, z: Tensor | None, y: Tensor, sigma: Tensor, *rest: Any) -> Four:
    return _launch_at(F, z, y, sigma, *rest[:3], None, None, *rest[3:5], ROUNDS, 1.0, 1.0, *rest[5:])


def _address(rest: tuple[Any, ...]) -> Any:
    return joined(*rest[3:7])


def _launch_at(F: Tensor, z: Tensor | None, y: Tensor, sigma: Tensor, *rest: Any) -> Four:
    if F.numel() == 0:
        return _definition_at(F, z, y, sigma, *rest)
    from dbkernels.triton.edm_loss import forward

    loss, *grads = forward(F, z, y, sigma, *rest[:3], *_address(rest), *rest[7:])
    return loss, *(F.new_empty(0) if grad is None else grad for grad in grads)


_ARGUMENTS = "Tensor F, Tensor? z, Tensor y, Tensor sigma, float sigma_data, str reduction, bool z_scaled"
_WANTED = "bool want_F, bool want_z, bool want_y) -> (Tensor, Tensor, Tensor, Tensor)"
define(f"edm_loss({_ARGUMENTS}, SymInt seed, SymInt offset, {_WANTED}", _definition, _fake)
register_triton("edm_loss", _launch)
# `expected`: the upstream gradient that the gradients are found for.
define_at(
    f"edm_loss.at({_ARGUMENTS}, {SCHEMA}, int rounds, float weight, float expected, {_WANTED}",
    _definition_at,
    _fake,
    _launch_at,
)


def _scale(x: Tensor, by: Tensor) -> None:
    x.copy_(x * broadcast(by, x.dim()))


def _launch_scale(x: Tensor, by: Tensor, expected: float = 1.0) -> None:
    from dbkernels.triton.edm_loss import scale

    scale(x, by, expected)


define("edm_loss_scale_(Tensor(a!) x, Tensor by) -> ()", _scale, lambda x, by: None)
register_triton("edm_loss_scale_", _launch_scale)


def expected_upstream(F: Tensor, reduction: str, dtype: torch.dtype) -> float:
    """Return the gradient that `.mean()` of the losses hands to each, as autograd rounds it; 1 for a single loss."""
    losses = {"none": F.numel(), "sample": F.shape[0] if F.dim() else 1}.get(reduction, 1)
    if losses <= 1:
        return 1.0
    return 1.0 / losses if dtype == torch.float64 else _float32(1.0 / _float32(losses))


def _float32(number: float) -> float:
    return float(struct.unpack("f", struct.pack("f", number))[0])


class EDMLoss(torch.autograd.Function):
    """Compute the gradients with the loss, so that backward has only the upstream gradient to apply."""

    @staticmethod
    def forward(ctx: Any, F: Tensor, z: Tensor | None, y: Tensor, sigma: Any, *rest: Any) -> Tensor:
        """Return the loss. rest: the overload's arguments from sigma_data to expected."""
        loss, *grads = run(F, z, y, sigma, *rest, *ctx.needs_input_grad[:3])
        ctx.expected = rest[-1]
        ctx.dtypes = F.dtype, y.dtype if z is None else z.dtype, y.dtype
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # Not once_differentiable: where upstream is a constant, it would let the gradient pass for a constant too.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("edm_loss has no second derivative: drop create_graph=True, or use edm_loss_reference")
        grads: list[Tensor | None] = []
        for need, kept, dtype in zip(ctx.needs_input_grad[:3], ctx.saved_tensors, ctx.dtypes, strict=True):
            grad = times_upstream(kept, upstream, ctx.expected) if need else None
            grads.append(grad if grad is None or grad.dtype == dtype else grad.to(dtype))
        return *grads, *[None] * 11


def run(F: Tensor, z: Tensor | None, y: Tensor, sigma: Any, *rest: Any) -> Any:
    """Compute the loss and the gradients that are wanted. rest: the arguments of the overload `.at`."""
    (seed_at, offset_at), (rounds, weight, expected) = rest[3:5], rest[7:10]
    if F.numel() and direct(F, z, y, tensor_or_none(sigma)):
        from dbkernels.triton.edm_loss import forward

        return forward(F, z, y, sigma, *rest[:3], *_address(rest), *rest[7:])
    if seed_at is None and offset_at is None and (rounds, weight, expected) == (ROUNDS, 1.0, 1.0):
        return torch.ops.dbkernels.edm_loss.default(F, z, y, sigma, *rest[:3], *rest[5:7], *rest[10:])
    return torch.ops.dbkernels.edm_loss.at(F, z, y, sigma, *rest)


def times_upstream(kept: Tensor, upstream: Tensor, expected: float = 1.0) -> Tensor:
    """Return kept·upstream/expected.

    In the graph's last backward, after which nobody needs `kept`, it is scaled in place, without a pass over it where
    upstream is as expected. In a retained graph a copy is scaled, as whoever gets the gradient may write into it.
    """
    if torch.compiler.is_compiling():
        return kept * broadcast(upstream if expected == 1.0 else upstream / expected, kept.dim())
    if torch._C._autograd._get_current_graph_task_keep_graph():
        kept = kept.clone()
    if direct(kept, upstream):
        _launch_scale(kept, upstream, expected)
        return kept
    if upstream.dim() and upstream.numel() and not any(upstream.stride()):
        upstream = upstream.as_strided((), ())  # one number, expanded: what .sum() and .mean() hand down
    torch.ops.dbkernels.edm_loss_scale_.default(kept, upstream if expected == 1.0 else upstream / expected)
    return kept
