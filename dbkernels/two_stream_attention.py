"""two_stream_attention: a clean and a noisy copy of a sequence, as autoregressive and block diffusion train.

The definition first, then the op, its gradient and the public function. The kernels are dbkernels/two_stream_cpu.py and
dbkernels/triton/two_stream*.py, which begin at two_stream.py; cuDNN serves where it is faster (`two_stream_choice`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from dbkernels import two_stream_cpu as cpu
from dbkernels._autocast import autocast
from dbkernels._direct import direct
from dbkernels._dtypes import compute_dtype
from dbkernels._levels import as_defined
from dbkernels._library import define, register, register_triton
from dbkernels._two_stream import check_arguments, kind_of, like_rows, nothing, sequences

Maybe: TypeAlias = Tensor | None
Four: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]


class TwoStreams(NamedTuple):
    """Result of `two_stream_attention` with return_lse. Without clean queries, out and lse are None."""

    out: Tensor | None
    out_noisy: Tensor
    lse: Tensor | None
    lse_noisy: Tensor


def visible(length: int, group_size: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the masks, each (N, N) bool, one row per query: clean to clean, noisy to clean, noisy to noisy."""
    place = torch.arange(length, device=device)
    group = place // group_size
    clean = place.unsqueeze(1) >= place
    return clean, group.unsqueeze(1) > group, group.unsqueeze(1) == group


