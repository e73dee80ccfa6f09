"""ada_layer_norm, ada_rms_norm: normalise each row, ·weight + bias, then AdaLN's ·(1 + scale) + shift, in one pass.

The definition is `_modulation.definition`. The kernels are csrc/cpu/ada_norm.cpp and dbkernels/triton/ada_norm.py.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from dbkernels import _modulation as modulation
from dbkernels import _norm_plans as plans
from dbkernels._direct import direct
from dbkernels._levels import as_defined
from dbkernels._library import define, register_triton

Maybe: TypeAlias = Tensor | None


def _forward(
    x: Tensor, shift: Maybe, scale: Maybe, weight: Maybe, bias: Maybe, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    out = modulation.definition(x, shift, scale, weight, bias, eps, rms).contiguous()
    return out, *modulation.statistics(x, eps, rms)


def _forward_fake(
    x: Tensor, shift: Maybe, scale: Maybe, weight: Maybe, bias: Maybe, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *modulation.fake_statistics(x, rms)


def _backward(
    grad: Tensor, x: Tensor, scale: Maybe, weight: Maybe, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    dx, sums = modulation.backward_definition(grad, x, scale, weight, mean, rstd)
    return dx.to(x.dtype).contiguous(), sums


def _backward_fake(
    grad: Tensor, x: Tensor, scale: Maybe, weight: Maybe, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), rstd.new_empty(2, x.shape[0], 1, x.shape[2])


define(
    "ada_norm(Tensor x, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, float eps, bool rms)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
define(
    "ada_norm_backward(Tensor grad, Tensor x, Tensor? scale, Tensor? weight, Tensor mean, Tensor rstd)"
    " -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
register_triton("ada_norm", modulation.triton_launcher("forward"))
register_triton("ada_norm_backward", modulation.triton_launcher("backward"))


class _AdaNorm(torch.autograd.Function):
    """The norm with its gradient. Not register_autograd: its calls take twice as long, which shows in small models."""

    @staticmethod
    def forward(
        ctx: Any, plan: Any, x: Tensor, shift: Maybe, scale: Maybe, weight: Maybe, bias: Maybe, eps: float, rms: bool
    ) -> Tensor:
        if plan is None:
            out, mean, rstd = torch.ops.dbkernels.ada_norm.default(x, shift, scale, weight, bias, eps, rms)
        else:
            _, out, rstd = plan(x, None, None, shift, scale, weight, bias)
            mean = rstd  # one tensor holds both
        ctx.plan, ctx.eps, ctx.rms = plan, eps, rms
        ctx.shift = None if shift is None else (shift.shape, shift.dtype)
        ctx.save_for_backward(x, scale, weight, bias, mean, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Maybe, ...]:
        x, scale, weight, bias, mean, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:6]
        shift = ctx.shift if needs[1] else None
        if not modulation.differentiated(grad):
            if ctx.plan is None:
                dx, sums = torch.ops.dbkernels.ada_norm_backward.default(grad, x, scale, weight, mean, rstd)
                of_inputs = modulation.from_sums(sums, shift and shift[1], scale, weight, bias, needs[1:])
                return None, dx, *of_inputs, None, None
            if direct(grad, x, scale, weight, bias):
                likes = None, shift, *map(plans.like, (scale, weight, bias), needs[2:])
                grads = plans.gradients(ctx.plan, grad, None, (x, None, None, scale, weight, bias), rstd, likes)
                if grads is not None:
                    return None, grads[0], *grads[3:], None, None
        rows, _, _, scale_rows = plans.forms(x, None, plans.stand_in(ctx.shift, x), scale)
        mean, rstd = modulation.statistics(rows, ctx.eps, ctx.rms)
        dx, sums = _backward(grad.reshape(rows.shape), rows, scale_rows, weight, mean, rstd)
        of_inputs = modulation.from_sums(sums, shift and shift[1], scale_rows, weight, bias, needs[1:])
        return None, dx.reshape(x.shape), *plans.shaped(of_inputs, shift, scale), None, None


def _checked(x: Tensor, shift: Maybe, scale: Maybe, weight: Maybe, bias: Maybe, eps: float) -> tuple[Any, ...]:
    """Return x, shift and scale in the kernels' form. Raise if an argument is wrong."""
    modulation.check_eps(eps)
    rows = x
    if not modulation.settled(x, shift, scale):
        modulation.check_x("x", x)
        shift = None if shift is None else modulation.per_row("shift", shift, x)
        scale = None if scale is None else modulation.per_row("scale", scale, x)
        rows, (shift, scale) = modulation.one_form(x, [shift, scale])
    modulation.check_affine("weight", weight, x)
    modulation.check_affine("bias", bias, x)
    return rows, shift, scale


def _norm(x: Tensor, shift: Maybe, scale: Maybe, weight: Maybe, bias: Maybe, eps: float, rms: bool) -> Tensor:
    given = shift, scale, weight, bias
    if isinstance(x, Tensor) and eps.__class__ is float and direct(x, *given):
        plan = plans.forward_plan(lambda: _checked(x, *given, eps), eps, rms, x, None, None, *given)
        if plan:
            if plans.any_requires_grad(x, *given):
                return _AdaNorm.apply(plan, x, *given, eps, rms)
            return plan(x, None, None, *given)[1]
    rows, shift, scale = _checked(x, *given, eps)
    if as_defined():
        out = modulation.definition(rows, shift, scale, weight, bias, eps, rms)
    else:
        out = _AdaNorm.apply(None, rows, shift, scale, weight, bias, eps, rms)
    return out if rows is x else out.view(x.shape)


def ada_layer_norm(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Apply modulated LayerNorm over the last dimension: (norm(x)·weight + bias)·(1 + scale) + shift.

    Only the inputs and two numbers per row are kept for the backward pass. The sums over rows behind the gradients of
    shift, scale, weight and bias are taken in a fixed order, so they repeat bit for bit.

    Args:
        x: (..., D), D up to 16384; float16, bfloat16, float32 or float64. Arithmetic is float32
            (float64 for float64). Any strides; no copy where the last one is 1.
        shift, scale: per sample, (B, D) or (B, 1, D), or per token, x's shape; any floating dtype; or None.
        weight, bias: (D,), any floating dtype; or None.
        eps: added to the variance.

    Returns:
        x's shape and dtype, contiguous.

    Raises:
        TypeError: an argument isn't a floating tensor.
        ValueError: a shape or device doesn't fit x's; eps is negative.

    Source: Ba et al. 2016 (LayerNorm); Peebles and Xie 2023, section 3.2 (AdaLN).
    """
    return _norm(x, shift, scale, weight, bias, eps, False)


def ada_rms_norm(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Apply modulated RMSNorm over the last dimension: x / rms(x)·weight·(1 + scale) + shift.

    Args, Returns, Raises: as for `ada_layer_norm`, with eps added to the mean square.

    Source: Zhang and Sennrich 2019 (RMSNorm); Peebles and Xie 2023, section 3.2 (AdaLN).
    """
    return _norm(x, shift, scale, weight, None, eps, True)
