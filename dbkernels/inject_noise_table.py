"""inject_noise with y as rows of a table: gather, normalise and noise in one pass, and the table's gradient.

The public function is `inject_noise((indices, table), ...)` in dbkernels/inject_noise.py. The kernels are
csrc/cpu/inject_noise_table.cpp and dbkernels/triton/inject_noise_table.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dbkernels._address import Number, joined, tensor_or_none
from dbkernels._dtypes import compute_dtype
from dbkernels._inject_noise import NoiseOp, c_in, inject_noise_reference, sigma_gradient
from dbkernels._levels import check_floating, check_sigma, check_sigma_data, readable
from dbkernels._library import define, register_triton
from dbkernels.philox import ROUNDS

LEAST_NORM = 1e-12  # as in torch.nn.functional.normalize


def gather_rows(indices: Tensor, table: Tensor, normalize: bool) -> Tensor:
    """Return table[indices] in the compute dtype, with `normalize` at unit length."""
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
    """Return z by the definition with y as rows of a table, differentiable in table and sigma, rounded once."""
    z = inject_noise_reference(gather_rows(indices, table, normalize), sigma, sigma_data, seed, offset, rounds)
    return z.to(table.dtype).contiguous()


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


def row_sums(grad: Tensor, indices: Tensor, count: int, sigma: Tensor, sigma_data: float | None) -> Tensor:
    """Sum c_in·grad over the positions of each index: (count, d), in sigma's dtype."""
    scaled = grad.to(sigma.dtype)
    if sigma_data is not None:
        scaled = scaled * c_in(sigma, sigma_data, grad.dim())
    sums = torch.zeros(count, grad.shape[-1], dtype=sigma.dtype, device=grad.device)
    return sums.index_add_(0, indices.flatten(), scaled.reshape(-1, grad.shape[-1]))


def through_norm(sums: Tensor, table: Tensor) -> Tensor:
    """Return the gradient of the table from that of its normalised rows n: (G - n (n·G)) / |row|."""
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
    """Save what the gradients need. inputs: those of the overload `.at`."""
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


def _check_rows(rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Check and return (indices, table). The indices' values are checked on the CPU only, without a device sync."""
    indices, table = rows
    check_floating("table", table)
    if table.dim() != 2 or 0 in table.shape:
        raise ValueError(f"table must be (K, d) and not empty, got shape {tuple(table.shape)}")
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"indices must be an int64 or int32 tensor, got {getattr(indices, 'dtype', type(indices))}")
    if indices.device != table.device:
        raise ValueError(f"indices are on {indices.device} and table on {table.device}: move them to one device")
    if readable(indices):
        low, high = torch.stack(indices.aminmax()).tolist()
        if low < 0 or high >= len(table):
            raise ValueError(f"indices go from {low} to {high}, and table has rows 0 to {len(table) - 1}")
    return indices, table


def _check(
    rows: tuple[Tensor, Tensor], sigma: float | Tensor, sigma_data: float | None, normalize: bool
) -> tuple[Any, ...]:
    indices, table = _check_rows(rows)
    if sigma_data is not None:
        check_sigma_data(sigma_data)
    level = check_sigma(sigma, "indices", indices, compute_dtype(table.dtype))
    return indices.long(), table, level, sigma_data, normalize


noised_rows = NoiseOp(
    "inject_noise_table",
    "Tensor indices, Tensor table, Tensor sigma, float? sigma_data, bool normalize",
    inject_noise_table_reference,
    lambda indices, table, *others: table.new_empty((*indices.shape, table.shape[1])),
    _launch,
    _check,
    _setup_context,
    _backward,
)
