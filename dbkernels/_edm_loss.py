"""edm_loss: the definition, the ops, and the gradient. The formula is explained in dbkernels/edm_loss.py."""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from dbkernels._address import SCHEMA, Number, define_at, joined, on_host, tensor_or_none
from dbkernels._direct import direct
from dbkernels._levels import broadcast
from dbkernels._library import define, register_triton
from dbkernels.philox import ROUNDS, normal_reference

Four = tuple[Tensor, Tensor, Tensor, Tensor]


def _coefficients(sigma: Tensor, sigma_data: float, drawn: bool) -> tuple[Tensor, Tensor]:
    """of_y, of_noise: target = of_y·y − of_noise·n, where n is z − y, or eps where z is drawn again."""
    root = torch.hypot(sigma, torch.full_like(sigma, sigma_data))
    cos = sigma_data / root
    return sigma / root / sigma_data, cos if drawn else cos / sigma


def _residual(
    F: Tensor, z: Tensor | None, y: Tensor, of_y: Tensor, of_noise: Tensor, seed: Number, offset: Number, rounds: int
) -> Tensor:
    dtype = of_y.dtype
    if z is None:
        noise = normal_reference(y.shape, seed=seed, offset=offset, rounds=rounds, device=y.device).to(dtype)
    else:
        noise = z.to(dtype) - y.to(dtype)
    return F.to(dtype) - of_y * y.to(dtype) + of_noise * noise


def _reduce(square: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return square
    if reduction == "sample":
        return square.reshape(len(square), mean_over(square.shape, reduction)).mean(1)
    return square.mean() if reduction == "mean" else square.sum()


def mean_over(shape: torch.Size, reduction: str) -> int:
    """How many elements a mean is taken over; 1 where none is."""
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
) -> Tensor:
    """The definition, differentiable in F, z and y. sigma: (), (B,) or (B, N), in the arithmetic's dtype."""
    coefficients = _coefficients(broadcast(sigma, F.dim()), sigma_data, z is None)
    return weight * _reduce(_residual(F, z, y, *coefficients, seed, offset, rounds).square(), reduction)


