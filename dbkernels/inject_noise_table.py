"""inject_noise with y as rows of a table: gather, normalise and noise in one pass, and the table's gradient.

The public function is `inject_noise((indices, table), ...)` in dbkernels/inject_noise.py. The kernels are
csrc/cpu/inject_noise_table.cpp and dbkernels/triton/inject_noise_table.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dbkernels._address import SCHEMA, Number, checked, define_at, joined, on_host, signed, split, tensor_or_none
from dbkernels._direct import direct, kind
from dbkernels._inject_noise import c_in, inject_noise_reference, sigma_gradient
from dbkernels._levels import (
    as_defined,
    check_floating,
    check_level,
    check_sigma,
    check_sigma_data,
    compute_dtype,
    readable,
)
from dbkernels._library import NAMESPACE, define, lib, register_triton
from dbkernels.philox import ROUNDS

LEAST_NORM = 1e-12  # as in torch.nn.functional.normalize


def gather_rows(indices: Tensor, table: Tensor, normalize: bool) -> Tensor:
    """table[indices] in the compute dtype, at unit length if asked."""
    rows = table[indices].to(compute_dtype(table.dtype))
    return torch.nn.functional.normalize(rows, dim=-1) if normalize else rows


def inject_noise_table_reference(
    indices: Tensor,
    table: Tensor,
    sigma: Tensor,
    sigma_data: float | None,
    normalize: bool,
    seed: Number,
    offset: Number,
    rounds: int = ROUNDS,
) -> Tensor:
    """The definition with y as rows of a table, differentiable in table and sigma: rounded once."""
    z = inject_noise_reference(gather_rows(indices, table, normalize), sigma, sigma_data, seed, offset, rounds)
    return z.to(table.dtype).contiguous()


def _fake(indices: Tensor, table: Tensor, *others: Any) -> Tensor:
    return table.new_empty((*indices.shape, table.shape[1]))


def _definition_at(
    indices: Tensor, table: Tensor, sigma: Tensor, sigma_data: float | None, normalize: bool, *address: Any
) -> Tensor:
    (seed, offset), rounds = joined(*address[:4]), address[4]
    if table.device.type == "cpu" and rounds == ROUNDS:
        op: Any = torch.ops.dbkernels.inject_noise_table
        return op(indices, table, sigma, sigma_data, normalize, *on_host(seed, offset))
    return inject_noise_table_reference(indices, table, sigma, sigma_data, normalize, seed, offset, rounds)


def _launch(
    indices: Tensor,
    table: Tensor,
    sigma: float | Tensor,
    sigma_data: float | None,
    normalize: bool,
    seed: Number,
    offset: Number,
    rounds: int = ROUNDS,
) -> Tensor:
    from dbkernels.triton.inject_noise_table import launch

    z = table.new_empty((*indices.shape, table.shape[1]))
    levels = sigma.contiguous() if isinstance(sigma, Tensor) else float(sigma)
    launch(indices.contiguous(), table.contiguous(), levels, z, sigma_data, normalize, seed, offset, rounds)
    return z


def _launch_at(*arguments: Any) -> Tensor:
    indices, table, sigma, sigma_data, normalize, *address, rounds = arguments
    seed, offset = joined(*address)
    return _launch(indices, table, sigma, sigma_data, normalize, seed, offset, rounds)


_ARGUMENTS = "Tensor indices, Tensor table, Tensor sigma, float? sigma_data, bool normalize"
define(
    f"inject_noise_table({_ARGUMENTS}, SymInt seed, SymInt offset) -> Tensor",
    inject_noise_table_reference,
    _fake,
)
register_triton("inject_noise_table", _launch)
define_at(
    f"inject_noise_table.at({_ARGUMENTS}, {SCHEMA}, int rounds) -> Tensor",
    _definition_at,
    _fake,
    _launch_at,
)


def row_sums(grad: Tensor, indices: Tensor, count: int, sigma: Tensor, sigma_data: float | None) -> Tensor:
    """Sum of c_in·grad over the places of each index: (count, d), in sigma's dtype."""
    scaled = grad.to(sigma.dtype)
    if sigma_data is not None:
        scaled = scaled * c_in(sigma, sigma_data, grad.dim())
    sums = torch.zeros(count, grad.shape[-1], dtype=sigma.dtype, device=grad.device)
    return sums.index_add_(0, indices.flatten(), scaled.reshape(-1, grad.shape[-1]))


