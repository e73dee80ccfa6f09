"""gated_residual_norm: h = x + gate·branch and the modulated norm of h, in one read and one write of each.

The definition first, then the op, its gradient and the public function. The kernels are csrc/cpu/ada_norm.cpp and
dbkernels/triton/ada_norm.py.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dbkernels import _modulation as modulation
from dbkernels._levels import compute_dtype
from dbkernels._library import backend, define, register_triton

Maybe: TypeAlias = Tensor | None
NORMS = ("layer", "rms")


def gated_residual_norm_reference(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Maybe,
    scale: Maybe,
    weight: Maybe,
    bias: Maybe,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor]:
    """The definition: h, rounded to x's dtype, and its norm; gate, shift and scale broadcast against x."""
    dtype = compute_dtype(x.dtype)
    h = (x.to(dtype) + gate.to(dtype) * branch.to(dtype)).to(x.dtype)
    return h, modulation.definition(h, shift, scale, weight, bias, eps, rms)


def _forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h, out = gated_residual_norm_reference(x, *rest)
    return h.contiguous(), out.contiguous(), *modulation.statistics(h, *rest[-2:])


def _forward_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), *modulation.fake_statistics(x, rest[-1])


def _backward(
    grad: Tensor,
    grad_h: Maybe,
    h: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Maybe,
    weight: Maybe,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, sums = modulation.backward_definition(grad, h, scale, weight, mean, rstd)
    dx = dx if grad_h is None else dx + grad_h.to(dx.dtype)
    gated = (dx * branch.to(dx.dtype)).sum(1, keepdim=True)
    dbranch = (dx * gate.to(dx.dtype)).to(h.dtype)
    return dx.to(h.dtype).contiguous(), dbranch.contiguous(), torch.cat([sums, gated.unsqueeze(0)])


def _backward_fake(grad: Tensor, grad_h: Maybe, h: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(h.shape), rest[-1].new_empty(3, h.shape[0], 1, h.shape[2])


define(
    "gated_residual_norm(Tensor x, Tensor branch, Tensor gate, Tensor? shift, Tensor? scale, Tensor? weight, "
    "Tensor? bias, float eps, bool rms) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
define(
    "gated_residual_norm_backward(Tensor grad, Tensor? grad_h, Tensor h, Tensor branch, Tensor gate, Tensor? scale, "
    "Tensor? weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
register_triton("gated_residual_norm", modulation.triton_launcher("gated_forward"))
register_triton("gated_residual_norm_backward", modulation.triton_launcher("gated_backward"))


class _GatedResidualNorm(torch.autograd.Function):
    """The op with its gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, gate: Tensor, shift: Maybe, scale: Maybe, weight: Maybe, bias: Maybe,
        eps: float, rms: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        h, out, mean, rstd = torch.ops.dbkernels.gated_residual_norm.default(
            x, branch, gate, shift, scale, weight, bias, eps, rms
        )
        ctx.set_materialize_grads(False)
        ctx.shift_dtype = None if shift is None else shift.dtype
        # h, not x: it lives on as the next residual, so keeping it costs nothing
        ctx.save_for_backward(h, branch, gate, scale, weight, bias, mean, rstd)
        return h, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Maybe, grad: Maybe) -> tuple[Maybe, ...]:
        h, branch, gate, scale, weight, bias, mean, rstd = ctx.saved_tensors
        grad = torch.zeros_like(h) if grad is None else grad
        dx, dbranch, sums = torch.ops.dbkernels.gated_residual_norm_backward.default(
            grad, grad_h, h, branch, gate, scale, weight, mean, rstd
        )
        dgate = sums[2].to(gate.dtype) if ctx.needs_input_grad[2] else None
        rest = modulation.from_sums(sums, ctx.shift_dtype, scale, weight, bias, ctx.needs_input_grad[3:7])
        return dx, dbranch, dgate, *rest, None, None


def gated_residual_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "layer",
) -> tuple[Tensor, Tensor]:
    """What a DiT block does between attention and MLP: h = x + gate·branch, and h normalised and modulated.

    For the backward pass h, branch, the modulation and two numbers a row are kept. Sums over rows are taken in a fixed
    order, so gradients repeat bit for bit.

    Args:
        x, branch: (..., D), two dimensions or more, D up to 16384; float16, bfloat16, float32 or float64. Arithmetic is
            float32 (float64 for float64). A branch of another dtype is cast to x's.
        gate: per sample, (B, D) or (B, 1, D), or per token, x's shape; any floating dtype.
        shift, scale: the same, or None.
        weight, bias: (D,), any floating dtype; or None. eps: added to the variance (the mean square for "rms").
        norm: "layer" or "rms" (which has no bias).

    Returns:
        (h, out), both of x's shape and dtype, contiguous.

    Raises:
        TypeError: an argument isn't a floating tensor. ValueError: a shape or device doesn't fit x's; eps is negative;
            norm is unknown, or "rms" with a bias.

    Source: Peebles and Xie 2023, section 3.2 (AdaLN-Zero).
    """
    modulation.check_eps(eps)
    if norm not in NORMS or (norm == "rms" and bias is not None):
        raise ValueError(f'norm must be "layer", or "rms" without a bias, got {norm!r}')
    modulation.check_x("x", x)
    modulation.check_x("branch", branch, x)
    rows, branch = x, branch.to(x.dtype)
    if not modulation.settled(x, gate, shift, scale) or gate is None:
        gate = modulation.per_row("gate", gate, x)
        shift = None if shift is None else modulation.per_row("shift", shift, x)
        scale = None if scale is None else modulation.per_row("scale", scale, x)
        rows, (gate, shift, scale) = modulation.one_form(x, [gate, shift, scale])
        branch = branch.reshape(rows.shape)
    modulation.check_affine("weight", weight, x)
    modulation.check_affine("bias", bias, x)
    arguments = rows, branch, gate, shift, scale, weight, bias, eps, norm == "rms"
    if backend() == "reference" and not torch.compiler.is_compiling():
        h, out = gated_residual_norm_reference(*arguments)
    else:
        h, out = _GatedResidualNorm.apply(*arguments)
    return (h, out) if rows is x else (h.view(x.shape), out.view(x.shape))
