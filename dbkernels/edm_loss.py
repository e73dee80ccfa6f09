"""edm_loss: weight·|D − y|² as |F − target|², with the gradients of F, z and y taken in the same pass.

The definition first, then the ops, the gradient and the public function. The kernels are csrc/cpu/edm_loss.cpp and
dbkernels/triton/edm_loss.py.

With s = sigma_data, target = (y − c_skip·z) / c_out and weight = 1 / c_out² (Karras et al. 2022, table 1 and eq. 8). By
the angle whose tangent is sigma / s it is

    target = sin/s · y − cos/sigma · (z − y)        sin = sigma/root, cos = s/root, root = sqrt(sigma² + s²)

in which nothing overflows, and nothing cancels but z − y, which is exact where z is close to y. What z lost when it
was rounded is magnified by cos/sigma, though: at sigma = 0.002 a float32 z of about 1 gives the target to 3e-5, a
bfloat16 z hardly at all. Where z = y + sigma·eps is drawn again, target = sin/s · y − cos · eps loses nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dbkernels._levels import broadcast, check_floating, check_sigma, check_sigma_data, compute_dtype
from dbkernels._library import backend, define, register_triton
from dbkernels.philox import check_address, normal_reference, signed

REDUCTIONS = ("mean", "sum", "none", "sample")

Four = tuple[Tensor, Tensor, Tensor, Tensor]


def _coefficients(sigma: Tensor, sigma_data: float, drawn: bool) -> tuple[Tensor, Tensor]:
    """of_y, of_noise: target = of_y·y − of_noise·n, where n is z − y, or eps where z is drawn again."""
    root = torch.hypot(sigma, torch.full_like(sigma, sigma_data))
    cos = sigma_data / root
    return sigma / root / sigma_data, cos if drawn else cos / sigma


def _residual(F: Tensor, z: Tensor | None, y: Tensor, of_y: Tensor, of_noise: Tensor, seed: int, offset: int) -> Tensor:
    dtype = of_y.dtype
    if z is None:
        noise = normal_reference(y.shape, seed=seed % 2**64, offset=offset, device=y.device).to(dtype)
    else:
        noise = z.to(dtype) - y.to(dtype)
    return F.to(dtype) - of_y * y.to(dtype) + of_noise * noise


def _reduce(square: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return square
    if reduction == "sample":
        return square.reshape(len(square), mean_over(square.shape, reduction)).mean(1)
    return square.mean() if reduction == "mean" else square.sum()


def mean_over(shape: torch.Size, reduction: str) -> int:
    """How many elements a mean is taken over; 1 where none is."""
    if reduction == "sample":
        return shape[1:].numel()
    return shape.numel() if reduction == "mean" else 1


def edm_loss_reference(
    F: Tensor,
    z: Tensor | None,
    y: Tensor,
    sigma: Tensor,
    sigma_data: float,
    reduction: str = "mean",
    seed: int = 0,
    offset: int = 0,
) -> Tensor:
    """The definition, differentiable in F, z and y. sigma: (), (B,) or (B, N), in the arithmetic's dtype."""
    coefficients = _coefficients(broadcast(sigma, F.dim()), sigma_data, z is None)
    return _reduce(_residual(F, z, y, *coefficients, seed, offset).square(), reduction)


