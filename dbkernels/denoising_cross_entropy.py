"""denoising_cross_entropy: vocabulary head, posterior readout and cross-entropy, without ever holding the logits.

The definition first, then the op, its gradient and the public function. The kernel is dbkernels/_logit_chunks.py.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dbkernels import _logit_chunks as chunks
from dbkernels._autocast import autocast
from dbkernels._cross_entropy_checks import REDUCTIONS, check_rows, coefficient, mark_targets
from dbkernels._direct import direct
from dbkernels._dtypes import compute_dtype
from dbkernels._few_rows import NO_SECOND, FewRowsLoss, few_rows
from dbkernels._head import Head
from dbkernels._levels import as_defined
from dbkernels._library import define, register
from dbkernels.edm_loss import times_upstream

Maybe: TypeAlias = Tensor | None
GRADIENTS = ("h", "weight", "z", "bias", "logit_scale", "posterior_z")


PLACES = [Head._fields.index(name) for name in GRADIENTS]
NOTHING = [False] * len(GRADIENTS)


def logits_reference(head: Head) -> Tensor:
    """Compute the logits by the definition, (R, V) in the sums' dtype, differentiable."""
    dtype = compute_dtype(head.h.dtype)
    x = head.h.to(dtype)
    if head.c_out is not None:
        x = x * head.c_out.unsqueeze(1)
    if head.z is not None and head.c_skip is not None:
        x = x + head.z.to(dtype) * head.c_skip.unsqueeze(1)
    if head.normalize:
        x = torch.nn.functional.normalize(x, dim=-1)
    logits = x @ head.weight.to(dtype).T
    if head.logit_scale is not None:
        logits = logits * head.logit_scale.to(dtype)
    if head.bias is not None:
        logits = logits + head.bias.to(dtype)
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    if head.posterior_z is not None and head.table is not None and head.precision is not None:
        table = head.table.to(dtype)
        evidence = head.posterior_z.to(dtype) @ table.T - table.square().sum(-1) / 2
        logits = logits + evidence * head.precision.unsqueeze(1)
    return logits


