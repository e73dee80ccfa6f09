"""Shared by the modulated norms: checks, one form for the arguments, the definition, the sums of its gradients.

One form for the kernels: x is (O, I, D), and the modulation of sample o, (O, 1, D), serves its I rows. Per-sample
modulation of (B, N, D) is O = B; per-token modulation is O = B·N with one row each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dbkernels._dtypes import FLOATS, compute_dtype

LARGEST_DIM = 16384
_transform = torch._C._functorch.peek_interpreter_stack


def definition(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
) -> Tensor:
    """Normalise the rows of x, then ·weight + bias, then ·(1 + scale) + shift; all broadcast against x."""
    dtype = compute_dtype(x.dtype)
    wide = x.to(dtype)
    centred = wide if rms else wide - wide.mean(-1, keepdim=True)
    out = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    out = out if weight is None else out * weight.to(dtype)
    out = out if bias is None else out + bias.to(dtype)
    out = out if scale is None else out * (1 + scale.to(dtype))
    out = out if shift is None else out + shift.to(dtype)
    return out.to(x.dtype)


def check_x(name: str, x: Tensor, like: Tensor | None = None) -> None:
    """Raise unless x is a floating tensor of one dimension or more, or one that fits `like` (the residual)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}: cast it first")
    if x.dim() < 1 or not 1 <= x.shape[-1] <= LARGEST_DIM:
        raise ValueError(f"{name} must be (..., D) with D from 1 to {LARGEST_DIM}, got {tuple(x.shape)}")
    if like is not None and (x.shape != like.shape or x.device != like.device):
        raise ValueError(
            f"{name} is {tuple(x.shape)} on {x.device}, x is {tuple(like.shape)} on {like.device}: they must match"
        )


def check_affine(name: str, tensor: Tensor | None, x: Tensor) -> None:
    """Raise unless `tensor` is None or a floating (D,) on x's device."""
    if tensor is None:
        return
    _check_floating(name, tensor, x)
    if tensor.shape != x.shape[-1:]:
        raise ValueError(f"{name} must be ({x.shape[-1]},) as x is {tuple(x.shape)}, got {tuple(tensor.shape)}")


def check_eps(eps: float) -> None:
    """Raise unless eps is a finite number, zero or more."""
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a float, got {type(eps).__name__}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps={eps} must be zero or positive, and finite")


def _check_floating(name: str, tensor: Tensor, x: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a floating tensor or None, got {got}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: move it to x's device first")


def per_row(name: str, tensor: Tensor, x: Tensor) -> Tensor:
    """Reshape a modulation to x's dimensions: (B, D) of a (B, N, D) becomes (B, 1, D). Raise if it doesn't fit."""
    _check_floating(name, tensor, x)
    if tensor.dim() == 2 and x.dim() > 2 and tensor.shape == (x.shape[0], x.shape[-1]):
        return tensor.reshape(len(tensor), *[1] * (x.dim() - 2), tensor.shape[-1])
    fits = tensor.dim() == x.dim() and tensor.shape[-1] == x.shape[-1]
    if not fits or any(t not in (1, size) for t, size in zip(tensor.shape, x.shape, strict=True)):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, which fits x of shape {tuple(x.shape)} neither per sample "
            f"{(x.shape[0], x.shape[-1])} nor per token {tuple(x.shape)}: give it one of these shapes"
        )
    return tensor


def settled(x: Tensor, *modulation: Tensor | None) -> bool:
    """Return whether x is (B, N, D) and each modulation None or (B, 1, D) with x's dtype and device.

    Nothing is left to check or to reshape then, as in nearly every call of a layer; this takes a tenth of the checks'
    time."""
    if not isinstance(x, Tensor) or x.dim() != 3 or x.dtype not in FLOATS or not 1 <= x.shape[2] <= LARGEST_DIM:
        return False
    shape, dtype, device = (x.shape[0], 1, x.shape[2]), x.dtype, x.device
    for m in modulation:
        if m is not None and not (
            isinstance(m, Tensor) and m.dtype is dtype and m.shape == shape and m.device == device
        ):
            return False
    return True


