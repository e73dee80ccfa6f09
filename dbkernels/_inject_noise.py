"""z = c_in · (y + sigma·eps) for a dense y: the definition, the op, its gradient, and the way past the dispatcher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dbkernels._address import (
    SCHEMA,
    Number,
    checked,
    define_at,
    joined,
    on_host,
    signed,
    split,
    tensor_or_none,
)
from dbkernels._direct import direct, kind
from dbkernels._levels import (
    as_defined,
    broadcast,
    check_floating,
    check_level,
    check_sigma,
    check_sigma_data,
    compute_dtype,
)
from dbkernels._library import NAMESPACE, define, lib, register_triton
from dbkernels.philox import ROUNDS, normal_reference


def inject_noise_reference(
    y: Tensor, sigma: Tensor, sigma_data: float | None, seed: Number, offset: Number, rounds: int = ROUNDS
) -> Tensor:
    """The definition, differentiable in y and sigma. sigma: (), (B,) or (B, N), in y's compute dtype."""
    dtype = compute_dtype(y.dtype)
    eps = normal_reference(y.shape, seed=seed, offset=offset, rounds=rounds, device=y.device).to(dtype)
    sigma = broadcast(sigma, y.dim())
    z = y.to(dtype) + sigma * eps
    if sigma_data is not None:
        z = z * torch.rsqrt(sigma * sigma + sigma_data * sigma_data)
    return z.to(y.dtype)


def _fake(y: Tensor, sigma: Tensor, sigma_data: float | None, *address: Any) -> Tensor:
    return torch.empty(y.shape, dtype=y.dtype, device=y.device)


def _definition(y: Tensor, sigma: Tensor, sigma_data: float | None, seed: int, offset: int) -> Tensor:
    return inject_noise_reference(y, sigma, sigma_data, seed, offset).contiguous()


def _definition_at(y: Tensor, sigma: Tensor, sigma_data: float | None, *address: Any) -> Tensor:
    (seed, offset), rounds = joined(*address[:4]), address[4]
    if y.device.type == "cpu" and rounds == ROUNDS:
        return torch.ops.dbkernels.inject_noise(y, sigma, sigma_data, *on_host(seed, offset))
    return inject_noise_reference(y, sigma, sigma_data, seed, offset, rounds).contiguous()


def launched(
    y: Tensor,
    sigma: float | Tensor,
    sigma_data: float | None,
    seed: Number | None,
    offset: Number,
    rounds: int = ROUNDS,
) -> Tensor:
    """z by the Triton kernel; no seed: without noise, c_in·y."""
    from dbkernels.triton.inject_noise import launch

    y = y if y.is_contiguous() else y.contiguous()
    z = torch.empty_like(y)
    levels = sigma.contiguous() if isinstance(sigma, Tensor) else float(sigma)
    launch(y, levels, z, sigma_data, seed, offset, rounds)
    return z


