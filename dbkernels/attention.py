"""attention: plain full or causal attention by whichever library is fastest here, measured once a kind of input."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.functional as functional
from torch import Tensor

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, bool, "float | None"], Tensor]


@dataclass(frozen=True)
class Choice:
    """Which library attends, and why. milliseconds: what each took, where they were timed."""

    name: str
    reason: str
    milliseconds: dict[str, float] = field(default_factory=dict)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)


def _xformers(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    from xformers import ops

    bias = ops.LowerTriangularMask() if causal else None
    rows = (t.transpose(1, 2) for t in (q, k, v))
    return ops.memory_efficient_attention(*rows, attn_bias=bias, scale=scale).transpose(1, 2)


def _candidates(q: Tensor, k: Tensor) -> dict[str, Attend]:
    found: dict[str, Attend] = {"sdpa": _sdpa}
    half = q.dtype in (torch.float16, torch.bfloat16)
    if half and q.shape[1] == k.shape[1] and importlib.util.find_spec("xformers") is not None:
        found["xformers"] = _xformers
    return found


def _timed(attend: Attend, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, train: bool) -> float:
    """Milliseconds on the GPU, forward and, in training, backward: the median of five calls after two."""
    leaves: Any = [t.detach().requires_grad_(train) for t in (q, k, v)]
    times = []
    for _ in range(7):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        with torch.enable_grad():
            out = attend(leaves[0], leaves[1], leaves[2], causal, scale)
        if train:
            torch.autograd.grad(out, leaves, out.detach())
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times[2:])


_chosen: dict[tuple[object, ...], Choice] = {}


def _kind(q: Tensor, k: Tensor, causal: bool, train: bool) -> tuple[object, ...]:
    """What a timing holds for: lengths and batches to within a factor of two."""
    sizes = (q.shape[0] * q.shape[1], q.shape[2], k.shape[2])
    return q.device, q.dtype, q.shape[3], q.shape[1] == k.shape[1], causal, train, *(n.bit_length() for n in sizes)


def attention_choice(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None) -> Choice:
    """Which library `attention` takes for such input, and why. On a GPU the first call of a kind times them.

    Args, Raises: as for `attention`.

    Returns:
        Choice: name ("sdpa" or "xformers"), reason, milliseconds of each that was timed.
    """
    _check(q, k, v, causal)
    found = _candidates(q, k) if q.device.type == "cuda" else {"sdpa": _sdpa}
    if len(found) == 1:
        return Choice("sdpa", f"no other library serves {q.dtype} with these heads on {q.device.type}")
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return Choice("sdpa", "nothing can be timed within torch.compile or a CUDA graph")
    train = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    kind = _kind(q, k, causal, train)
    if kind not in _chosen:
        times = {name: _timed(attend, q, k, v, causal, scale, train) for name, attend in found.items()}
        _chosen[kind] = Choice(min(times, key=times.__getitem__), "the fastest of those timed", times)
    return _chosen[kind]


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None) -> Tensor:
    """softmax(q·k·scale)·v, full or causal, by PyTorch's scaled_dot_product_attention or by xformers, whichever is
    faster for such input here; `attention_choice` says which.

    Args:
        q: (B, H, N, D); k, v: (B, H_kv, M, D), H a multiple of H_kv, N = M if causal. float16, bfloat16, float32 or
            float64.
        causal: query i sees keys up to i. scale: of the scores; 1/sqrt(D) by default.

    Returns:
        (B, H, N, D) of q's dtype.

    Raises:
        TypeError: an argument isn't a floating tensor. ValueError: shapes don't fit.

    Source: Vaswani et al. 2017.
    """
    name = attention_choice(q, k, v, causal=causal, scale=scale).name
    return {"sdpa": _sdpa, "xformers": _xformers}[name](q, k, v, causal, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, got {getattr(tensor, 'dtype', type(tensor))}")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be (B, H, N, D), got {tuple(tensor.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q of shape {tuple(q.shape)} doesn't fit k of shape {tuple(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v has shape {tuple(v.shape)}, k {tuple(k.shape)}: they must be alike but for D")
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(f"causal attention needs as many queries as keys, got {q.shape[2]} and {k.shape[2]}")
