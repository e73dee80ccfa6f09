"""Ops that noise a target by address: their registration and calls; z = c_in·(y + sigma·eps) for a dense y."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dbkernels._address import SCHEMA, Number, checked, define_at, joined, on_host, signed, split, tensor_or_none
from dbkernels._direct import direct, kind
from dbkernels._dtypes import compute_dtype
from dbkernels._levels import (
    as_defined,
    broadcast,
    check_floating,
    check_level,
    check_sigma,
    check_sigma_data,
)
from dbkernels._library import NAMESPACE, define, lib, register_triton
from dbkernels.philox import ROUNDS, normal_reference


@functools.cache
def _accepted() -> Any:
    """Return the table of the kinds of input that passed the checks; its module imports Triton."""
    from dbkernels.triton.launch import Kinds

    return Kinds()


class NoiseOp:
    """An op that noises a target, its overload `.at`, its gradient, and the call past the dispatcher.

    Args:
        name: of the op.
        schema: of its arguments before the address: the target's tensors, sigma, sigma_data, further options.
        definition, launch: the definition and the Triton launcher, of (*arguments, seed, offset, rounds).
        fake: the same for shapes alone.
        check: takes (target, sigma, *options), raises, and returns the arguments as the op takes them.
        setup_context, backward: the gradient of `.at`.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        definition: Callable[..., Tensor],
        fake: Callable[..., Tensor],
        launch: Callable[..., Tensor],
        check: Callable[..., tuple[Any, ...]],
        setup_context: Callable[..., None],
        backward: Callable[..., tuple[Any, ...]],
    ):
        self.name, self.definition, self.launch, self.check = name, definition, launch, check
        self.setup_context, self.backward = setup_context, backward
        define(f"{name}({schema}, SymInt seed, SymInt offset) -> Tensor", definition, fake)
        register_triton(name, launch)
        define_at(f"{name}.at({schema}, {SCHEMA}, int rounds) -> Tensor", self._definition_at, fake, self.launch_at)
        self.op = getattr(torch.ops.dbkernels, name)
        register = torch.library.register_autograd
        register(f"{NAMESPACE}::{name}", self._backward_of_ints, setup_context=self._setup_of_ints, lib=lib)
        register(f"{NAMESPACE}::{name}.at", backward, setup_context=setup_context, lib=lib)

    def _definition_at(self, *arguments: Any) -> Tensor:
        *given, seed_at, offset_at, seed, offset, rounds = arguments
        address = joined(seed_at, offset_at, seed, offset)
        if given[0].device.type == "cpu" and rounds == ROUNDS:
            return self.op.default(*given, *on_host(*address))
        return self.definition(*given, *address, rounds)

    def launch_at(self, *arguments: Any) -> Tensor:
        """Launch the Triton kernel with the arguments of `.at`."""
        *given, seed_at, offset_at, seed, offset, rounds = arguments
        return self.launch(*given, *joined(seed_at, offset_at, seed, offset), rounds)

    def _setup_of_ints(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        self.setup_context(ctx, (*inputs[:-2], None, None, *inputs[-2:], ROUNDS), output)

    def _backward_of_ints(self, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return self.backward(ctx, grad)[:-3]

    def __call__(
        self, target: tuple[Any, ...], sigma: float | Tensor, options: tuple[Any, ...], seed: Number, offset: Number,
        rounds: int,
    ) -> Tensor:  # fmt: skip
        """Check the arguments and return z, by the fastest way that serves this call.

        Args:
            target: tensors, the last floating. sigma: as for `inject_noise`. options: sigma_data and others.
            seed, offset, rounds: as for `inject_noise`.
        """
        levels = tensor_or_none(sigma)
        if isinstance(target[0], Tensor) and direct(*target, levels):
            return self._directly(target, sigma, levels, options, *checked(seed, offset, target[0].device), rounds)
        arguments = self.check(target, sigma, *options)
        seed, offset = checked(seed, offset, target[0].device)
        if as_defined():
            return self.definition(*arguments, seed, offset, rounds)
        if rounds == ROUNDS and not isinstance(seed, Tensor) and not isinstance(offset, Tensor):
            return self.op.default(*arguments, signed(seed), offset)
        return self.op.at(*arguments, *split(seed, offset), rounds)

    def _directly(
        self, target: tuple[Tensor, ...], sigma: Any, levels: Tensor | None, options: tuple[Any, ...], seed: Number,
        offset: Number, rounds: int,
    ) -> Tensor:  # fmt: skip
        if levels is None:
            check_level(sigma)
        accepted, key = _accepted(), (self.name, options, kind(levels), *map(kind, target))
        if key not in accepted:  # checks that depend on the kind of input alone run once per kind
            self.check(target, sigma, *options)
            accepted.keep(key, True)
        if torch.is_grad_enabled() and (target[-1].requires_grad or (levels is not None and levels.requires_grad)):
            return _Launched.apply(*target, sigma, *options, *split(seed, offset), rounds, self)
        return self.launch(*target, sigma, *options, seed, offset, rounds)


class _Launched(torch.autograd.Function):
    """The kernel past the dispatcher, where a gradient is needed. Last argument: the NoiseOp."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *given, ctx.op = arguments
        ctx.op.setup_context(ctx, given, None)
        return ctx.op.launch_at(*given)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return *ctx.op.backward(ctx, grad), None


def inject_noise_reference(
    y: Tensor, sigma: Tensor, sigma_data: float | None, seed: Number, offset: Number, rounds: int = ROUNDS
) -> Tensor:
    """Return z by the definition, differentiable in y and sigma. sigma: (), (B,) or (B, N), in the compute dtype."""
    dtype = compute_dtype(y.dtype)
    eps = normal_reference(y.shape, seed=seed, offset=offset, rounds=rounds, device=y.device).to(dtype)
    sigma = broadcast(sigma, y.dim())
    z = y.to(dtype) + sigma * eps
    if sigma_data is not None:
        z = z * torch.rsqrt(sigma * sigma + sigma_data * sigma_data)
    return z.to(y.dtype).contiguous()


def launched(
    y: Tensor,
    sigma: float | Tensor,
    sigma_data: float | None,
    seed: Number | None,
    offset: Number,
    rounds: int = ROUNDS,
) -> Tensor:
    """Return z by the Triton kernel. seed None: without noise, c_in·y."""
    from dbkernels.triton.inject_noise import launch

    y = y if y.is_contiguous() else y.contiguous()
    z = torch.empty_like(y)
    levels = sigma.contiguous() if isinstance(sigma, Tensor) else float(sigma)
    launch(y, levels, z, sigma_data, seed, offset, rounds)
    return z


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save what the gradients need. inputs: those of the overload `.at`."""
    y, sigma, ctx.sigma_data, seed_at, offset_at, ctx.seed, ctx.offset, ctx.rounds = inputs
    ctx.level = None if isinstance(sigma, Tensor) else sigma
    again = isinstance(sigma, Tensor) and sigma.requires_grad  # its gradient draws the noise again
    # Only sigma's gradient through c_in needs y: without it, the op keeps only the noise levels.
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
    """Return c_in·grad in grad's dtype: in one launch, or differentiable for a second derivative."""
    if not torch.is_grad_enabled() and direct(grad, tensor_or_none(sigma)):
        return launched(grad, sigma, sigma_data, None, 0)
    level = check_sigma(sigma, "grad", grad, compute_dtype(grad.dtype))
    return (grad * c_in(level, sigma_data, grad.dim())).to(grad.dtype)


def c_in(sigma: Tensor, sigma_data: float, dims: int) -> Tensor:
    """Return 1 / sqrt(sigma² + sigma_data²), to broadcast over `dims` dimensions."""
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
    """Return the gradient of sigma. y isn't needed without sigma_data; eps is drawn again.

    z = c·(y + s·eps) and dc/ds = -s·c^3, so dz/ds = c·eps - s·c^3·(y + s·eps)."""
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
    """Draw the eps of a z of `shape`, float32."""
    z = torch.empty(shape, dtype=torch.float32, device=device)
    seed, offset = checked(seed, offset, z.device)
    if direct(z):
        from dbkernels.triton.inject_noise import launch

        launch(None, 1.0, z, None, seed, offset, rounds)
        return z
    return noised((z.zero_(),), 1.0, (None,), seed, offset, rounds)


def _check(target: tuple[Tensor], sigma: float | Tensor, sigma_data: float | None) -> tuple[Any, ...]:
    """Return y, sigma as levels, and sigma_data. Raise unless they fit."""
    (y,) = target
    check_floating("y", y)
    if sigma_data is not None:
        check_sigma_data(sigma_data)
    return y, check_sigma(sigma, "y", y, compute_dtype(y.dtype)), sigma_data


noised = NoiseOp(
    "inject_noise",
    "Tensor y, Tensor sigma, float? sigma_data",
    inject_noise_reference,
    lambda y, *others: torch.empty(y.shape, dtype=y.dtype, device=y.device),
    launched,
    _check,
    _setup_context,
    _backward,
)