def _dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Compute attention under a mask, and the log-sum-exp of its scores, in the compute dtype."""
    dtype = compute_dtype(q.dtype)
    ratio = q.shape[1] // k.shape[1]
    k, v = (t.to(dtype).repeat_interleave(ratio, 1) for t in (k, v))
    scores = (q.to(dtype) * scale) @ k.transpose(-1, -2)
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    return torch.exp(scores - lse.unsqueeze(-1)) @ v, lse


def two_stream_attention_reference(
    q: Maybe, k: Tensor, v: Tensor, q_noisy: Tensor, k_noisy: Tensor, v_noisy: Tensor, group_size: int, scale: float,
    cu_seqlens: Maybe = None,
) -> Four:  # fmt: skip
    """Return (out, out_noisy, lse, lse_noisy) by the definition, differentiable; out and lse are empty without q."""
    if cu_seqlens is not None:
        streams = q, k, v, q_noisy, k_noisy, v_noisy
        return _over_sequences(streams, group_size, scale, cu_seqlens)
    clean, noisy, own = visible(k.shape[2], group_size, k.device)
    keys, values = torch.cat([k, k_noisy], 2), torch.cat([v, v_noisy], 2)
    out_noisy, lse_noisy = _dense(q_noisy, keys, values, torch.cat([noisy, own], 1), scale)
    if q is None:
        out, lse = nothing(out_noisy), nothing(lse_noisy)
    else:
        out, lse = _dense(q, k, v, clean, scale)
    return out.to(k.dtype), out_noisy.to(k.dtype), lse, lse_noisy


def _over_sequences(streams: Sequence[Any], group_size: int, scale: float, cu_seqlens: Tensor) -> Four:
    pieces = []
    for span in sequences(cu_seqlens):
        q, k, v, q_noisy, k_noisy, v_noisy = (None if t is None else t[:, :, span] for t in streams)
        pieces.append(two_stream_attention_reference(q, k, v, q_noisy, k_noisy, v_noisy, group_size, scale))
    joined: Any = [torch.cat(parts, 0 if parts[0].dim() == 1 else 2) for parts in zip(*pieces, strict=True)]
    return tuple(joined)  # type: ignore[return-value]


def _definition(q: Maybe, *rest: Any) -> Four:
    out, out_noisy, lse, lse_noisy = two_stream_attention_reference(q, *rest)
    outs = [t if t.dim() == 1 else like_rows(t).copy_(t) for t in (out, out_noisy)]
    return outs[0], outs[1], lse.contiguous(), lse_noisy.contiguous()


def _fake(q: Maybe, k: Tensor, v: Tensor, q_noisy: Tensor, *rest: Any) -> Four:
    lse_noisy = q_noisy.new_empty(q_noisy.shape[:3], dtype=compute_dtype(q_noisy.dtype))
    none = q_noisy.new_empty(0), lse_noisy.new_empty(0)
    out, lse = none if q is None else (like_rows(q), torch.empty_like(lse_noisy))
    return out, like_rows(q_noisy), lse, lse_noisy


def _backward_definition(grad: Maybe, grad_noisy: Tensor, *rest: Any) -> list[Tensor]:
    *streams, _, _, _, _, group_size, scale, cu_seqlens = rest
    wide: Any = [None if t is None else t.detach().to(compute_dtype(t.dtype)).requires_grad_() for t in streams]
    with torch.enable_grad():
        reference: Any = two_stream_attention_reference
        out, out_noisy, *_ = reference(*wide, group_size, scale, cu_seqlens)
    outs, ups = [out_noisy], [grad_noisy.to(out_noisy.dtype)]
    if grad is not None:
        outs, ups = [*outs, out], [*ups, grad.to(out.dtype)]
    grads = iter(torch.autograd.grad(outs, [t for t in wide if t is not None], ups))
    return [nothing(grad_noisy) if t is None else torch.empty_like(t).copy_(next(grads)) for t in streams]


def _backward_fake(grad: Maybe, grad_noisy: Tensor, *rest: Any) -> list[Tensor]:
    return [grad_noisy.new_empty(0) if t is None else torch.empty_like(t) for t in rest[:6]]


_STREAMS = "Tensor? q, Tensor k, Tensor v, Tensor q_noisy, Tensor k_noisy, Tensor v_noisy"
_OPTIONS = "SymInt group_size, float scale, Tensor? cu_seqlens"
define(f"two_stream_attention({_STREAMS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)", _definition, _fake)
define(
    f"two_stream_attention_backward(Tensor? grad, Tensor grad_noisy, {_STREAMS}, Tensor out, Tensor out_noisy, "
    f"Tensor lse, Tensor lse_noisy, {_OPTIONS}) -> Tensor[]",
    _backward_definition,
    _backward_fake,
)
register("two_stream_attention", "CPU", cpu.forward, "PyTorch's flash attention, merged")
register("two_stream_attention_backward", "CPU", cpu.backward, "PyTorch's flash attention, merged")


def _triton_forward(
    q: Maybe, k: Tensor, v: Tensor, q_noisy: Tensor, k_noisy: Tensor, v_noisy: Tensor, group_size: int, scale: float,
    cu_seqlens: Maybe, kind: Any = None,
) -> Four:  # fmt: skip
    from dbkernels.triton.two_stream import forward

    if not k.numel():
        return _fake(q, k, v, q_noisy)
    return forward(q, k, v, q_noisy, k_noisy, v_noisy, group_size, scale, cu_seqlens, kind)


def _triton_backward(
    grad: Maybe, grad_noisy: Tensor, q: Maybe, k: Tensor, v: Tensor, q_noisy: Tensor, k_noisy: Tensor, v_noisy: Tensor,
    out: Tensor, out_noisy: Tensor, lse: Tensor, lse_noisy: Tensor, group_size: int, scale: float, cu_seqlens: Maybe,
) -> list[Tensor]:  # fmt: skip
    from dbkernels.triton.two_stream import backward

    if not k.numel():
        return _backward_fake(grad, grad_noisy, q, k, v, q_noisy, k_noisy, v_noisy)
    streams = q, k, v, q_noisy, k_noisy, v_noisy
    outs = out, out_noisy, lse, lse_noisy
    return backward(grad, grad_noisy, *streams, *outs, group_size, scale, cu_seqlens)


register_triton("two_stream_attention", _triton_forward)
register_triton("two_stream_attention_backward", _triton_backward)


class _TwoStreamAttention(torch.autograd.Function):
    """The op with its gradient. Last argument: the kind of input, if the call bypasses the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Four:
        *given, kind = arguments
        outs = _run(given, kind)
        ctx.options = given[6:8]
        ctx.save_for_backward(*given[:6], *outs, given[8])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(outs[2], outs[3])
        return outs

    @staticmethod
    def backward(ctx: Any, grad: Maybe, grad_noisy: Maybe, *unused: Any) -> tuple[Maybe, ...]:
        # Not once_differentiable: where upstream is a constant, it would let the gradient pass for a constant too.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "two_stream_attention has no second derivative: drop create_graph=True, or use "
                "two_stream_attention_reference"
            )
        *saved, cu_seqlens = ctx.saved_tensors
        q, out, out_noisy = saved[0], saved[6], saved[7]
        grad_noisy = torch.zeros_like(out_noisy) if grad_noisy is None else grad_noisy
        grad = torch.zeros_like(out) if grad is None and q is not None else grad
        given = None if q is None else grad, grad_noisy, *saved, *ctx.options, cu_seqlens
        if direct(grad_noisy, *given[:1], *saved, cu_seqlens):
            grads = _triton_backward(*given)
        else:
            grads = torch.ops.dbkernels.two_stream_attention_backward.default(*given)
        return None if q is None else grads[0], *grads[1:], None, None, None, None


