"""inject_noise: z = c_in · (y + sigma·eps), with eps drawn by element index and never stored.

The definition first, then the op, its gradient and the public function. The kernels are
csrc/cpu/inject_noise.cpp and dbkernels/triton/inject_noise.py; y as rows of a table is dbkernels/inject_noise_table.py.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from dbkernels._levels import broadcast, check_floating, check_sigma, check_sigma_data, compute_dtype, readable
from dbkernels._library import NAMESPACE, backend, define, lib, register_triton
from dbkernels.philox import check_address, normal_reference, signed


def inject_noise_reference(y: Tensor, sigma: Tensor, sigma_data: float | None, seed: int, offset: int) -> Tensor:
    """The definition, differentiable in y and sigma. sigma: (), (B,) or (B, N), in y's compute dtype."""
    dtype = compute_dtype(y.dtype)
    eps = normal_reference(y.shape, seed=seed % 2**64, offset=offset, device=y.device).to(dtype)
    sigma = broadcast(sigma, y.dim())
    z = y.to(dtype) + sigma * eps
    if sigma_data is not None:
        z = z * torch.rsqrt(sigma * sigma + sigma_data * sigma_data)
    return z.to(y.dtype)


def gather_rows(indices: Tensor, table: Tensor, normalize: bool) -> Tensor:
    """table[indices] in the compute dtype, at unit length if asked."""
    rows = table[indices].to(compute_dtype(table.dtype))
    return torch.nn.functional.normalize(rows, dim=-1) if normalize else rows


def inject_noise_table_reference(
    indices: Tensor, table: Tensor, sigma: Tensor, sigma_data: float | None, normalize: bool, seed: int, offset: int
) -> Tensor:
    """The definition with y as rows of a table, differentiable in table and sigma: rounded once."""
    z = inject_noise_reference(gather_rows(indices, table, normalize), sigma, sigma_data, seed, offset)
    return z.to(table.dtype)


def _fake(y: Tensor, sigma: Tensor, sigma_data: float | None, seed: int, offset: int) -> Tensor:
    return torch.empty(y.shape, dtype=y.dtype, device=y.device)


def _definition(y: Tensor, sigma: Tensor, sigma_data: float | None, seed: int, offset: int) -> Tensor:
    return inject_noise_reference(y, sigma, sigma_data, seed, offset).contiguous()


define(
    "inject_noise(Tensor y, Tensor sigma, float? sigma_data, SymInt seed, SymInt offset) -> Tensor",
    _definition,
    _fake,
)


def _triton_kernel(y: Tensor, sigma: Tensor, sigma_data: float | None, seed: int, offset: int) -> Tensor:
    from dbkernels.triton.inject_noise import launch

    z = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    launch(y.contiguous(), sigma.contiguous(), z, sigma_data, seed % 2**64, offset)
    return z