def empty_gradients(
    F: Tensor, z: Tensor | None, y: Tensor, want_F: bool, want_z: bool, want_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients; nothing where one isn't wanted."""
    return _room(F, want_F), _room(y if z is None else z, want_z), _room(y, want_y)


def _room(x: Tensor, wanted: bool) -> Tensor:
    # float16 can't hold a mean's small gradients before a loss scale is applied.
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    return torch.empty(x.shape if wanted else (0,), dtype=dtype, device=x.device)


def _definition(
    F: Tensor, z: Tensor | None, y: Tensor, sigma: Tensor, sigma_data: float, reduction: str, seed: int, offset: int,
    want_F: bool, want_z: bool, want_y: bool,
) -> Four:  # fmt: skip
    of_y, of_noise = _coefficients(broadcast(sigma, F.dim()), sigma_data, z is None)
    residual = _residual(F, z, y, of_y, of_noise, seed, offset)
    slope = 2 * residual / max(1, mean_over(F.shape, reduction))
    loss = _reduce(residual.square(), reduction).contiguous()
    grads = empty_gradients(F, z, y, want_F, want_z, want_y)
    at_y = -of_y if z is None else -(of_y + of_noise)
    for grad, wanted, factor in zip(grads, (want_F, want_z, want_y), (1, of_noise, at_y), strict=True):
        if wanted:
            grad.copy_(slope * factor)
    return loss, *grads


def _fake(
    F: Tensor, z: Tensor | None, y: Tensor, sigma: Tensor, sigma_data: float, reduction: str, seed: int, offset: int,
    want_F: bool, want_z: bool, want_y: bool,
) -> Four:  # fmt: skip
    shape = {"none": F.shape, "sample": F.shape[:1]}.get(reduction, ())
    return F.new_empty(shape, dtype=sigma.dtype), *empty_gradients(F, z, y, want_F, want_z, want_y)


define(
    "edm_loss(Tensor F, Tensor? z, Tensor y, Tensor sigma, float sigma_data, str reduction, SymInt seed, "
    "SymInt offset, bool want_F, bool want_z, bool want_y) -> (Tensor, Tensor, Tensor, Tensor)",
    _definition,
    _fake,
)


def _scale(x: Tensor, by: Tensor) -> None:
    x.copy_(x * broadcast(by, x.dim()))


define("edm_loss_scale_(Tensor(a!) x, Tensor by) -> ()", _scale, lambda x, by: None)


def _triton_forward(F: Tensor, *arguments: Any) -> Four:
    from dbkernels.triton.edm_loss import forward

    return forward(F, *arguments) if F.numel() else _definition(F, *arguments)


def _triton_scale(x: Tensor, by: Tensor) -> None:
    from dbkernels.triton.edm_loss import scale

    scale(x, by)


register_triton("edm_loss", _triton_forward)
register_triton("edm_loss_scale_", _triton_scale)


class _EDMLoss(torch.autograd.Function):
    """The op with its gradients, which are ready before backward asks: it only applies the upstream gradient."""

    @staticmethod
    def forward(
        ctx: Any, F: Tensor, z: Tensor | None, y: Tensor, sigma: Tensor, sigma_data: float, reduction: str, seed: int,
        offset: int,
    ) -> Tensor:  # fmt: skip
        wanted = ctx.needs_input_grad[:3]
        loss, *grads = torch.ops.dbkernels.edm_loss.default(
            F, z, y, sigma, sigma_data, reduction, seed, offset, *wanted
        )
        ctx.dtypes = F.dtype, y.dtype if z is None else z.dtype, y.dtype
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # Not once_differentiable: where upstream is a constant, it would let the gradient pass for a constant too.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("edm_loss has no second derivative: drop create_graph=True, or use edm_loss_reference")
        needs = ctx.needs_input_grad[:3]
        saved = zip(needs, ctx.saved_tensors, ctx.dtypes, strict=True)
        grads = [times_upstream(kept, upstream).to(dtype) if need else None for need, kept, dtype in saved]
        return *grads, None, None, None, None, None


def times_upstream(kept: Tensor, upstream: Tensor) -> Tensor:
    """kept·upstream. In place, and no pass at all where upstream is 1, if this is the graph's last backward: then
    nobody needs `kept` any more. Otherwise a copy, as whoever gets the gradient may write into it."""
    if torch.compiler.is_compiling():
        return kept * broadcast(upstream, kept.dim())
    if torch._C._autograd._get_current_graph_task_keep_graph():
        kept = kept.clone()
    torch.ops.dbkernels.edm_loss_scale_.default(kept, upstream)
    return kept


def _check_alike(F: Tensor, **others: Tensor) -> None:
    check_floating("F", F)
    for name, tensor in others.items():
        check_floating(name, tensor)
        if tensor.shape != F.shape or tensor.device != F.device:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} on {tensor.device}, F {tuple(F.shape)} on {F.device}: "
                "they must be alike"
            )


