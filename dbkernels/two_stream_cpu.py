"""two_stream_attention on the CPU: PyTorch's flash attention over parts of the keys, merged by their log-sum-exp.

No mask larger than a chunk is ever in memory. Given the merged output and log-sum-exp, the backward pass of each part
is exact by itself: its weights are P = exp(S - lse), whatever the other parts are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dbkernels._dtypes import compute_dtype
from dbkernels._two_stream import like_rows, nothing, sequences

Maybe: TypeAlias = Tensor | None
CHUNK = 128  # noisy tokens that share a call, where groups are smaller

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _rows(*tensors: Maybe) -> list[Any]:
    """Return the tensors, copied where a row's elements aren't adjacent: the flash kernels assume that they are."""
    return [t if t is None or t.stride(-1) == 1 else t.contiguous() for t in tensors]


def merged(out: Tensor, lse: Tensor, more: Tensor, lse_more: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over two sets of keys, from the output and the log-sum-exp of each."""
    both = torch.logaddexp(lse, lse_more)
    share = torch.exp(lse_more - both).unsqueeze(-1)
    return torch.lerp(out.to(share.dtype), more.to(share.dtype), share), both


def chunks(length: int, group_size: int) -> list[slice]:
    """Cut the noisy stream into runs of whole groups."""
    step = max(1, CHUNK // group_size) * group_size
    return [slice(at, min(at + step, length)) for at in range(0, length, step)]


@functools.lru_cache(maxsize=8)
def _mask(size: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """Return a chunk's additive mask over its own clean keys and, behind them, its own noisy ones: (size, 2·size)."""
    group = torch.arange(size) // group_size
    seen = torch.cat([group.unsqueeze(1) > group, group.unsqueeze(1) == group], 1)
    return torch.zeros(size, 2 * size, dtype=dtype).masked_fill_(~seen, -torch.inf)


def _near(clean: Tensor, own: Tensor, rows: slice, group_size: int) -> Tensor:
    """Return keys or values of a chunk from both streams; from the noisy one alone where the chunk is one group."""
    if rows.stop - rows.start <= group_size:
        return own[:, :, rows]
    return torch.cat([clean[:, :, rows], own[:, :, rows]], 2)


def _mask_of(rows: slice, group_size: int, dtype: torch.dtype) -> Maybe:
    size = rows.stop - rows.start
    return None if size <= group_size else _mask(size, group_size, dtype)


def _self_scores(q: Tensor, own_k: Tensor, scale: float) -> Tensor:
    dtype = compute_dtype(q.dtype)
    return (q.to(dtype) * own_k.to(dtype)).sum(-1) * scale


def _single_forward(out: Tensor, lse: Tensor, q: Tensor, keys: Sequence[Tensor], scale: float) -> None:
    """Attend in groups of one: to the token itself and, by causal attention shifted by one, to earlier clean ones."""
    k, v, own_k, own_v = keys
    out[:, :, :1], lse[:] = own_v[:, :, :1], _self_scores(q, own_k, scale)
    if q.shape[2] > 1:
        before = _flash(q[:, :, 1:], k[:, :, :-1], v[:, :, :-1], 0.0, True, scale=scale)
        out[:, :, 1:], lse[:, :, 1:] = merged(own_v[:, :, 1:], lse[:, :, 1:], *before)


def _grouped_forward(
    out: Tensor, lse: Tensor, q: Tensor, keys: Sequence[Tensor], group_size: int, scale: float
) -> None:
    """Attend in larger groups: a chunk to all clean chunks before it and, under a mask, to itself."""
    k, v, own_k, own_v = keys
    for rows in chunks(q.shape[2], group_size):
        near_k, near_v = _near(k, own_k, rows, group_size), _near(v, own_v, rows, group_size)
        mask = _mask_of(rows, group_size, k.dtype)
        seen = _flash(q[:, :, rows], near_k, near_v, 0.0, False, attn_mask=mask, scale=scale)
        if rows.start:
            far = _flash(q[:, :, rows], k[:, :, : rows.start], v[:, :, : rows.start], 0.0, False, scale=scale)
            seen = merged(*seen, *far)
        out[:, :, rows], lse[:, :, rows] = seen


def _single_backward(
    sums: Sequence[Tensor], grad: Tensor, q: Tensor, keys: Sequence[Tensor], out: Tensor, lse: Tensor, scale: float
) -> None:
    dq, dk, dv, d_own_k, d_own_v = sums
    k, v, own_k, own_v = keys
    wide_grad, wide_q, wide_k, wide_v, wide_out = (t.to(lse.dtype) for t in (grad, q, own_k, own_v, out))
    p = torch.exp(_self_scores(q, own_k, scale) - lse).unsqueeze(-1)
    slope = p * (wide_grad * (wide_v - wide_out)).sum(-1, keepdim=True) * scale
    dq += slope * wide_k
    d_own_k += slope * wide_q
    d_own_v += p * wide_grad
    if q.shape[2] > 1:
        parts = _flash_backward(
            grad[:, :, 1:],
            q[:, :, 1:],
            k[:, :, :-1],
            v[:, :, :-1],
            out[:, :, 1:],
            lse[:, :, 1:],
            0.0,
            True,
            scale=scale,
        )
        dq[:, :, 1:] += parts[0]
        dk[:, :, :-1] += parts[1]
        dv[:, :, :-1] += parts[2]


def _grouped_backward(
    sums: Sequence[Tensor], grad: Tensor, q: Tensor, keys: Sequence[Tensor], out: Tensor, lse: Tensor, group_size: int,
    scale: float,
) -> None:  # fmt: skip
    dq, dk, dv, d_own_k, d_own_v = sums
    k, v, own_k, own_v = keys
    for rows in chunks(q.shape[2], group_size):
        size, before = rows.stop - rows.start, slice(0, rows.start)
        near = _near(k, own_k, rows, group_size), _near(v, own_v, rows, group_size)
        chunk = grad[:, :, rows], q[:, :, rows]
        known = out[:, :, rows], lse[:, :, rows], 0.0, False
        mask = _mask_of(rows, group_size, k.dtype)
        part_q, part_k, part_v = _flash_backward(*chunk, *near, *known, attn_mask=mask, scale=scale)
        dq[:, :, rows] += part_q
        d_own_k[:, :, rows] += part_k[:, :, -size:]
        d_own_v[:, :, rows] += part_v[:, :, -size:]
        if mask is not None:
            dk[:, :, rows] += part_k[:, :, :size]
            dv[:, :, rows] += part_v[:, :, :size]
        if rows.start:
            far = k[:, :, before], v[:, :, before]
            part_q, part_k, part_v = _flash_backward(*chunk, *far, *known, scale=scale)
            dq[:, :, rows] += part_q
            dk[:, :, before] += part_k
            dv[:, :, before] += part_v


def _expanded(k: Tensor, q: Tensor) -> Tensor:
    """Repeat the key heads to one per query head."""
    ratio = q.shape[1] // k.shape[1]
    return k if ratio == 1 else k.repeat_interleave(ratio, 1)


def _folded(grad: Tensor, like: Tensor) -> Tensor:
    """Sum the query heads' gradients into their key heads', in `like`'s dtype and layout."""
    ratio = grad.shape[1] // like.shape[1]
    return torch.empty_like(like).copy_(grad if ratio == 1 else grad.unflatten(1, (-1, ratio)).sum(2))


def _spans(cu_seqlens: Maybe, length: int) -> list[slice]:
    if cu_seqlens is None:
        return [slice(0, length)] if length else []
    return sequences(cu_seqlens)


def forward(
    q: Maybe, k: Tensor, v: Tensor, q_noisy: Tensor, k_noisy: Tensor, v_noisy: Tensor, group_size: int, scale: float,
    cu_seqlens: Maybe,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run two_stream_attention under the CPU key."""
    q, k, v, q_noisy, k_noisy, v_noisy = _rows(q, k, v, q_noisy, k_noisy, v_noisy)
    out_noisy = like_rows(q_noisy)
    lse_noisy = q_noisy.new_empty(q_noisy.shape[:3], dtype=compute_dtype(k.dtype))
    out, lse = (nothing(out_noisy), nothing(lse_noisy)) if q is None else (like_rows(q), torch.empty_like(lse_noisy))
    whole = [_expanded(t, q_noisy) for t in (k, v, k_noisy, v_noisy)]
    for span in _spans(cu_seqlens, k.shape[2]):
        keys = [t[:, :, span] for t in whole]
        noisy = out_noisy[:, :, span], lse_noisy[:, :, span], q_noisy[:, :, span], keys
        _single_forward(*noisy, scale) if group_size == 1 else _grouped_forward(*noisy, group_size, scale)
        if q is not None:
            out[:, :, span], lse[:, :, span] = _flash(q[:, :, span], *keys[:2], 0.0, True, scale=scale)
    return out, out_noisy, lse, lse_noisy


def backward(
    grad: Maybe, grad_noisy: Tensor, q: Maybe, k: Tensor, v: Tensor, q_noisy: Tensor, k_noisy: Tensor, v_noisy: Tensor,
    out: Tensor, out_noisy: Tensor, lse: Tensor, lse_noisy: Tensor, group_size: int, scale: float, cu_seqlens: Maybe,
) -> list[Tensor]:  # fmt: skip
    """Return the op's gradients under the CPU key: of q (empty without), k, v and the noisy ones."""
    likes = q, q_noisy, k, v, k_noisy, v_noisy  # gradients have their layouts
    q, k, v, q_noisy, k_noisy, v_noisy = _rows(q, k, v, q_noisy, k_noisy, v_noisy)
    grad, grad_noisy = _rows(grad, grad_noisy)
    whole = [_expanded(t, q_noisy) for t in (k, v, k_noisy, v_noisy)]
    wide = [torch.zeros(t.shape, dtype=compute_dtype(t.dtype)) for t in (q_noisy, q_noisy, *whole)]
    for span in _spans(cu_seqlens, k.shape[2]):
        keys, sums = [t[:, :, span] for t in whole], [t[:, :, span] for t in wide]
        noisy = sums[1:], grad_noisy[:, :, span], q_noisy[:, :, span], keys
        known = out_noisy[:, :, span], lse_noisy[:, :, span]
        if group_size == 1:
            _single_backward(*noisy, *known, scale)
        else:
            _grouped_backward(*noisy, *known, group_size, scale)
        if q is not None and grad is not None:
            clean = (t[:, :, span] for t in (out, lse))
            parts = _flash_backward(grad[:, :, span], q[:, :, span], *keys[:2], *clean, 0.0, True, scale=scale)
            for total, part in zip((sums[0], sums[2], sums[3]), parts, strict=True):
                total += part
    grads = [nothing(grad_noisy) if like is None else _folded(g, like) for g, like in zip(wide, likes, strict=True)]
    dq, dq_noisy, dk, dv, dk_noisy, dv_noisy = grads
    return [dq, dk, dv, dq_noisy, dk_noisy, dv_noisy]


def decode(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lengths: Maybe, scale: float
) -> Tensor:
    """Run two_stream_decode under the CPU key. Query heads that share a key head become rows of one."""
    q, k, v, k_cache, v_cache = _rows(q, k, v, k_cache, v_cache)
    result, (B, H, group, D), heads = like_rows(q), q.shape, k.shape[1]
    if not q.numel():
        return result
    rows = q.reshape(B, heads, -1, D)
    out, lse = _flash(rows, k, v, 0.0, False, scale=scale)
    lengths = [k_cache.shape[2]] if cache_lengths is None else cache_lengths.tolist()
    for b, length in enumerate(lengths):
        sample = slice(None) if cache_lengths is None else slice(b, b + 1)
        if length:
            keys, values = k_cache[sample, :, :length], v_cache[sample, :, :length]
            cached = _flash(rows[sample], keys, values, 0.0, False, scale=scale)
            out[sample] = merged(out[sample], lse[sample], *cached)[0]
    return result.copy_(out.view(B, H, group, D))