def empty_gradients(
    F: Tensor, z: Tensor | None, y: Tensor, want_F: bool, want_z: bool, want_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients; nothing where one isn't wanted."""
    return room(F, want_F), room(y if z is None else z, want_z), room(y, want_y)


def room(x: Tensor, wanted: bool) -> Tensor:
    """Memory for the gradient of x; none where it isn't wanted."""
    # float16 can't hold a mean's small gradients before a loss scale is applied.
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    return torch.empty(x.shape if wanted else (0,), dtype=dtype, device=x.device)


def _with_gradients(
    F: Tensor, z: Tensor | None, y: Tensor, sigma: Tensor, sigma_data: float, reduction: str, seed: Number,
    offset: Number, rounds: int, weight: float, expected: float, wanted: tuple[bool, bool, bool],
) -> Four:  # fmt: skip
    of_y, of_noise = _coefficients(broadcast(sigma, F.dim()), sigma_data, z is None)
    residual = _residual(F, z, y, of_y, of_noise, seed, offset, rounds)
    slope = 2 * residual / max(1, mean_over(F.shape, reduction)) * (weight * expected)
    loss = (weight * _reduce(residual.square(), reduction)).contiguous()
    grads = empty_gradients(F, z, y, *wanted)
    at_y = -of_y if z is None else -(of_y + of_noise)
    for grad, want, factor in zip(grads, wanted, (1, of_noise, at_y), strict=True):
        if want:
            grad.copy_(slope * factor)
    return loss, *grads


def _definition(
    F: Tensor, z: Tensor | None, y: Tensor, sigma: Tensor, sigma_data: float, reduction: str, seed: int, offset: int,
    want_F: bool, want_z: bool, want_y: bool,
) -> Four:  # fmt: skip
    wanted = want_F, want_z, want_y
    return _with_gradients(F, z, y, sigma, sigma_data, reduction, seed, offset, ROUNDS, 1.0, 1.0, wanted)


def _definition_at(
    F: Tensor, z: Tensor | None, y: Tensor, sigma: Tensor, sigma_data: float, reduction: str, seed_at: Tensor | None,
    offset_at: Tensor | None, seed: int, offset: int, rounds: int, weight: float, expected: float, *wanted: bool,
) -> Four:  # fmt: skip
    address, tensors = joined(seed_at, offset_at, seed, offset), (F, z, y, sigma)
    if F.device.type != "cpu" or (z is None and rounds != ROUNDS):
        return _with_gradients(*tensors, sigma_data, reduction, *address, rounds, weight, expected, wanted)  # type: ignore[arg-type]
    loss, *grads = torch.ops.dbkernels.edm_loss.default(*tensors, sigma_data, reduction, *on_host(*address), *wanted)
    factor = sigma.new_full((), weight * expected)
    for grad in grads:
        torch.ops.dbkernels.edm_loss_scale_.default(grad, factor)
    return (loss if weight == 1.0 else weight * loss), *grads


def _fake(F: Tensor, z: Tensor | None, y: Tensor, sigma: Tensor, sigma_data: float, reduction: str, *rest: Any) -> Four:
    shape = {"none": F.shape, "sample": F.shape[:1]}.get(reduction, ())
    return F.new_empty(shape, dtype=sigma.dtype), *empty_gradients(F, z, y, *rest[-3:])


def _launch(F: Tensor, z: Tensor | None, y: Tensor, sigma: Tensor, *rest: Any) -> Four:
    return _launch_at(F, z, y, sigma, *rest[:2], None, None, *rest[2:4], ROUNDS, 1.0, 1.0, *rest[4:])


def _address(rest: tuple[Any, ...]) -> Any:
    return joined(*rest[2:6])


def _launch_at(F: Tensor, z: Tensor | None, y: Tensor, sigma: Tensor, *rest: Any) -> Four:
    if F.numel() == 0:
        return _definition_at(F, z, y, sigma, *rest)
    from dbkernels.triton.edm_loss import forward

    loss, *grads = forward(F, z, y, sigma, *rest[:2], *_address(rest), *rest[6:])
    return loss, *(F.new_empty(0) if grad is None else grad for grad in grads)


_ARGUMENTS = "Tensor F, Tensor? z, Tensor y, Tensor sigma, float sigma_data, str reduction"
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
    """The op with its gradients, which are ready before backward asks: it only applies the upstream gradient."""

    @staticmethod
    def forward(
        ctx: Any, F: Tensor, z: Tensor | None, y: Tensor, sigma: Any, sigma_data: float, reduction: str, *rest: Any
    ) -> Tensor:
        """rest: the address as an overload takes it, rounds, weight, expected."""
        wanted = ctx.needs_input_grad[:3]
        loss, *grads = run(F, z, y, sigma, sigma_data, reduction, *rest, *wanted)
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
        return *grads, *[None] * 10


def run(F: Tensor, z: Tensor | None, y: Tensor, sigma: Any, *rest: Any) -> Any:
    """The loss and the gradients that are wanted, by the arguments of the overload `.at`."""
    (seed_at, offset_at), (rounds, weight, expected) = rest[2:4], rest[6:9]
    if F.numel() and direct(F, z, y, tensor_or_none(sigma)):
        from dbkernels.triton.edm_loss import forward

        return forward(F, z, y, sigma, *rest[:2], *_address(rest), *rest[6:])
    if seed_at is None and offset_at is None and (rounds, weight, expected) == (ROUNDS, 1.0, 1.0):
        return torch.ops.dbkernels.edm_loss.default(F, z, y, sigma, *rest[:2], *rest[4:6], *rest[9:])
    return torch.ops.dbkernels.edm_loss.at(F, z, y, sigma, *rest)


def times_upstream(kept: Tensor, upstream: Tensor, expected: float = 1.0) -> Tensor:
    """kept·upstream/expected: in place, without a pass over what is kept where upstream is as expected, if this is the
    graph's last backward: then nobody needs `kept` any more. Otherwise a copy, as whoever gets the gradient may write
    into it."""
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
