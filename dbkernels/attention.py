"""attention: plain full or causal attention by the library that is fastest here, measured once per kind of input."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as functional
from torch import Tensor

from dbkernels._fastest import Candidate, Choice, fastest, untimed

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, bool, "float | None"], Tensor]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)


def _xformers(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    from xformers import ops

    bias = ops.LowerTriangularMask() if causal else None
    rows = (t.transpose(1, 2) for t in (q, k, v))
    return ops.memory_efficient_attention(*rows, attn_bias=bias, scale=scale).transpose(1, 2)


@functools.cache
def _installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def _candidates(q: Tensor, k: Tensor) -> dict[str, Attend]:
    candidates: dict[str, Attend] = {"sdpa": _sdpa}
    half = q.dtype in (torch.float16, torch.bfloat16)
    if half and q.shape[1] == k.shape[1] and _installed("xformers"):
        candidates["xformers"] = _xformers
    return candidates


def _candidate(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, train: bool
) -> Candidate:
    """Return a call that runs the forward and, in training, the backward pass."""
    leaves: Any = [t.detach().requires_grad_(train) for t in (q, k, v)]

    def call() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            out = attend(leaves[0], leaves[1], leaves[2], causal, scale)
        grads = torch.autograd.grad(out, leaves, out.detach()) if train else ()
        return out.detach(), *grads

    return call


_chosen: dict[tuple[object, ...], Choice] = {}


def _kind(q: Tensor, k: Tensor, causal: bool, train: bool) -> tuple[object, ...]:
    """Return the key that a timing holds for: lengths and batches to within a factor of two."""
    sizes = (q.shape[0] * q.shape[1], q.shape[2], k.shape[2])
    return q.device, q.dtype, q.shape[3], q.shape[1] == k.shape[1], causal, train, *(n.bit_length() for n in sizes)


def attention_choice(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None) -> Choice:
    """Return which library `attention` takes for such input, and why.

    On a GPU the first call with a new kind of input times them.

    Args, Raises: as for `attention`.

    Returns:
        Choice: name ("sdpa" or "xformers"), reason, milliseconds per timed library.
    """
    _check(q, k, v, causal, scale)
    libraries = _candidates(q, k) if q.device.type == "cuda" else {"sdpa": _sdpa}
    if len(libraries) == 1:
        return Choice("sdpa", f"no other library serves {q.dtype} with these heads on {q.device.type}")
    if untimed():
        return Choice("sdpa", "nothing can be timed within torch.compile or a CUDA graph")
    train = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    kind = _kind(q, k, causal, train)
    if kind not in _chosen:
        choice = fastest({name: _candidate(way, q, k, v, causal, scale, train) for name, way in libraries.items()})
        if not choice.milliseconds:
            return choice
        _chosen[kind] = choice
    return _chosen[kind]


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None) -> Tensor:
    """Compute softmax(q·k·scale)·v, full or causal.

    Runs PyTorch's scaled_dot_product_attention or xformers, whichever is faster for such input here
    (`attention_choice` returns which).

    Args:
        q: (B, H, N, D); k, v: (B, H_kv, M, D), H a multiple of H_kv, N = M if causal. float16, bfloat16, float32 or
            float64.
        causal: query i attends to keys up to i. scale: of the scores, positive; 1/sqrt(D) by default.

    Returns:
        (B, H, N, D) of q's dtype.

    Raises:
        TypeError: an argument isn't a floating tensor.
        ValueError: shapes, dtypes or scale don't fit.

    Source: Vaswani et al. 2017.
    """
    _check(q, k, v, causal, scale)
    if q.device.type == "cpu":  # nothing to choose from
        return _sdpa(q, k, v, causal, scale)
    name = attention_choice(q, k, v, causal=causal, scale=scale).name
    return {"sdpa": _sdpa, "xformers": _xformers}[name](q, k, v, causal, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> None:
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, got {getattr(tensor, 'dtype', type(tensor))}")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be (B, H, N, D), got {tuple(tensor.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q of shape {tuple(q.shape)} doesn't fit k of shape {tuple(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v has shape {tuple(v.shape)}, k {tuple(k.shape)}: they may differ in D alone")
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(f"causal attention needs as many queries as keys, got {q.shape[2]} and {k.shape[2]}")
    if scale is not None and not 0.0 < scale < math.inf:  # a masked score times 0 or less isn't masked any more
        raise ValueError(f"scale={scale} must be positive and finite: for another sign, negate the queries")
