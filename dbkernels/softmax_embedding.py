"""softmax_embedding: the denoised estimate softmax(logits)·E, and a sampler's step with it, without holding the logits.

The definition first, then the op and the public function. The chunked kernel is dbkernels/_logit_chunks.py.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from dbkernels import _logit_chunks as chunks
from dbkernels._autocast import autocast
from dbkernels._cross_entropy_checks import check_head, check_posterior, check_softcap, coefficient
from dbkernels._dtypes import compute_dtype
from dbkernels._head import Head
from dbkernels._levels import as_defined, check_floating
from dbkernels._library import define, register
from dbkernels._products import expected_rows
from dbkernels.denoising_cross_entropy import logits_reference

Maybe: TypeAlias = Tensor | None


def softmax_embedding_reference(table: Tensor, z: Maybe, r: Maybe, *head: Any) -> Tensor:
    """Return D = softmax(logits) @ table, or r·z + (1 - r)·D, by the definition. head: Head's fields."""
    dtype = compute_dtype(table.dtype)
    D = logits_reference(Head(*head)).softmax(-1).to(dtype) @ table.to(dtype)
    if z is not None and r is not None:
        D = torch.lerp(D, z.to(dtype), r.to(dtype).unsqueeze(1))
    return D.to(table.dtype)


def _chunked(table: Tensor, z: Maybe, r: Maybe, *fields: Any) -> Tensor:
    device = table.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return _chunked(table, z, r, *fields)
    head = Head(*fields)
    result = table.new_empty(len(head.h), table.shape[1])
    for rows, p in chunks.probabilities(head):
        D = expected_rows(p.to(compute_dtype(table.dtype)), table)
        result[rows] = (
            D if z is None or r is None else torch.lerp(D, z[rows].to(D.dtype), r[rows].to(D.dtype).unsqueeze(1))
        )
    return result


define(
    "softmax_embedding(Tensor table, Tensor? z, Tensor? r, Tensor h, Tensor weight, Tensor? head_z, Tensor? c_skip, "
    "Tensor? c_out, Tensor? bias, Tensor? logit_scale, Tensor? posterior_z, Tensor? posterior_table, "
    "Tensor? precision, bool normalize, float? softcap) -> Tensor",
    softmax_embedding_reference,
    lambda table, z, r, h, *head: table.new_empty(h.shape[0], table.shape[1]),
)
for _key in ("CPU", "CUDA"):
    register("softmax_embedding", _key, _chunked, "PyTorch, in chunks")


def softmax_embedding(
    h: Tensor,
    weight: Tensor,
    table: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: Tensor | None = None,
    softcap: float | None = None,
    posterior: tuple[Tensor, Tensor, Tensor] | None = None,
    step: tuple[Tensor, Tensor | float] | None = None,
) -> Tensor:
    """Compute the denoised estimate D = softmax(logits)·E, and optionally the Euler step z' = r·z + (1 − r)·D.

    Only one chunk of rows' logits is in memory. Not differentiable.

    Args:
        h, weight, bias, logit_scale, softcap, posterior: as for `denoising_cross_entropy`, which is trained on the same
            logits.
        table: (V, e), the embeddings E to average. Autocast leaves its dtype.
        step: (z, r): z (..., e), r = sigma'/sigma in [0, 1), a float or (...).

    Returns:
        (..., e), table's dtype: D, or z' with step.

    Raises:
        TypeError: an argument isn't a tensor of the right kind.
        ValueError: shapes, devices or dtypes don't fit; an input requires a gradient.

    Source: Shing et al. 2026, section 4; docs/method.md, "The posterior readout".
    """
    given = [h, weight, table, bias, logit_scale, *(posterior or ()), *(step or ())]
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in given):
        raise ValueError("softmax_embedding isn't differentiable: call it under torch.no_grad()")
    h, weight = autocast(h), autocast(weight)
    check_head(h, weight, bias, logit_scale)
    check_floating("table", table)
    if table.dim() != 2 or len(table) != len(weight) or table.device != h.device:
        raise ValueError(
            f"table must be (V={len(weight)}, e) on {h.device}, got {tuple(table.shape)} on {table.device}"
        )
    check_softcap(softcap)
    shape = h.shape[:-1]
    rows = h.reshape(-1, h.shape[-1])
    z, r = step or (None, None)
    if z is not None and z.shape != (*shape, table.shape[1]):
        raise ValueError(f"step's z has shape {tuple(z.shape)}, not {(*shape, table.shape[1])}")
    seen_z = seen_table = precision = None
    if posterior is not None:
        check_posterior(posterior, h, weight)
        seen_z, seen_table, sigma = posterior
        precision = coefficient("sigma", sigma, shape, h).square().reciprocal()
        seen_z = autocast(seen_z).reshape(len(rows), seen_z.shape[-1])
        seen_table = autocast(seen_table)
    head = (rows, weight, None, None, None, bias, logit_scale, seen_z, seen_table, precision, False, softcap)
    z = None if z is None else z.reshape(len(rows), z.shape[-1])
    r = None if r is None else coefficient("r", r, shape, h)
    op: Any = softmax_embedding_reference if as_defined() else torch.ops.dbkernels.softmax_embedding
    return op(table, z, r, *head).view(*shape, table.shape[1])
