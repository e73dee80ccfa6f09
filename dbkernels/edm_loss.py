"""Compute EDM's loss weight·|D − y|² as |F − target|², with the gradients of F, z and y in the same pass.

This module holds the checks and the public function. The definition, ops and gradient are in dbkernels/_edm_loss.py,
the kernels in csrc/cpu/edm_loss.cpp and dbkernels/triton/edm_loss.py.

With s = sigma_data, target = (y − c_skip·z) / c_out and weight = 1 / c_out² (Karras et al. 2022, table 1 and eq. 8). By
the angle whose tangent is sigma / s it is

    target = sin/s · y − cos/sigma · (z − y)        sin = sigma/root, cos = s/root, root = sqrt(sigma² + s²)

in which nothing overflows, and nothing cancels but z − y, which is exact where z is close to y. The rounding of z is
magnified by cos/sigma, though: at sigma = 0.002 a float32 z of about 1 gives the target to 3e-5, a bfloat16 z hardly at
all. Where z = y + sigma·eps is drawn again, target = sin/s · y − cos · eps loses nothing.

From the network's input c_in·z, c_in = 1/root, without another tensor:

    target = sin/s · y − s/sigma · (c_in·z − c_in·y)

The kernels take the very bits of c_in that `inject_noise` multiplied by, and round c_in·z − c_in·y once, so that the
rounding of c_in cancels. That of c_in·z is magnified as much as that of z; in float32, where z was rounded before it
was scaled, twice: 6e-5 at sigma = 0.002.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dbkernels._address import Number, check_rounds, checked, split, tensor_or_none
from dbkernels._direct import direct, kind
from dbkernels._dtypes import compute_dtype
from dbkernels._edm_loss import EDMLoss, edm_loss_reference, expected_upstream, mean_over, run, times_upstream
from dbkernels._levels import as_defined, check_floating, check_level, check_sigma, check_sigma_data
from dbkernels.philox import ROUNDS

__all__ = ["edm_loss", "edm_loss_reference", "mean_over", "times_upstream"]

REDUCTIONS = ("mean", "sum", "none", "sample")


def _check_alike(F: Tensor, **others: Tensor) -> None:
    check_floating("F", F)
    for name, tensor in others.items():
        check_floating(name, tensor)
        if tensor.shape != F.shape or tensor.device != F.device:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} on {tensor.device}, F {tuple(F.shape)} on {F.device}: "
                "they must be alike"
            )


def _check_source(
    z: Tensor | None, z_scaled: bool, seed: Number | None, offset: Number, rounds: int, y: Tensor
) -> tuple[Number, Number]:
    """Return (seed, offset) as `checked` does. Raise unless z is given or can be drawn."""
    if z is None:
        if z_scaled:
            raise ValueError("z_scaled=True describes a z that is given, but z=None: drop z_scaled, or pass c_in·z")
        if seed is None:
            raise ValueError("z=None asks for z to be drawn again, which needs seed: give inject_noise's")
        check_rounds(rounds)
        return checked(seed, offset, y.device)
    if seed is not None or isinstance(offset, Tensor) or offset != 0 or rounds != ROUNDS:
        raise ValueError(
            "seed, offset and rounds say how to draw z again, but z was given: pass z=None, or none of them"
        )
    return 0, 0


def _check_weight(weight: float) -> float:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise TypeError(f"weight must be a float, got {type(weight).__name__}: multiply the loss by a tensor yourself")
    if not -math.inf < weight < math.inf:
        raise ValueError(f"weight={weight} must be finite: it multiplies the loss")
    return float(weight)


def _check_number(sigma: Any) -> None:
    check_level(sigma)
    if sigma == 0:
        raise ValueError("sigma=0 leaves no noise to remove: it must be positive")


def _check_options(F: Tensor, sigma: float | Tensor, sigma_data: float, reduction: str) -> None:
    check_sigma_data(sigma_data)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} must be one of {', '.join(REDUCTIONS)}")
    if reduction == "sample" and F.dim() == 0:
        raise ValueError('reduction="sample" needs a dimension of samples, but F has none')
    if isinstance(sigma, Tensor) and sigma.requires_grad:
        raise ValueError("sigma requires a gradient, but it is not trained: detach it")
    if not isinstance(sigma, Tensor):
        _check_number(sigma)


def _check(F: Tensor, z: Tensor | None, y: Tensor, sigma: float | Tensor, sigma_data: float, reduction: str) -> Tensor:
    """Return sigma as levels in the arithmetic's dtype. Raise unless the arguments fit."""
    _check_alike(F, y=y) if z is None else _check_alike(F, z=z, y=y)
    _check_options(F, sigma, sigma_data, reduction)
    return check_sigma(sigma, "F", F, compute_dtype(F.dtype, y.dtype, (y if z is None else z).dtype))