def through_norm(sums: Tensor, table: Tensor) -> Tensor:
    """The gradient of the table from that of its normalised rows n: (G - n (n·G)) / |row|."""
    rows = table.to(sums.dtype)
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    unit = rows / norm.clamp(min=LEAST_NORM)
    along = torch.where(norm > LEAST_NORM, (unit * sums).sum(-1, keepdim=True), 0)
    return (sums - unit * along) / norm.clamp(min=LEAST_NORM)


def _grad_definition(
    grad: Tensor, indices: Tensor, table: Tensor, sigma: Tensor, sigma_data: float | None, normalize: bool
) -> Tensor:
    sums = row_sums(grad, indices, len(table), sigma, sigma_data)
    return (through_norm(sums, table) if normalize else sums).to(table.dtype)


def _triton_grad(
    grad: Tensor, indices: Tensor, table: Tensor, sigma: Tensor, sigma_data: float | None, normalize: bool
) -> Tensor:
    from dbkernels.triton.inject_noise_table import launch_sums

    sums = launch_sums(grad.contiguous(), indices, len(table), sigma.contiguous(), sigma_data)
    return (through_norm(sums, table) if normalize else sums).to(table.dtype)


define(
    "inject_noise_table_grad(Tensor grad, Tensor indices, Tensor table, Tensor sigma, float? sigma_data, "
    "bool normalize) -> Tensor",
    _grad_definition,
    lambda grad, indices, table, sigma, sigma_data, normalize: table.new_empty(table.shape),
)
register_triton("inject_noise_table_grad", _triton_grad)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """inputs: those of the overload `.at`."""
    indices, table, sigma, ctx.sigma_data, ctx.normalize, seed_at, offset_at, ctx.seed, ctx.offset, ctx.rounds = inputs
    ctx.level = None if isinstance(sigma, Tensor) else sigma
    again = isinstance(sigma, Tensor) and sigma.requires_grad  # its gradient draws the noise again
    drawn_by = (seed_at, offset_at) if again else (None, None)
    ctx.save_for_backward(indices, table, tensor_or_none(sigma), *drawn_by)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    indices, table, sigma, seed_at, offset_at = ctx.saved_tensors
    sigma = ctx.level if sigma is None else sigma
    grad_table = grad_sigma = None
    if ctx.needs_input_grad[1]:
        grad_table = _grad_of_table(grad, indices, table, sigma, ctx.sigma_data, ctx.normalize)
    if ctx.needs_input_grad[2]:
        y = None if ctx.sigma_data is None else gather_rows(indices, table, ctx.normalize)
        address = joined(seed_at, offset_at, ctx.seed, ctx.offset)
        grad_sigma = sigma_gradient(grad, y, sigma, ctx.sigma_data, *address, ctx.rounds)
    return None, grad_table, grad_sigma, *[None] * 7


def _grad_of_table(
    grad: Tensor, indices: Tensor, table: Tensor, sigma: Any, sigma_data: float | None, normalize: bool
) -> Tensor:
    level = check_sigma(sigma, "indices", indices, compute_dtype(table.dtype))
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # for a second derivative
        return _grad_definition(grad, indices, table, level, sigma_data, normalize)
    return torch.ops.dbkernels.inject_noise_table_grad(grad, indices, table, level, sigma_data, normalize)