def _row_losses(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the rows' losses by the definition: 0 where the target is -1, NaN where it is less."""
    loss = torch.nn.functional.cross_entropy(logits, target.clamp(min=-1), ignore_index=-1, reduction="none")
    return loss * torch.where(target < -1, math.nan, 1)


def _definition(*arguments: Any) -> list[Tensor]:
    *head_arguments, target, factor, wants = arguments
    leaves = {}
    head = Head(*head_arguments)
    for name, want in zip(GRADIENTS, wants, strict=True):
        if want:
            leaves[name] = getattr(head, name).detach().requires_grad_()
    with torch.enable_grad():
        logits = logits_reference(head._replace(**leaves))
        loss = _row_losses(logits, target)
    computed = torch.autograd.grad(loss, list(leaves.values()), factor) if leaves else ()
    grads = {name: g.to(chunks.kept_dtype(g.dtype)).contiguous() for name, g in zip(leaves, computed, strict=True)}
    return [loss.detach(), *(grads.get(name, loss.new_empty(0)) for name in GRADIENTS)]


def _fake(*arguments: Any) -> list[Tensor]:
    *head_arguments, _, _, wants = arguments
    head = Head(*head_arguments)
    loss = head.h.new_empty(head.h.shape[0], dtype=compute_dtype(head.h.dtype))
    grads = []
    for name, want in zip(GRADIENTS, wants, strict=True):
        given = getattr(head, name)
        kept = given.new_empty(given.shape, dtype=chunks.kept_dtype(given.dtype)) if want else loss.new_empty(0)
        grads.append(kept)
    return [loss, *grads]


def _chunked(*arguments: Any) -> list[Tensor]:
    *fields, target, factor, wants = arguments
    loss, grads = _find(Head(*fields), target, factor, wants)
    return [loss, *(grads[name] if name in grads else loss.new_empty(0) for name in GRADIENTS)]


def _find(head: Head, target: Tensor, factor: Maybe, wants: list[bool]) -> tuple[Tensor, dict[str, Tensor]]:
    device = head.h.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return _find(head, target, factor, wants)
    return chunks.loss_and_gradients(head, target, factor, dict(zip(GRADIENTS, wants, strict=True)))


define(
    "denoising_cross_entropy(Tensor h, Tensor weight, Tensor? z, Tensor? c_skip, Tensor? c_out, Tensor? bias, "
    "Tensor? logit_scale, Tensor? posterior_z, Tensor? table, Tensor? precision, bool normalize, float? softcap, "
    "Tensor target, Tensor? factor, bool[] wants) -> Tensor[]",
    _definition,
    _fake,
)
for _key in ("CPU", "CUDA"):
    register("denoising_cross_entropy", _key, _chunked, "PyTorch, in chunks")


def _call(head: Head, target: Tensor, factor: Maybe, wants: list[bool]) -> tuple[Tensor, dict[str, Tensor]]:
    """Call the op: past the dispatcher where only its CUDA kernel can serve."""
    if direct(head.h, *head[1:10]):
        return _find(head, target, factor, wants)
    loss, *grads = torch.ops.dbkernels.denoising_cross_entropy.default(*head, target, factor, wants)
    return loss, {name: grad for name, grad, want in zip(GRADIENTS, grads, wants, strict=True) if want}


class _RowLosses(torch.autograd.Function):
    """Losses of the rows. With `factor`, each row's weight in the scalar loss, the gradients are computed with them;
    without, by a second pass once the upstream gradient is known."""

    @staticmethod
    def forward(ctx: Any, factor: Maybe, target: Tensor, *fields: Any) -> Tensor:
        ctx.wants = [ctx.needs_input_grad[2 + place] for place in PLACES]
        ctx.at_once, ctx.options = factor is not None, fields[10:]
        ctx.dtypes = [field.dtype if isinstance(field, Tensor) else None for field in fields]
        loss, grads = _call(Head(*fields), target, factor, ctx.wants if ctx.at_once else NOTHING)
        ctx.names = list(grads)
        kept = grads.values() if ctx.at_once else (target, *fields[:10])
        ctx.save_for_backward(*kept)
        return loss if factor is None else torch.dot(loss, factor)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        # Not once_differentiable: where upstream is a constant, it would let the gradient pass for a constant too.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(NO_SECOND)
        if ctx.at_once:
            grads = {name: times_upstream(g, upstream) for name, g in zip(ctx.names, ctx.saved_tensors, strict=True)}
        else:
            target, *tensors = ctx.saved_tensors
            _, grads = _call(Head(*tensors, *ctx.options), target, upstream.contiguous(), ctx.wants)
        results: list[Maybe] = [None] * (2 + len(Head._fields))
        for name, place in zip(GRADIENTS, PLACES, strict=True):
            if name in grads:
                grad, dtype = grads[name], ctx.dtypes[place]
                results[2 + place] = grad if grad.dtype == dtype else grad.to(dtype)
        return tuple(results)


def denoising_cross_entropy(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    z: Tensor | None = None,
    c_skip: Tensor | float | None = None,
    c_out: Tensor | float | None = None,
    bias: Tensor | None = None,
    logit_scale: Tensor | None = None,
    normalize: bool = False,
    posterior: tuple[Tensor, Tensor, Tensor] | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute the cross-entropy of a vocabulary head on a denoised state, D = c_skip·z + c_out·h.

    logits = logit_scale·D @ weight.T + bias, capped by softcap·tanh(·/softcap), plus the posterior readout's
    (z·E_k − |E_k|²/2)/sigma². With a head tied to unit embeddings the readout is c_skip = 1/sigma². Only one
    chunk of rows' logits is in memory; gradients are computed with the loss, the head's summed in float32, and repeat.

    Args:
        h: (..., d), the network's output; float16, bfloat16, float32 or float64. Arithmetic between products is float32
            (float64 for float64). Autocast casts h, z and weight as for torch.nn.functional.linear.
        weight: (V, d), h's dtype. target: (...), int64, in [0, V) or ignore_index.
        z: noised target, h's shape; with c_skip. c_skip, c_out: any numbers, a float or (...), not differentiable; a
            c_skip of 2.5e5 is safe in every dtype.
        bias: (V,). logit_scale: a 0-dim tensor. normalize: bring D to unit length first.
        posterior: (z, table, sigma) of the readout with a table of its own: z (..., e), table (V, e), sigma (...).
            Only z is differentiable.
        row_weight: (...), the factor of each row's loss, not differentiable.
        reduction: "mean" over the rows that aren't ignored, "sum", or "none", (...), which computes the logits twice.

    Returns:
        float32 (float64 for float64), () or target's shape, in nats. Ignored rows are 0; a mean of no others is NaN.

    Raises:
        TypeError: an argument isn't a tensor of the right kind.
        ValueError: shapes, devices or dtypes don't fit; z without c_skip; reduction is unknown; softcap isn't positive;
            on the CPU, outside torch.compile, a target is outside [0, V): elsewhere its loss is NaN.
        RuntimeError: a gradient is to be differentiated again.

    Source: Wijmans et al. 2024 (Cut Cross-Entropy), section 4; Karras et al. 2022, table 1; docs/method.md, "The
    posterior readout".
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} must be one of {', '.join(REDUCTIONS)}")
    h, weight, z = autocast(h), autocast(weight), z if z is None else autocast(z)
    plain = z is None and c_skip is None and c_out is None and bias is None and logit_scale is None and not normalize
    if plain and posterior is None and row_weight is None and softcap is None and reduction != "none":
        few = few_rows(h, weight, target, ignore_index, reduction)
        if few is not None and torch.is_grad_enabled():
            return FewRowsLoss.apply(h, weight, target, few)
        if few is not None:
            return few(h, weight, target, False, False)[0]
    rows = check_rows(h, weight, target, z, bias, logit_scale, posterior, softcap)
    shape = target.shape
    if (z is None) != (c_skip is None):
        raise ValueError("z and c_skip go together: pass both or neither")
    seen_z, table, sigma = posterior or (None, None, None)
    precision = None if sigma is None else coefficient("sigma", sigma, shape, h).square().reciprocal()
    head = Head(
        h if h.dim() == 2 else h.reshape(rows, h.shape[-1]),
        weight,
        None if z is None else z.reshape(rows, z.shape[-1]),
        None if c_skip is None else coefficient("c_skip", c_skip, shape, h),
        None if c_out is None else coefficient("c_out", c_out, shape, h),
        bias,
        logit_scale,
        None if seen_z is None else autocast(seen_z).reshape(rows, seen_z.shape[-1]),
        None if table is None else autocast(table),
        precision,
        normalize,
        softcap,
    )
    weights = None if row_weight is None else coefficient("row_weight", row_weight, shape, h)
    flat = target if target.dim() == 1 else target.reshape(rows)
    flat, factor = mark_targets(flat, len(weight), ignore_index, weights, reduction == "mean", h)
    if as_defined():
        loss = _row_losses(logits_reference(head), flat)
        loss = loss if reduction == "none" else torch.dot(loss, factor)
    elif torch.is_grad_enabled():
        loss = _RowLosses.apply(None if reduction == "none" else factor, flat, *head)
    else:
        loss = _call(head, flat, None, NOTHING)[0]
        loss = loss if reduction == "none" else torch.dot(loss, factor)
    if reduction == "none":
        return (loss if weights is None else loss * factor).view(shape)
    return loss if rows or reduction == "sum" else loss + math.nan
