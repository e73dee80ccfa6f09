"""Shared by the two-stream ops: checks that list every reason in one message, and the outputs' layout."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dbkernels._dtypes import FLOATS
from dbkernels._levels import readable

HEAD_DIMS = (32, 64, 80, 96, 128, 256)  # of the GPU kernels


def sequences(cu_seqlens: Tensor) -> list[slice]:
    """Return the span of each sequence that isn't empty. cu_seqlens: (S + 1,)."""
    return [slice(begin, end) for begin, end in pairwise(cu_seqlens.tolist()) if end > begin]


def nothing(like: Tensor) -> Tensor:
    """Return an empty placeholder for an output that wasn't requested."""
    return like.new_empty(0)


def like_rows(q: Tensor) -> Tensor:
    """Return an uninitialised tensor of q's shape (B, H, N, D), laid out as (B, N, H, D)."""
    B, H, N, D = q.shape
    return torch.empty_strided((B, H, N, D), (N * H * D, D, H * D, 1), dtype=q.dtype, device=q.device)


def kind_of(*arguments: Any) -> tuple[Any, ...]:
    """Return the key of checks, launches and paths: all properties of the arguments but the tensors' values."""
    return tuple(
        [
            (t.dtype, t.shape, t.stride(), t.get_device()) if isinstance(t, Tensor) else (t.__class__, t)
            for t in arguments
        ]
    )


def check_arguments(
    q: Any, k: Any, v: Any, q_noisy: Any, k_noisy: Any, v_noisy: Any, group_size: int, scale: float | None,
    cu_seqlens: Any,
) -> float:  # fmt: skip
    """Check the arguments of `two_stream_attention` and return the scale.

    Raises:
        TypeError: an argument isn't a tensor or a number.
        ValueError: shapes, dtypes, devices or options don't fit; lists all reasons.
    """
    tensors = {"q": q, "k": k, "v": v, "q_noisy": q_noisy, "k_noisy": k_noisy, "v_noisy": v_noisy}
    if q is None:
        del tensors["q"]
    _check_types(tensors, scale)
    if isinstance(group_size, bool) or not isinstance(group_size, (int, torch.SymInt)):
        raise TypeError(f"group_size must be an int, got {type(group_size).__name__}")
    reasons = _shapes(tensors, "k")
    if not reasons:
        reasons = _support(k) + _sequences(k, cu_seqlens)
        length = k.shape[2]
        if not 1 <= group_size <= max(1, length):
            reasons.append(f"group_size={group_size} must be from 1 to N={length}")
    if reasons:
        raise ValueError("two_stream_attention can't take this: " + "; ".join(reasons))
    return float(k.shape[-1] ** -0.5 if scale is None else scale)


def _check_types(tensors: dict[str, Any], scale: float | None) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a floating tensor, got {got}")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat))):
        raise TypeError(f"scale must be a float or None, got {type(scale).__name__}")
    if scale is not None and not 0.0 < scale < math.inf:  # a masked score times 0 or less isn't masked any more
        raise ValueError(f"scale={scale} must be positive and finite: for another sign, negate the queries")


def check_decode(tensors: list[Any], cache_lengths: Any, scale: float | None) -> float:
    """Check q_noisy, k_noisy, v_noisy, k_cache, v_cache and return the scale.

    Raises:
        TypeError, ValueError: as `check_arguments`; ValueError also if a tensor requires a gradient.
    """
    named = dict(zip(("q_noisy", "k_noisy", "v_noisy", "k_cache", "v_cache"), tensors, strict=True))
    _check_types(named, scale)
    _, k, _, k_cache, v_cache = tensors
    own = {name: t for name, t in named.items() if name.endswith("_noisy")}
    reasons = _shapes(own, "k_noisy") or _support(k)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        fits = cache.dim() == 4 and k.dim() == 4 and cache.shape[:2] == k.shape[:2] and cache.shape[3] == k.shape[3]
        if not fits or cache.shape != k_cache.shape:
            reasons.append(f"{name} must be (B, H_kv, L, D) as k_noisy {tuple(k.shape)}, got {tuple(cache.shape)}")
        if cache.dtype != k.dtype or cache.device != k.device:
            reasons.append(f"{name} is {cache.dtype} on {cache.device}, k_noisy {k.dtype} on {k.device}")
    reasons += [] if reasons else _lengths(cache_lengths, k_cache)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        reasons.append("it isn't differentiable: call it under torch.no_grad()")
    if reasons:
        raise ValueError("two_stream_decode can't take this: " + "; ".join(reasons))
    return float(k.shape[-1] ** -0.5 if scale is None else scale)