def _run(given: Any, kind: Any) -> Four:
    """Run the op. A known kind of input bypasses the dispatcher, which takes longer than a small kernel."""
    if kind is None:
        return torch.ops.dbkernels.two_stream_attention.default(*given)
    return _triton_forward(*(*given, kind))


def _accept(given: Any) -> tuple[Any, float]:
    """Return the kind of input, None where the op must go through the dispatcher, and the scale.

    Raises:
        TypeError, ValueError: as `check_arguments`, which runs once per kind on a GPU.
    """
    q, k, *others, _, _, cu_seqlens = given
    if not isinstance(k, Tensor) or not direct(k, q, *others, cu_seqlens):
        return None, check_arguments(*given)
    from dbkernels.triton.two_stream import accepted

    kind = kind_of(*given)
    number = accepted.get(kind)
    return kind, accepted.keep(kind, check_arguments(*given)) if number is None else number


def two_stream_attention(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    q_noisy: Tensor,
    k_noisy: Tensor,
    v_noisy: Tensor,
    *,
    group_size: int = 1,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor | None, Tensor] | TwoStreams:
    """Attend within the clean and the noisy copy of a sequence.

    Clean token i attends to clean tokens up to i; noisy token i, of group g = i // group_size, attends to the clean
    tokens of the groups before g and to the noisy tokens of g. Memory grows as N, work as N² + N·group_size: masked
    scores are never computed, and no mask is stored. On a GPU the first call with a new kind of input times several
    paths (`two_stream_choice`), for which it needs a second set of outputs.

    Args:
        q: clean queries (B, H, N, D), or None in the last layer of a block, which needs none: only noisy tokens attend.
        k, v: clean keys and values, (B, H_kv, N, D) with H a multiple of H_kv (grouped-query heads).
        q_noisy, k_noisy, v_noisy: the noisy stream's, shaped as the clean ones. float16, bfloat16, float32 or (except
            on GPUs) float64; D 32, 64, 80, 96, 128 or 256 on GPUs, any on CPUs. Any strides; no copy on GPUs where the
            last one is 1. Sums are float32 (float64 for float64). Autocast casts as for PyTorch's attention.
        group_size: tokens denoised together, 1 to N. A last group may be shorter.
        scale: of the scores, positive; 1/sqrt(D) by default.
        cu_seqlens: (S + 1,) int32, for sequences of any lengths one after the other in tensors of B = 1: sequence s is
            tokens cu_seqlens[s] to cu_seqlens[s + 1] - 1, from 0 to N. Values are checked on the CPU only.
        return_lse: also return the log-sum-exp of each row's scores, in nats, not differentiable.

    Returns:
        (out, out_noisy), shaped as the queries and laid out as (B, N, H, D), so that joining the heads copies nothing;
        out is None without q. With return_lse, (out, out_noisy, lse, lse_noisy), the latter (B, H, N) float32.

    Raises:
        TypeError: an argument isn't a floating tensor or a number.
        ValueError: dtypes, shapes or options aren't supported; lists every reason.
        RuntimeError: in backward, a second derivative is requested.

    Source: Arriola et al. 2025 (Block Diffusion), section 5; Dao 2023 (FlashAttention-2).
    """
    streams: Any = q, k, v, q_noisy, k_noisy, v_noisy
    if torch._C._is_any_autocast_enabled():
        streams = [autocast(t) for t in streams]
    kind, number = _accept((*streams, group_size, scale, cu_seqlens))
    arguments = *streams, group_size, number, cu_seqlens
    if as_defined():
        outs = two_stream_attention_reference(*arguments)
    elif kind is None or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in streams)):
        outs = _TwoStreamAttention.apply(*arguments, kind)
    else:
        outs = _run(arguments, kind)
    out, out_noisy, lse, lse_noisy = outs
    if q is None:
        out = lse = None
    return TwoStreams(out, out_noisy, lse, lse_noisy) if return_lse else (out, out_noisy)