register_triton("inject_noise", _triton_kernel)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, sigma, ctx.sigma_data, ctx.seed, ctx.offset = inputs
    # y is wanted only by sigma's gradient through c_in: without it, the op holds nothing but the noise
    # levels.
    keep_y = sigma.requires_grad and ctx.sigma_data is not None
    ctx.save_for_backward(sigma, y if keep_y else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    sigma, y = ctx.saved_tensors
    grad_y = grad_sigma = None
    if ctx.needs_input_grad[0]:
        grad_y = grad if ctx.sigma_data is None else (grad * c_in(sigma, ctx.sigma_data, grad.dim())).to(grad.dtype)
    if ctx.needs_input_grad[1]:
        grad_sigma = sigma_gradient(grad, y, sigma, ctx.sigma_data, ctx.seed, ctx.offset)
    return grad_y, grad_sigma, None, None, None


def c_in(sigma: Tensor, sigma_data: float, dims: int) -> Tensor:
    """1 / sqrt(sigma² + sigma_data²), to broadcast over `dims` dimensions."""
    level = broadcast(sigma, dims)
    return torch.rsqrt(level * level + sigma_data * sigma_data)


def sigma_gradient(
    grad: Tensor, y: Tensor | None, sigma: Tensor, sigma_data: float | None, seed: int, offset: int
) -> Tensor:
    """The gradient of sigma: z = c·(y + s·eps), dc/ds = -s·c^3, so dz/ds = c·eps - s·c^3·(y + s·eps); eps is drawn
    again. y isn't needed without sigma_data."""
    level = broadcast(sigma, grad.dim())
    slope = philox_normal(grad.shape, seed=seed % 2**64, offset=offset, device=grad.device).to(sigma.dtype)
    if sigma_data is not None:
        assert y is not None
        c = c_in(sigma, sigma_data, grad.dim())
        slope = c * (slope - level * c * c * (y.to(sigma.dtype) + level * slope))
    return (grad.to(sigma.dtype) * slope).sum_to_size(level.shape).reshape(sigma.shape)


torch.library.register_autograd(f"{NAMESPACE}::inject_noise", _backward, setup_context=_setup_context, lib=lib)


def _check_rows(rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(indices, table) with int64 indices. Their values are checked on the CPU, where that stops nothing."""
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
    return indices.long(), table


Rows = tuple[Tensor, Tensor]


@overload
def inject_noise(
    y: Tensor | Rows, sigma: float | Tensor, *, sigma_data: float | None = None, normalize: bool = False,
    return_c_noise: Literal[False] = False, seed: int, offset: int = 0,
) -> Tensor: ...  # fmt: skip
@overload
def inject_noise(
    y: Tensor | Rows, sigma: float | Tensor, *, sigma_data: float | None = None, normalize: bool = False,
    return_c_noise: Literal[True], seed: int, offset: int = 0,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def inject_noise(
    y: Tensor | Rows,
    sigma: float | Tensor,
    *,
    sigma_data: float | None = None,
    normalize: bool = False,
    return_c_noise: bool = False,
    seed: int,
    offset: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Noise a target: z = y + sigma·eps, eps ~ N(0, 1); with `sigma_data`, z is scaled by c_in as the network
    wants it.

    eps is a function of (seed, offset, flat index in z) alone: the same on every device and for every memory
    layout of y. It is never stored; the gradients with respect to y and sigma draw it again where they need
    it.

    Args:
        y: clean target, any shape, float16, bfloat16, float32 or float64. Arithmetic is float32 (float64 for
            float64). Or (indices, table), for y = table[indices] without storing it: indices int64 or int32 of any
            shape, table (K, d); the table gets the gradient, summed in the order of the indices. On the CPU an index
            outside [0, K) raises; on a GPU, and within torch.compile, its row of z is NaN, since checking would stop
            the device.
        sigma: noise std in y's units: a float, a 0-dim tensor, one per sample (B,) or one per token (B, N),
            broadcast over the trailing dimensions (which it may carry as ones); with a table, per index. The values
            of a tensor aren't checked, as that would stop the device: a NaN or negative level shows in z.
        sigma_data: the target's std in the same units. If given, z is multiplied by
            c_in = 1 / sqrt(sigma² + sigma_data²).
        normalize: bring the table's rows to unit length, as torch.nn.functional.normalize does, and the gradient
            through it. Off by default: a fixed codebook is normalised once.
        return_c_noise: also return c_noise = ln(sigma)/4, what the network is told of the level.
        seed: in [0, 2^64); offset: in [0, 2^32), for example the step. Draw anew by changing either.

    Returns:
        z: contiguous, y's shape (with a table, the indices' and d), dtype and device. With return_c_noise, (z,
        c_noise): the latter float32, of sigma's shape, -inf where sigma is 0.

    Raises:
        TypeError: y, table or sigma isn't floating point; indices aren't integers; seed or offset isn't an int.
        ValueError: sigma's shape or device doesn't fit y's; table isn't (K, d); an index is outside [0, K); normalize
            without a table; a float sigma or sigma_data is out of range; seed or offset is out of range.

    Source: Karras et al. 2022 (EDM), table 1; Salmon et al. 2011 (Philox4x32-10).
    """
    if sigma_data is not None:
        check_sigma_data(sigma_data)
    check_address(seed, offset)
    plain = backend() == "reference" and not torch.compiler.is_compiling()
    if isinstance(y, tuple):
        indices, table = _check_rows(y)
        level = check_sigma(sigma, "indices", indices, compute_dtype(table.dtype))
        op: Any = inject_noise_table_reference if plain else torch.ops.dbkernels.inject_noise_table
        z = op(indices, table, level, sigma_data, normalize, signed(seed), offset)
    else:
        check_floating("y", y)
        if normalize:
            raise ValueError("normalize=True needs y as (indices, table): normalise a target before noising it")
        level = check_sigma(sigma, "y", y, compute_dtype(y.dtype))
        op = inject_noise_reference if plain else torch.ops.dbkernels.inject_noise
        z = op(y, level, sigma_data, signed(seed), offset)
    if not return_c_noise:
        return z
    return z, (level.log() / 4).float().reshape(sigma.shape if isinstance(sigma, Tensor) else ())


def philox_normal(
    shape: int | tuple[int, ...], *, seed: int, offset: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """Standard normals by address, float32: exactly the eps of `inject_noise` at the same (seed, offset).

    Args:
        shape: of the result; seed, offset, device: as for `philox_uniform`.

    Returns:
        float32 of `shape`.

    Raises:
        TypeError, ValueError: seed or offset isn't an int in its range.

    Source: Salmon et al. 2011; Box and Muller 1958.
    """
    return inject_noise(torch.zeros(shape, device=device, dtype=torch.float32), 1.0, seed=seed, offset=offset)