def _lengths(cache_lengths: Any, k_cache: Tensor) -> list[str]:
    if cache_lengths is None:
        return []
    batch, most = k_cache.shape[0], k_cache.shape[2]
    whole = isinstance(cache_lengths, Tensor) and cache_lengths.dtype in (torch.int32, torch.int64)
    if not whole or cache_lengths.shape != (batch,) or cache_lengths.device != k_cache.device:
        return [f"cache_lengths must be ({batch},) int32 or int64 on {k_cache.device}"]
    if readable(cache_lengths):
        low, high = (int(end) for end in cache_lengths.aminmax())
        if low < 0 or high > most:
            return [f"cache_lengths go from {low} to {high}, and the cache holds {most}"]
    return []


def _shapes(tensors: dict[str, Tensor], key: str) -> list[str]:
    """Return the faults of queries ("q", "q_noisy") and of keys and values, which must have the shape of `key`."""
    wrong = [f"{name} must be (B, H, N, D), got {tuple(t.shape)}" for name, t in tensors.items() if t.dim() != 4]
    if wrong:
        return wrong
    k = tensors[key]
    reasons = []
    for name, t in tensors.items():
        if t.dtype != k.dtype or t.device != k.device:
            reasons.append(f"{name} is {t.dtype} on {t.device} and {key} {k.dtype} on {k.device}: they must match")
        like = tensors["q_noisy"] if name.startswith("q") else k
        if t.shape != like.shape:
            reasons.append(f"{name} has shape {tuple(t.shape)}, not {tuple(like.shape)}")
    queries = tensors["q_noisy"]
    if queries.shape[0] != k.shape[0] or queries.shape[2:] != k.shape[2:]:
        reasons.append(f"q_noisy has shape {tuple(queries.shape)}, {key} {tuple(k.shape)}: only the heads may differ")
    if k.shape[1] == 0 or queries.shape[1] == 0 or queries.shape[1] % k.shape[1]:
        reasons.append(f"H={queries.shape[1]} query heads must be a multiple of H_kv={k.shape[1]} key heads, not 0")
    return reasons


def _support(k: Tensor) -> list[str]:
    reasons = []
    on_gpu = k.device.type == "cuda"
    dtypes = FLOATS[:3] if on_gpu else FLOATS
    if k.dtype not in dtypes:
        reasons.append(f"{k.dtype} isn't among {', '.join(map(str, dtypes))}")
    if k.shape[-1] == 0 or (on_gpu and k.shape[-1] not in HEAD_DIMS):
        reasons.append(f"D={k.shape[-1]} isn't among {', '.join(map(str, HEAD_DIMS))}: pad the heads")
    return reasons


def _sequences(k: Tensor, cu_seqlens: Any) -> list[str]:
    if cu_seqlens is None:
        return []
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1:
        return ["cu_seqlens must be a 1-d int32 tensor"]
    reasons = []
    if len(cu_seqlens) < 2:
        reasons.append("cu_seqlens needs two entries or more: 0 and the end of each sequence")
    if k.shape[0] != 1:
        reasons.append(f"cu_seqlens packs sequences one after the other in B = 1, got B={k.shape[0]}")
    if cu_seqlens.device != k.device:
        reasons.append(f"cu_seqlens is on {cu_seqlens.device}, k on {k.device}")
    elif not reasons and readable(cu_seqlens):
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != k.shape[2] or any(a > b for a, b in pairwise(ends)):
            reasons.append(f"cu_seqlens must rise from 0 to N={k.shape[2]}, got {ends}")
    return reasons
