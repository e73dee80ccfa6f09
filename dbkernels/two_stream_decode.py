"""two_stream_decode: one group of noisy tokens against a cache of clean keys and values, as generation runs it.

The definition first, then the op and the public function. The kernels are dbkernels/two_stream_cpu.py (`decode`) and
dbkernels/triton/two_stream_decode.py.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from dbkernels import two_stream_cpu as cpu
from dbkernels._autocast import autocast
from dbkernels._direct import direct
from dbkernels._dtypes import compute_dtype
from dbkernels._levels import as_defined
from dbkernels._library import define, register, register_triton
from dbkernels._two_stream import check_decode, kind_of, like_rows

Maybe: TypeAlias = Tensor | None


def two_stream_decode_reference(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lengths: Maybe, scale: float
) -> Tensor:
    """Attend by the definition: each query to the first cache_lengths[b] cached keys and to its own group's."""
    dtype = compute_dtype(q.dtype)
    ratio = q.shape[1] // k.shape[1]
    keys, values = (torch.cat(pair, 2).to(dtype).repeat_interleave(ratio, 1) for pair in ((k_cache, k), (v_cache, v)))
    scores = (q.to(dtype) * scale) @ keys.transpose(-1, -2)
    if cache_lengths is not None:
        place = torch.arange(k_cache.shape[2], device=q.device)
        unused = (place >= cache_lengths.unsqueeze(1)).view(len(q), 1, 1, -1)
        scores[..., : k_cache.shape[2]].masked_fill_(unused, -torch.inf)
        # The unfilled part may hold anything, and a weight of 0 times NaN is NaN.
        values[:, :, : k_cache.shape[2]].masked_fill_(unused.transpose(-1, -2), 0.0)
    return like_rows(q).copy_(scores.softmax(-1) @ values)


def _triton_decode(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lengths: Maybe, scale: float
) -> Tensor:
    from dbkernels.triton.two_stream_decode import decode

    return decode(q, k, v, k_cache, v_cache, cache_lengths, scale) if q.numel() else like_rows(q)


define(
    "two_stream_decode(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor? cache_lengths, "
    "float scale) -> Tensor",
    two_stream_decode_reference,
    lambda q, *rest: like_rows(q),
)
register("two_stream_decode", "CPU", cpu.decode, "PyTorch's flash attention, merged")
register_triton("two_stream_decode", _triton_decode)


def two_stream_decode(
    q_noisy: Tensor,
    k_noisy: Tensor,
    v_noisy: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend from one group of noisy tokens to the clean tokens before it and to itself, with a key/value cache.

    Equal to the group's rows of `two_stream_attention`. Not differentiable.

    Args:
        q_noisy: (B, H, g, D), the group's queries. k_noisy, v_noisy: (B, H_kv, g, D), H a multiple of H_kv.
        k_cache, v_cache: (B, H_kv, L, D), clean keys and values. Any strides: a preallocated cache needs no copy.
            float16, bfloat16, float32 or (except on GPUs) float64; D 32, 64, 80, 96, 128 or 256 on GPUs. Autocast casts
            as for PyTorch's attention.
        cache_lengths: (B,) int32 or int64, how much of the cache each sequence has filled; all of it by default. Values
            are checked on the CPU only.
        scale: of the scores, positive; 1/sqrt(D) by default.

    Returns:
        (B, H, g, D), laid out as (B, g, H, D).

    Raises:
        TypeError: an argument isn't a floating tensor or a number.
        ValueError: dtypes, shapes or options aren't supported, or an input requires a gradient; lists every reason.

    Source: Arriola et al. 2025 (Block Diffusion), section 3; Dao et al. 2023 (Flash-Decoding).
    """
    given: Any = q_noisy, k_noisy, v_noisy, k_cache, v_cache
    if torch._C._is_any_autocast_enabled():
        given = [autocast(t) for t in given]
    if isinstance(q_noisy, Tensor) and direct(*given, cache_lengths):
        return _launched(given, cache_lengths, scale)
    number = check_decode(list(given), cache_lengths, scale)
    op: Any = two_stream_decode_reference if as_defined() else torch.ops.dbkernels.two_stream_decode
    return op(*given, cache_lengths, number)


def _launched(given: Any, cache_lengths: Maybe, scale: float | None) -> Tensor:
    """Run the op past the dispatcher, with checks once per kind of input."""
    from dbkernels.triton.two_stream_decode import accepted

    wants = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    kind = kind_of(*given, cache_lengths, scale, wants)
    number = accepted.get(kind)
    if number is None:
        number = accepted.keep(kind, check_decode(list(given), cache_lengths, scale))
    return _triton_decode(*(*given, cache_lengths, number))
