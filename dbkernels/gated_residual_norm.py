"""gated_residual_norm: h = x + gate·branch and the modulated norm of h, in one read and one write of each.

The definition first, then the op, its gradient and the public function. The kernels are csrc/cpu/ada_norm.cpp and
dbkernels/triton/ada_norm.py.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from dbkernels import _modulation as modulation
from dbkernels import _norm_plans as plans
from dbkernels._direct import direct
from dbkernels._dtypes import compute_dtype
from dbkernels._levels import as_defined
from dbkernels._library import define, register_triton

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
    """Return h, rounded to x's dtype, and its norm by the definition; gate, shift and scale broadcast against x."""
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
        ctx: Any, plan: Any, x: Tensor, branch: Tensor, gate: Tensor, shift: Maybe, scale: Maybe, weight: Maybe,
        bias: Maybe, eps: float, rms: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if plan is None:
            h, out, mean, rstd = torch.ops.dbkernels.gated_residual_norm.default(
                x, branch, gate, shift, scale, weight, bias, eps, rms
            )
        else:
            h, out, rstd = plan(x, branch, gate, shift, scale, weight, bias)
            mean = rstd  # one tensor holds both
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.eps, ctx.rms = plan, eps, rms
        ctx.shift = None if shift is None else (shift.shape, shift.dtype)
        # h, not x: it lives on as the next residual, so keeping it costs nothing
        ctx.save_for_backward(h, branch, gate, scale, weight, bias, mean, rstd)
        return h, out

    @staticmethod
    def backward(ctx: Any, grad_h: Maybe, grad: Maybe) -> tuple[Maybe, ...]:
        h, branch, gate, scale, weight, bias, mean, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:8]
        shift = ctx.shift if needs[3] else None
        grad = torch.zeros_like(h) if grad is None else grad
        if not modulation.differentiated(grad, grad_h):
            if ctx.plan is None:
                dx, dbranch, sums = torch.ops.dbkernels.gated_residual_norm_backward.default(
                    grad, grad_h, h, branch, gate, scale, weight, mean, rstd
                )
                d_gate = sums[2].to(gate.dtype) if needs[2] else None
                of_inputs = modulation.from_sums(sums, shift and shift[1], scale, weight, bias, needs[3:])
                return None, dx, dbranch, d_gate, *of_inputs, None, None
            if direct(grad, grad_h, h, branch, gate, scale, weight, bias):
                likes = plans.like(gate, needs[2]), shift, *map(plans.like, (scale, weight, bias), needs[4:])
                saved = h, branch, gate, scale, weight, bias
                grads = plans.gradients(ctx.plan, grad, grad_h, saved, rstd, likes)
                if grads is not None:
                    return None, *grads, None, None
        form = plans.forms(h, branch, gate, plans.stand_in(ctx.shift, h), scale)
        rows, branch_rows, gate_rows, _, scale_rows = form
        upstream = grad.reshape(rows.shape), None if grad_h is None else grad_h.reshape(rows.shape)
        mean, rstd = modulation.statistics(rows, ctx.eps, ctx.rms)
        dx, dbranch, sums = _backward(*upstream, rows, branch_rows, gate_rows, scale_rows, weight, mean, rstd)
        d_gate = sums[2].to(gate.dtype).reshape(gate.shape) if needs[2] else None
        of_inputs = modulation.from_sums(sums, shift and shift[1], scale_rows, weight, bias, needs[3:])
        of_inputs = plans.shaped(of_inputs, shift, scale)
        return None, dx.reshape(h.shape), dbranch.reshape(h.shape), d_gate, *of_inputs, None, None


def _checked(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Maybe, scale: Maybe, weight: Maybe, bias: Maybe, eps: float,
    norm: str,
) -> tuple[Any, ...]:  # fmt: skip
    """Return x, branch, gate, shift and scale in the kernels' form. Raise if an argument is wrong."""
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
    return rows, branch, gate, shift, scale


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
    """Add a gated residual, h = x + gate·branch, and normalise and modulate h: a DiT block's step before the MLP.

    Only h, branch, the modulation and two numbers per row are kept for the backward pass. Sums over rows are taken in a
    fixed order, so gradients repeat bit for bit.

    Args:
        x, branch: (..., D), D up to 16384; float16, bfloat16, float32 or float64. Arithmetic is
            float32 (float64 for float64). A branch of another dtype is cast to x's.
        gate: per sample, (B, D) or (B, 1, D), or per token, x's shape; any floating dtype.
        shift, scale: the same, or None.
        weight, bias: (D,), any floating dtype; or None. eps: added to the variance (the mean square for "rms").
        norm: "layer" or "rms" (which has no bias).

    Returns:
        (h, out), both of x's shape and dtype, contiguous.

    Raises:
        TypeError: an argument isn't a floating tensor.
        ValueError: a shape or device doesn't fit x's; eps is negative; norm is unknown, or "rms" with a bias.

    Source: Peebles and Xie 2023, section 3.2 (AdaLN-Zero).
    """
    given = x, branch, gate, shift, scale, weight, bias
    rms = norm == "rms"
    if isinstance(x, Tensor) and eps.__class__ is float and norm in NORMS and direct(*given):
        plan = plans.forward_plan(lambda: _checked(*given, eps, norm), eps, rms, *given)
        if plan:
            if plans.any_requires_grad(*given):
                return _GatedResidualNorm.apply(plan, *given, eps, rms)
            return plan(*given)[:2]
    rows, *rest = _checked(*given, eps, norm)
    arguments = rows, *rest, weight, bias, eps, rms
    if as_defined():
        h, out = gated_residual_norm_reference(*arguments)
    else:
        h, out = _GatedResidualNorm.apply(None, *arguments)
    return (h, out) if rows is x else (h.view(x.shape), out.view(x.shape))