def one_form(x: Tensor, modulation: list[Tensor | None]) -> tuple[Tensor, list[Tensor | None]]:
    """Return x as (O, I, D) and the modulation as (O, 1, D), by views where their strides allow it."""
    given = [m for m in modulation if m is not None]
    if x.dim() == 1:
        return x.view(1, 1, -1), [m if m is None else m.view(1, 1, -1) for m in modulation]
    B, D = x.shape[0], x.shape[-1]
    rows = math.prod(x.shape[:-1])  # never -1 in a shape: an empty tensor has any number of rows
    if not given:
        return (x if x.dim() == 3 else x.reshape(1, rows, D)), modulation
    if any(size != 1 for m in given for size in m.shape[1:-1]):  # per token
        whole = [m if m is None else m.expand(x.shape).reshape(rows, 1, D) for m in modulation]
        return x.reshape(rows, 1, D), whole
    if x.dim() == 3:
        return x, [m if m is None or m.shape[0] == B else m.expand(B, 1, D) for m in modulation]
    inner = math.prod(x.shape[1:-1])
    shared = [m if m is None else m.reshape(m.shape[0], 1, D).expand(B, 1, D) for m in modulation]
    return x.reshape(B, inner, D), shared


def statistics(x: Tensor, eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    """Compute mean (empty for RMS) and reciprocal standard deviation of each row of (O, I, D)."""
    wide = x.to(compute_dtype(x.dtype))
    if rms:
        return wide.new_empty(0), torch.rsqrt(wide.square().mean(-1) + eps)
    mean = wide.mean(-1)
    return mean, torch.rsqrt((wide - mean.unsqueeze(-1)).square().mean(-1) + eps)


def fake_statistics(x: Tensor, rms: bool) -> tuple[Tensor, Tensor]:
    """Return empty tensors with the shapes of `statistics`."""
    dtype = compute_dtype(x.dtype)
    return x.new_empty(0 if rms else x.shape[:2], dtype=dtype), x.new_empty(x.shape[:2], dtype=dtype)


def backward_definition(
    grad: Tensor, x: Tensor, scale: Tensor | None, weight: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, in the arithmetic's dtype, and two sums, (2, O, 1, D), from which the others follow.

    The sums are over each sample's rows, of grad and of grad times the normalised row."""
    wide, g = x.to(rstd.dtype), grad.to(rstd.dtype)
    normal = (wide if mean.numel() == 0 else wide - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    scaled = g if weight is None else g * weight.to(g.dtype)
    scaled = scaled if scale is None else scaled * (1 + scale.to(g.dtype))
    dx = scaled - normal * (scaled * normal).mean(-1, keepdim=True)
    if mean.numel():
        dx = dx - scaled.mean(-1, keepdim=True)
    return dx * rstd.unsqueeze(-1), torch.stack([g.sum(1, keepdim=True), (g * normal).sum(1, keepdim=True)])


def from_sums(
    sums: Tensor,
    shift_dtype: torch.dtype | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of shift, scale (O, 1, D), weight, bias (D,), each in its own dtype; None if not needed."""
    grad, normal, *_ = sums.unbind(0)  # each (O, 1, D)
    d_shift = d_scale = d_weight = d_bias = None
    if needs[0] and shift_dtype is not None:
        d_shift = _cast(grad, shift_dtype)
    if needs[1] and scale is not None:
        d_scale = normal if weight is None else normal * weight
        d_scale = _cast(d_scale if bias is None else d_scale + grad * bias, scale.dtype)
    affine = needs[2] or needs[3]
    factor = 1 + scale.to(sums.dtype) if affine and scale is not None else 1
    if needs[2] and weight is not None:
        d_weight = _cast((normal * factor).sum((0, 1)), weight.dtype)
    if needs[3] and bias is not None:
        d_bias = _cast((grad * factor).sum((0, 1)), bias.dtype)
    return d_shift, d_scale, d_weight, d_bias


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def differentiated(*upstream: Tensor | None) -> bool:
    """Return whether a backward pass is itself differentiated (create_graph) or batched (is_grads_batched); the
    ops have no rules for either."""
    if torch.compiler.is_compiling():
        return False
    # is_grads_batched isn't of torch.func: its tensors only lack a storage
    batched = any(grad is not None and not torch._C._has_storage(grad) for grad in upstream)
    return batched or torch.is_grad_enabled() or _transform() is not None


def triton_launcher(name: str) -> Callable[..., Any]:
    """Return launcher `name` of dbkernels.triton.ada_norm_launch, imported at its first call."""

    def launch(*args: Any) -> Any:
        from dbkernels.triton import ada_norm_launch

        return getattr(ada_norm_launch, name)(*args)

    return launch