def _setup_context_of_ints(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _setup_context(ctx, (*inputs[:5], None, None, *inputs[5:], ROUNDS), output)


def _backward_of_ints(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(ctx, grad)[:7]


torch.library.register_autograd(
    f"{NAMESPACE}::inject_noise_table", _backward_of_ints, setup_context=_setup_context_of_ints, lib=lib
)
torch.library.register_autograd(f"{NAMESPACE}::inject_noise_table.at", _backward, setup_context=_setup_context, lib=lib)


class _Launched(torch.autograd.Function):
    """The kernel past the dispatcher, where a gradient is wanted."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        _setup_context(ctx, arguments, arguments[1])
        return _launch_at(*arguments)

    backward = staticmethod(_backward)


def _check_rows(rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(indices, table) checked. The indices' values are checked on the CPU, where that stops nothing."""
    if len(rows) != 2:
        raise ValueError(f"y as rows of a table must be (indices, table), got {len(rows)} items")
    indices, table = rows
    check_floating("table", table)
    if table.dim() != 2 or 0 in table.shape:
        raise ValueError(f"table must be (K, d) and not empty, got shape {tuple(table.shape)}")
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"indices must be an int64 or int32 tensor, got {getattr(indices, 'dtype', type(indices))}")
    if indices.device != table.device:
        raise ValueError(f"indices are on {indices.device} and table on {table.device}: move them to one device")
    if readable(indices):
        low, high = (int(end) for end in indices.aminmax())
        if low < 0 or high >= len(table):
            raise ValueError(f"indices go from {low} to {high}, and table has rows 0 to {len(table) - 1}")
    return indices, table


def noised_rows(
    rows: tuple[Tensor, Tensor],
    sigma: float | Tensor,
    sigma_data: float | None,
    normalize: bool,
    seed: Number,
    offset: Number,
    rounds: int,
) -> Tensor:
    """Check the arguments and return z, by whichever way serves this call."""
    if len(rows) == 2 and isinstance(rows[1], Tensor) and direct(rows[1], rows[0], tensor_or_none(sigma)):
        return _directly(*rows, sigma, sigma_data, normalize, *checked(seed, offset, rows[1].device), rounds)
    indices, table, level = _check(rows, sigma, sigma_data)
    seed, offset = checked(seed, offset, table.device)
    arguments = indices.long(), table, level, sigma_data, normalize
    if as_defined():
        return inject_noise_table_reference(*arguments, seed, offset, rounds)
    if rounds == ROUNDS and not isinstance(seed, Tensor) and not isinstance(offset, Tensor):
        return torch.ops.dbkernels.inject_noise_table(*arguments, signed(seed), offset)
    return torch.ops.dbkernels.inject_noise_table.at(*arguments, *split(seed, offset), rounds)


def _check(
    rows: tuple[Tensor, Tensor], sigma: float | Tensor, sigma_data: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    indices, table = _check_rows(rows)
    if sigma_data is not None:
        check_sigma_data(sigma_data)
    return indices, table, check_sigma(sigma, "indices", indices, compute_dtype(table.dtype))


def _directly(
    indices: Tensor,
    table: Tensor,
    sigma: float | Tensor,
    sigma_data: float | None,
    normalize: bool,
    seed: Number,
    offset: Number,
    rounds: int,
) -> Tensor:
    """What depends on the kind of input alone is checked once for each."""
    from dbkernels.triton.inject_noise_table import accepted

    levels = tensor_or_none(sigma)
    if levels is None:
        check_level(sigma)
    key = kind(indices), kind(table), kind(levels), sigma_data
    if key not in accepted:
        _check((indices, table), sigma, sigma_data)
        accepted.keep(key, True)
    arguments = indices, table, sigma, sigma_data, normalize
    if torch.is_grad_enabled() and (table.requires_grad or (levels is not None and levels.requires_grad)):
        return _Launched.apply(*arguments, *split(seed, offset), rounds)
    return _launch(*arguments, seed, offset, rounds)