define(
    "inject_noise(Tensor y, Tensor sigma, float? sigma_data, SymInt seed, SymInt offset) -> Tensor",
    _definition,
    _fake,
)
register_triton("inject_noise", launched)
define_at(
    f"inject_noise.at(Tensor y, Tensor sigma, float? sigma_data, {SCHEMA}, int rounds) -> Tensor",
    _definition_at,
    _fake,
    lambda y, sigma, sigma_data, *address: launched(y, sigma, sigma_data, *joined(*address[:4]), address[4]),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """inputs: those of the overload `.at`."""
    y, sigma, ctx.sigma_data, seed_at, offset_at, ctx.seed, ctx.offset, ctx.rounds = inputs
    ctx.level = None if isinstance(sigma, Tensor) else sigma
    again = isinstance(sigma, Tensor) and sigma.requires_grad  # its gradient draws the noise again
    # y is wanted only by sigma's gradient through c_in: without it, the op holds nothing but the noise
    # levels.
    keep_y = again and ctx.sigma_data is not None
    ctx.save_for_backward(
        tensor_or_none(sigma), y if keep_y else None, seed_at if again else None, offset_at if again else None
    )


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    sigma, y, seed_at, offset_at = ctx.saved_tensors
    sigma = ctx.level if sigma is None else sigma
    grad_y = grad_sigma = None
    if ctx.needs_input_grad[0]:
        grad_y = grad if ctx.sigma_data is None else times_c_in(grad, sigma, ctx.sigma_data)
    if ctx.needs_input_grad[1]:
        address = joined(seed_at, offset_at, ctx.seed, ctx.offset)
        grad_sigma = sigma_gradient(grad, y, sigma, ctx.sigma_data, *address, ctx.rounds)
    return grad_y, grad_sigma, *[None] * 6


def times_c_in(grad: Tensor, sigma: float | Tensor, sigma_data: float) -> Tensor:
    """c_in·grad in grad's dtype: in one launch, or differentiable where a second derivative is wanted."""
    if not torch.is_grad_enabled() and direct(grad, tensor_or_none(sigma)):
        return launched(grad, sigma, sigma_data, None, 0)
    level = check_sigma(sigma, "grad", grad, compute_dtype(grad.dtype))
    return (grad * c_in(level, sigma_data, grad.dim())).to(grad.dtype)


def c_in(sigma: Tensor, sigma_data: float, dims: int) -> Tensor:
    """1 / sqrt(sigma² + sigma_data²), to broadcast over `dims` dimensions."""
    level = broadcast(sigma, dims)
    return torch.rsqrt(level * level + sigma_data * sigma_data)


def sigma_gradient(
    grad: Tensor,
    y: Tensor | None,
    sigma: Tensor,
    sigma_data: float | None,
    seed: Number,
    offset: Number,
    rounds: int = ROUNDS,
) -> Tensor:
    """The gradient of sigma: z = c·(y + s·eps), dc/ds = -s·c^3, so dz/ds = c·eps - s·c^3·(y + s·eps); eps is drawn
    again. y isn't needed without sigma_data."""
    level = check_sigma(sigma, "grad", grad, compute_dtype(grad.dtype))
    level = broadcast(level, grad.dim())
    seed = seed if isinstance(seed, Tensor) else seed % 2**64
    slope = normals(grad.shape, grad.device, seed, offset, rounds).to(level.dtype)
    if sigma_data is not None:
        assert y is not None
        c = c_in(level, sigma_data, grad.dim())
        slope = c * (slope - level * c * c * (y.to(level.dtype) + level * slope))
    return (grad.to(level.dtype) * slope).sum_to_size(level.shape).reshape(sigma.shape).to(sigma.dtype)


def normals(
    shape: Sequence[int], device: torch.device | str | None, seed: Number, offset: Number, rounds: int
) -> Tensor:
    """The eps of a z of `shape`, float32."""
    z = torch.empty(shape, dtype=torch.float32, device=device)
    seed, offset = checked(seed, offset, z.device)
    if direct(z):
        from dbkernels.triton.inject_noise import launch

        launch(None, 1.0, z, None, seed, offset, rounds)
        return z
    return noised(z.zero_(), 1.0, None, seed, offset, rounds)


def _setup_context_of_ints(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _setup_context(ctx, (*inputs[:3], None, None, *inputs[3:], ROUNDS), output)


def _backward_of_ints(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(ctx, grad)[:5]


torch.library.register_autograd(
    f"{NAMESPACE}::inject_noise", _backward_of_ints, setup_context=_setup_context_of_ints, lib=lib
)
torch.library.register_autograd(f"{NAMESPACE}::inject_noise.at", _backward, setup_context=_setup_context, lib=lib)


class _Launched(torch.autograd.Function):
    """The kernel past the dispatcher, where a gradient is wanted."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, sigma: float | Tensor, sigma_data: float | None, *address: Any) -> Tensor:
        _setup_context(ctx, (y, sigma, sigma_data, *address), y)
        return launched(y, sigma, sigma_data, *joined(*address[:4]), address[4])

    backward = staticmethod(_backward)


def _check_dense(y: Tensor, sigma: float | Tensor, sigma_data: float | None) -> Tensor:
    """Return sigma as levels. Raise unless y, sigma and sigma_data fit."""
    check_floating("y", y)
    if sigma_data is not None:
        check_sigma_data(sigma_data)
    return check_sigma(sigma, "y", y, compute_dtype(y.dtype))


def noised(
    y: Tensor, sigma: float | Tensor, sigma_data: float | None, seed: Number, offset: Number, rounds: int
) -> Tensor:
    """Check the arguments and return z, by whichever way serves this call."""
    if isinstance(y, Tensor) and direct(y, tensor_or_none(sigma)):
        return _directly(y, sigma, sigma_data, *checked(seed, offset, y.device), rounds)
    level = _check_dense(y, sigma, sigma_data)
    seed, offset = checked(seed, offset, y.device)
    if as_defined():
        return inject_noise_reference(y, level, sigma_data, seed, offset, rounds)
    if rounds == ROUNDS and not isinstance(seed, Tensor) and not isinstance(offset, Tensor):
        return torch.ops.dbkernels.inject_noise(y, level, sigma_data, signed(seed), offset)
    return torch.ops.dbkernels.inject_noise.at(y, level, sigma_data, *split(seed, offset), rounds)


def _directly(
    y: Tensor, sigma: float | Tensor, sigma_data: float | None, seed: Number, offset: Number, rounds: int
) -> Tensor:
    """What depends on the kind of input alone is checked once for each."""
    from dbkernels.triton.inject_noise import accepted

    levels = tensor_or_none(sigma)
    if levels is None:
        check_level(sigma)
    key = kind(y), kind(levels), sigma_data
    if key not in accepted:
        _check_dense(y, sigma, sigma_data)
        accepted.keep(key, True)
    if torch.is_grad_enabled() and (y.requires_grad or (levels is not None and levels.requires_grad)):
        return _Launched.apply(y, sigma, sigma_data, *split(seed, offset), rounds)
    return launched(y, sigma, sigma_data, seed, offset, rounds)
