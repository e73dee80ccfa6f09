"""The modulated norms past the dispatcher: look up the plan of dbkernels.triton.ada_norm_launch for a call.

The key is dtypes, shapes, strides and device of all tensors; arguments are checked when a plan is prepared. It takes
the tensors as they are, so False is kept for kinds that would have to be copied, expanded or summed first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dbkernels._direct import kind
from dbkernels._modulation import one_form, per_row

Maybe: TypeAlias = Tensor | None
Plan: TypeAlias = Any
Like: TypeAlias = tuple[torch.Size, torch.dtype] | None


@functools.cache
def _launcher() -> ModuleType:
    from dbkernels.triton import ada_norm_launch

    return ada_norm_launch


@functools.cache
def _plans() -> Any:
    return _launcher().Kinds()


def forward_plan(check: Callable[[], object], eps: float, rms: bool, *inputs: Maybe) -> Plan:
    """Return the plan for x, branch, gate, shift, scale, weight, bias, or False. `check` raises if they don't fit."""
    plans = _plans()
    key = eps, rms, *map(kind, inputs)
    plan = plans.get(key)
    if plan is None:
        check()
        plan = plans.keep(key, _prepare_forward(eps, rms, *inputs))
    return plan


def _prepare_forward(
    eps: float, rms: bool, x: Tensor, branch: Maybe, gate: Maybe, shift: Maybe, scale: Maybe, *affine: Maybe
) -> Plan:
    rows, branch_rows, *modulation = forms(x, branch, gate, shift, scale)
    form = rows, branch_rows, *modulation, *affine
    if x.numel() == 0 or not _as_they_are(form, (x, branch, gate, shift, scale, *affine)):
        return False
    launcher = _launcher()
    return launcher.Forward(launcher.Inputs(*form), eps, rms, x.shape, joint=True)


def gradients(
    plan: Plan, grad: Tensor, grad_h: Maybe, saved: Sequence[Maybe], statistics: Tensor, likes: Sequence[Like]
) -> Sequence[Maybe] | None:
    """Return the gradients of x, branch, gate, shift, scale, weight and bias after a plan's forward pass, or None.

    saved: x (h behind a gate), branch, gate, scale, weight, bias. likes: shape and dtype of the gradients of gate,
    shift, scale, weight and bias, None for each that isn't needed.
    """
    for _ in range(2):
        key = kind(grad), kind(grad_h), *map(kind, saved), *likes
        backward = plan.backwards.get(key)
        if backward is None:
            backward = plan.backwards.keep(key, _prepare_backward(plan, grad, grad_h, saved, likes))
        if backward:
            return backward(grad, grad_h, *saved, statistics, statistics)
        grad, grad_h = grad.contiguous(), None if grad_h is None else grad_h.contiguous()  # one sum expanded, say
    return None


def _prepare_backward(plan: Plan, grad: Tensor, grad_h: Maybe, saved: Sequence[Maybe], likes: Sequence[Like]) -> Plan:
    x, branch, gate, scale, *affine = saved
    assert x is not None
    rows, branch_rows, gate_row, _, scale_row = forms(x, branch, gate, stand_in(likes[1], x), scale)
    upstream = [t if t is None else t.reshape(rows.shape) for t in (grad, grad_h)]
    form = rows, branch_rows, gate_row, scale_row, *affine
    if not _as_they_are((*upstream, *form), (grad, grad_h, x, branch, gate, scale, *affine)):
        return False
    launcher = _launcher()
    inputs = launcher.Inputs(rows, branch_rows, gate_row, None, scale_row, *affine)
    return launcher.Backward(*upstream, inputs, plan.rms, plan.rstd_at, x.shape, launcher.Wanted(*likes))


def stand_in(like: Like, x: Tensor) -> Maybe:
    """Return a tensor of a shape without memory, for a modulation whose values don't matter, or None for None."""
    return None if like is None else x.new_zeros(()).expand(like[0])


def shaped(gradients: Sequence[Maybe], shift: Like, scale: Maybe) -> tuple[Maybe, ...]:
    """Return gradients whose first two, of shift and scale, are (O, 1, D), with these in the given ones' shapes."""
    d_shift, d_scale, *rest = gradients
    d_shift = d_shift.reshape(shift[0]) if d_shift is not None and shift is not None else None
    d_scale = d_scale.reshape(scale.shape) if d_scale is not None and scale is not None else None
    return d_shift, d_scale, *rest


def forms(x: Tensor, branch: Maybe, *modulation: Maybe) -> tuple[Any, ...]:
    """Return x, branch and the modulation in the kernels' form."""
    rows, shared = one_form(x, [m if m is None else per_row("modulation", m, x) for m in modulation])
    return rows, branch if branch is None else branch.reshape(rows.shape), *shared


def _as_they_are(form: Sequence[Maybe], given: Sequence[Maybe]) -> bool:
    """Return whether each form shares its tensor's memory and has rows of adjacent elements."""
    for f, g in zip(form, given, strict=True):
        if f is not None and g is not None:
            adjacent = f.stride(-1) == 1 or f.shape[-1] == 1
            if not adjacent or f.numel() != g.numel() or f.data_ptr() != g.data_ptr():
                return False
    return True


def like(tensor: Maybe, wanted: bool) -> Like:
    """Return a gradient's shape and dtype if it is needed, else None."""
    return None if tensor is None or not wanted else (tensor.shape, tensor.dtype)


def any_requires_grad(*tensors: Maybe) -> bool:
    """Return whether autograd has to record the call."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
