"""inject_noise with y as rows of a table: gather, normalise and noise in one pass, and the table's gradient.

The definition, `inject_noise_table_reference`, and the public function, `inject_noise((indices, table), ...)`, are in
dbkernels/inject_noise.py. The kernels are csrc/cpu/inject_noise_table.cpp and dbkernels/triton/inject_noise_table.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dbkernels._library import NAMESPACE, define, lib, register_triton
from dbkernels.inject_noise import c_in, gather_rows, inject_noise_table_reference, sigma_gradient

LEAST_NORM = 1e-12  # as in torch.nn.functional.normalize


def _fake(
    indices: Tensor, table: Tensor, sigma: Tensor, sigma_data: float | None, normalize: bool, seed: int, offset: int
) -> Tensor:
    return table.new_empty((*indices.shape, table.shape[1]))


def _triton_kernel(
    indices: Tensor, table: Tensor, sigma: Tensor, sigma_data: float | None, normalize: bool, seed: int, offset: int
) -> Tensor:
    from dbkernels.triton.inject_noise_table import launch

    z = _fake(indices, table, sigma, sigma_data, normalize, seed, offset)
    launch(indices.contiguous(), table.contiguous(), sigma.contiguous(), z, sigma_data, normalize, seed, offset)
    return z


define(
    "inject_noise_table(Tensor indices, Tensor table, Tensor sigma, float? sigma_data, bool normalize, SymInt seed, "
    "SymInt offset) -> Tensor",
    inject_noise_table_reference,
    _fake,
)
register_triton("inject_noise_table", _triton_kernel)


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
    indices, table, sigma, ctx.sigma_data, ctx.normalize, ctx.seed, ctx.offset = inputs
    ctx.save_for_backward(indices, table, sigma)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    indices, table, sigma = ctx.saved_tensors
    grad_table = grad_sigma = None
    if ctx.needs_input_grad[1]:
        grad_table = torch.ops.dbkernels.inject_noise_table_grad(
            grad, indices, table, sigma, ctx.sigma_data, ctx.normalize
        )
    if ctx.needs_input_grad[2]:
        y = None if ctx.sigma_data is None else gather_rows(indices, table, ctx.normalize)
        grad_sigma = sigma_gradient(grad, y, sigma, ctx.sigma_data, ctx.seed, ctx.offset)
    return None, grad_table, grad_sigma, None, None, None, None


torch.library.register_autograd(f"{NAMESPACE}::inject_noise_table", _backward, setup_context=_setup_context, lib=lib)