def _check_source(z: Tensor | None, seed: int | None, offset: int) -> int:
    """Raise unless z is given or can be drawn; the seed as the op takes it."""
    if z is None:
        if seed is None:
            raise ValueError("z=None asks for z to be drawn again, which needs seed: give inject_noise's")
        check_address(seed, offset)
        return signed(seed)
    if seed is not None or offset != 0:
        raise ValueError("seed and offset say how to draw z again, but z was given: pass z=None, or no seed")
    return 0


def _check_options(F: Tensor, sigma: float | Tensor, sigma_data: float, reduction: str) -> None:
    check_sigma_data(sigma_data)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} must be one of {', '.join(REDUCTIONS)}")
    if reduction == "sample" and F.dim() == 0:
        raise ValueError('reduction="sample" needs a dimension of samples, but F has none')
    if isinstance(sigma, Tensor) and sigma.requires_grad:
        raise ValueError("sigma requires a gradient, but it is not trained: detach it")
    if not isinstance(sigma, Tensor) and sigma == 0:
        raise ValueError("sigma=0 leaves no noise to remove: it must be positive")


def edm_loss(
    F: Tensor,
    z: Tensor | None,
    y: Tensor,
    sigma: float | Tensor,
    *,
    sigma_data: float,
    reduction: str = "mean",
    seed: int | None = None,
    offset: int = 0,
) -> Tensor:
    """EDM's weighted denoising loss, weight·|D − y|² with D = c_skip·z + c_out·F: one pass for it and its gradients.

    Sums are taken in a fixed order, so a loss repeats bit for bit for any number of threads. Gradients are found with
    the loss and kept in their input's dtype (float32 for float16). Backward multiplies them by the upstream gradient:
    in place, and not at all where it is 1, unless the graph is retained. There is no second derivative.

    Args:
        F: the network's raw output, any shape, float16, bfloat16, float32 or float64. Arithmetic is float32 (float64 if
            an input is).
        z: noised target, y + sigma·eps, F's shape, any of these dtypes; or None to draw it again from (y, seed,
            offset), as `inject_noise(y, sigma, seed=seed, offset=offset)` drew it but before it was rounded. Then z is
            not read, and the gradient of y includes its way through z. At small sigma, draw it again or keep it in
            float32: what z lost when it was rounded is divided by sigma here.
        y: clean target, F's shape, any of these dtypes.
        sigma: noise std in y's units: a float, a 0-dim tensor, one per sample (B,) or one per token (B, N), broadcast
            over the trailing dimensions. Positive; a tensor's values aren't checked, as that would stop the device.
        sigma_data: the target's std in the same units.
        reduction: "mean" over all elements, "sum", "none" (one loss an element), or "sample", the mean over each
            sample's elements, (B,).
        seed, offset: where z is None, those that z was drawn by.

    Returns:
        float32 (float64 if an input is): (), F's shape for "none", (B,) for "sample".

    Raises:
        TypeError: F, z, y or sigma isn't floating point; seed or offset isn't an int.
        ValueError: shapes or devices don't fit; sigma requires a gradient; sigma, sigma_data, reduction, seed or offset
            is out of range; seed is missing, or given beside z.

    Source: Karras et al. 2022 (EDM), table 1 and eq. 8; Salmon et al. 2011 (Philox4x32-10).
    """
    _check_alike(F, y=y) if z is None else _check_alike(F, z=z, y=y)
    _check_options(F, sigma, sigma_data, reduction)
    word = _check_source(z, seed, offset)
    level = check_sigma(sigma, "F", F, compute_dtype(F.dtype, y.dtype, (y if z is None else z).dtype))
    arguments = F, z, y, level, float(sigma_data), reduction, word, offset
    if backend() == "reference" and not torch.compiler.is_compiling():
        return edm_loss_reference(*arguments)
    if torch.is_grad_enabled() and (F.requires_grad or y.requires_grad or (z is not None and z.requires_grad)):
        return _EDMLoss.apply(*arguments)
    return torch.ops.dbkernels.edm_loss.default(*arguments, False, False, False)[0]
