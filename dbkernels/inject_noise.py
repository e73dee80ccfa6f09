"""inject_noise: z = c_in · (y + sigma·eps), with eps drawn by element index and never stored.

The definition first, then the op, its gradient and the public function. The kernels are
csrc/cpu/inject_noise.cpp and dbkernels/triton/inject_noise.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dbkernels._library import NAMESPACE, backend, define, lib, register_triton
from dbkernels.philox import check_address, normal_reference, signed


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic is float32 whatever the storage, but float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _broadcast(sigma: Tensor, dims: int) -> Tensor:
    """sigma (), (B,) or (B, N) with size-1 dimensions appended, to broadcast over `dims` dimensions."""
    return sigma.reshape(sigma.shape + (1,) * (dims - sigma.dim()))


def inject_noise_reference(y: Tensor, sigma: Tensor, sigma_data: float | None, seed: int, offset: int) -> Tensor:
    """The definition, differentiable in y and sigma. sigma: (), (B,) or (B, N), in y's compute dtype."""
    dtype = _compute_dtype(y.dtype)
    eps = normal_reference(y.shape, seed=seed % 2**64, offset=offset, device=y.device).to(dtype)
    sigma = _broadcast(sigma, y.dim())
    z = y.to(dtype) + sigma * eps
    if sigma_data is not None:
        z = z * torch.rsqrt(sigma * sigma + sigma_data * sigma_data)
    return z.to(y.dtype)


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
    ctx.dims = y.dim()
    # y is wanted only by sigma's gradient through c_in: without it, the op holds nothing but the noise
    # levels.
    keep_y = sigma.requires_grad and ctx.sigma_data is not None
    ctx.save_for_backward(sigma, y if keep_y else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    sigma, y = ctx.saved_tensors
    level = _broadcast(sigma, ctx.dims)
    c_in = None
    if ctx.sigma_data is not None:
        c_in = torch.rsqrt(level * level + ctx.sigma_data * ctx.sigma_data)
    grad_y = grad_sigma = None
    if ctx.needs_input_grad[0]:
        grad_y = grad if c_in is None else (grad * c_in).to(grad.dtype)
    if ctx.needs_input_grad[1]:
        # z = c·(y + s·eps), dc/ds = -s·c^3, so dz/ds = c·eps - s·c^3·(y + s·eps); eps is drawn again.
        eps = philox_normal(grad.shape, seed=ctx.seed % 2**64, offset=ctx.offset, device=grad.device)
        eps = eps.to(sigma.dtype)
        slope = eps
        if c_in is not None:
            slope = c_in * (eps - level * c_in * c_in * (y.to(sigma.dtype) + level * eps))
        grad_sigma = (grad.to(sigma.dtype) * slope).sum_to_size(level.shape).reshape(sigma.shape)
    return grad_y, grad_sigma, None, None, None


torch.library.register_autograd(f"{NAMESPACE}::inject_noise", _backward, setup_context=_setup_context, lib=lib)


def _check_y(y: Tensor) -> None:
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a torch.Tensor, got {type(y).__name__}")
    if not y.is_floating_point() or y.dtype.itemsize < 2:
        raise TypeError(f"y must be float16, bfloat16, float32 or float64, got {y.dtype}: cast it first")


def _check_sigma(sigma: float | Tensor, y: Tensor) -> Tensor:
    """sigma as a tensor of shape (), (B,) or (B, N), in the compute dtype and on y's device."""
    dtype = _compute_dtype(y.dtype)
    if isinstance(sigma, Tensor):
        return _check_sigma_tensor(sigma, y).to(dtype)
    if isinstance(sigma, bool) or not isinstance(sigma, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"sigma must be a float or a tensor, got {type(sigma).__name__}")
    if not 0.0 <= sigma < math.inf:
        raise ValueError(f"sigma={sigma} must be finite and not negative: it is a standard deviation")
    return torch.full((), sigma, dtype=dtype, device=y.device)


def _check_sigma_tensor(sigma: Tensor, y: Tensor) -> Tensor:
    if not sigma.is_floating_point():
        raise TypeError(f"sigma must be floating point, got {sigma.dtype}: cast it with .float()")
    if sigma.device != y.device:
        raise ValueError(f"sigma is on {sigma.device} and y on {y.device}: move sigma to y's device first")
    shape = tuple(sigma.shape)
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    fits = len(shape) <= min(2, y.dim()) and shape == tuple(y.shape[: len(shape)])
    trailing = all(size == 1 for size in shape[1:]) and shape[:1] == tuple(y.shape[:1])
    if fits:
        return sigma.reshape(shape)
    if trailing or sigma.numel() == 1:
        return sigma.reshape(shape[:1] if trailing else ())
    raise ValueError(
        f"sigma has shape {tuple(sigma.shape)}, which fits y of shape {tuple(y.shape)} neither as a scalar "
        f"nor per sample {tuple(y.shape[:1])} nor per token {tuple(y.shape[:2])}: give it one of these shapes"
    )


def _check_sigma_data(sigma_data: float | None) -> None:
    if sigma_data is None:
        return
    if isinstance(sigma_data, bool) or not isinstance(sigma_data, (int, float)):
        raise TypeError(f"sigma_data must be a float or None, got {type(sigma_data).__name__}")
    if not 0.0 < sigma_data < math.inf:
        raise ValueError(f"sigma_data={sigma_data} must be positive and finite: it is the target's std")


def inject_noise(
    y: Tensor, sigma: float | Tensor, *, sigma_data: float | None = None, seed: int, offset: int = 0
) -> Tensor:
    """Noise a target: z = y + sigma·eps, eps ~ N(0, 1); with `sigma_data`, z is scaled by c_in as the network
    wants it.

    eps is a function of (seed, offset, flat index) alone: the same on every device and for every memory
    layout of y. It is never stored; the gradients with respect to y and sigma draw it again where they need
    it.

    Args:
        y: clean target, any shape, float16, bfloat16, float32 or float64. Arithmetic is float32 (float64 for
            float64).
        sigma: noise std in y's units: a float, a 0-dim tensor, one per sample (B,) or one per token (B, N),
            broadcast over the trailing dimensions (which it may carry as ones). The values of a tensor aren't
            checked, as that would stop the device: a NaN or negative level shows in z.
        sigma_data: the target's std in the same units. If given, z is multiplied by
            c_in = 1 / sqrt(sigma² + sigma_data²).
        seed: in [0, 2^64); offset: in [0, 2^32), for example the step. Draw anew by changing either.

    Returns:
        z: contiguous, y's shape, dtype and device.

    Raises:
        TypeError: y or sigma isn't floating point; seed or offset isn't an int.
        ValueError: sigma's shape or device doesn't fit y's; a float sigma or sigma_data is out of range; seed
            or offset is out of range.

    Source: Karras et al. 2022 (EDM), table 1; Salmon et al. 2011 (Philox4x32-10).
    """
    _check_y(y)
    _check_sigma_data(sigma_data)
    check_address(seed, offset)
    level = _check_sigma(sigma, y)
    if backend() == "reference" and not torch.compiler.is_compiling():
        return inject_noise_reference(y, level, sigma_data, seed, offset)
    return torch.ops.dbkernels.inject_noise(y, level, sigma_data, signed(seed), offset)


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