def _accepted(F: Tensor, z: Tensor | None, y: Tensor, sigma: float | Tensor, sigma_data: float, reduction: str) -> None:
    """Raise as `_check` does, but check only once what depends on the kind of input alone."""
    from dbkernels.triton.edm_loss import accepted

    levels = tensor_or_none(sigma)
    if levels is None:
        _check_number(sigma)
    key = kind(F), kind(z), kind(y), kind(levels), levels is not None and levels.requires_grad, sigma_data, reduction
    if key not in accepted:
        _check(F, z, y, sigma, sigma_data, reduction)
        accepted.keep(key, True)


def edm_loss(
    F: Tensor,
    z: Tensor | None,
    y: Tensor,
    sigma: float | Tensor,
    *,
    sigma_data: float,
    reduction: str = "mean",
    z_scaled: bool = False,
    seed: Number | None = None,
    offset: Number = 0,
    rounds: int = ROUNDS,
    weight: float = 1.0,
) -> Tensor:
    """Compute EDM's denoising loss weight·|D − y|², D = c_skip·z + c_out·F, and its gradients in one pass.

    Sums are taken in a fixed order, so a loss repeats bit for bit for any number of threads. Gradients are computed
    with the loss and kept in their input's dtype (float32 for float16), for the upstream gradient that is expected: 1
    for a single loss; on a GPU, for several losses ("sample", "none"), that of `.mean()`, one over their number. With
    these `loss.backward()` and `loss.mean().backward()` leave them as they are. Backward passes over the gradients once
    more, in place, if the upstream gradient is another: a factor on the loss (give it as `weight`), a loss scale of
    automatic mixed precision, a sum or weights of several losses (only samples whose factor differs); for float16,
    which is cast; in a retained graph, which copies. There is no second derivative. Within torch.func's transforms the
    definition runs.

    Args:
        F: network's raw output, any shape, float16, bfloat16, float32 or float64. Arithmetic is float32 (float64 if an
            input is).
        z: noised target, y + sigma·eps, or the network's input c_in·(y + sigma·eps) with `z_scaled`; F's shape, any of
            these dtypes. None draws it again from (y, seed, offset), as `inject_noise(y, sigma, seed=seed,
            offset=offset)` drew it but without rounding it: z is not read, and the gradient of y includes its way
            through z. At small sigma draw it again or keep it in float32: the rounding of z, scaled or not, is divided
            by sigma here.
        y: clean target, F's shape, any of these dtypes.
        sigma: noise std in y's units: a float, a 0-dim tensor, one per sample (B,) or one per token (B, N), broadcast
            over the trailing dimensions. Positive; a tensor's values aren't checked, as that would stop the device.
        sigma_data: the target's std in the same units.
        reduction: "mean" over all elements, "sum", "none" (one loss per element), or "sample", the mean over each
            sample's elements, (B,).
        z_scaled: z is multiplied by c_in = 1 / sqrt(sigma² + sigma_data²), as `inject_noise(y, sigma,
            sigma_data=sigma_data)` returns it; its gradient is that of the scaled tensor.
        seed: if z is None, the seed that z was drawn by: an int or a 0-dim tensor, as for `inject_noise`.
        offset: as for seed.
        rounds: as for seed; of Philox4x32, 10 or 7.
        weight: factor of the loss, applied in the same pass: 1 / (micro-batches that a step accumulates).

    Returns:
        float32 (float64 if an input is): (), F's shape for "none", (B,) for "sample".

    Raises:
        TypeError: F, z, y or sigma isn't floating point; seed or offset isn't an int or a tensor of integers;
            weight isn't a number.
        ValueError: shapes or devices don't fit; sigma requires a gradient; sigma, sigma_data, reduction, seed, offset,
            rounds or weight is out of range; seed is missing, or given beside z; z_scaled without z.

    Source: Karras et al. 2022 (EDM), table 1 and eq. 8; Salmon et al. 2011 (Philox4x32-10).
    """
    weight = _check_weight(weight)
    past = isinstance(F, Tensor) and direct(F, z, y, tensor_or_none(sigma)) and F.numel() > 0
    if past:
        _accepted(F, z, y, sigma, sigma_data, reduction)
        level: Any = sigma if isinstance(sigma, Tensor) else float(sigma)
    else:
        level = _check(F, z, y, sigma, sigma_data, reduction)
    seed, offset = _check_source(z, z_scaled, seed, offset, rounds, y)
    options = float(sigma_data), reduction, z_scaled
    if as_defined():
        return edm_loss_reference(F, z, y, level, *options[:2], seed, offset, rounds, weight, z_scaled)
    wants = torch.is_grad_enabled() and (F.requires_grad or y.requires_grad or (z is not None and z.requires_grad))
    if not (past or wants) and z is not None and weight == 1.0:
        return torch.ops.dbkernels.edm_loss.default(F, z, y, level, *options, 0, 0, False, False, False)[0]
    arguments = F, z, y, level, *options, *split(seed, offset), rounds, weight
    if wants and not past:  # the dispatcher's kernels find gradients for 1: another is applied as it was
        return EDMLoss.apply(*arguments, 1.0)
    if wants:
        dtype = compute_dtype(F.dtype, y.dtype, (y if z is None else z).dtype)
        return EDMLoss.apply(*arguments, expected_upstream(F, reduction, dtype))
    return run(*arguments, 1.0, False, False, False)[0]
