"""two_stream_attention on the CPU: PyTorch's flash attention over parts of the keys, merged by their log-sum-exp.

No mask larger than a chunk is ever in memory. Given the merged output and log-sum-exp, the backward pass of each part is
exact by itself: its weights are P = exp(S - lse), whatever the other parts are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

Maybe: TypeAlias = Tensor | None
CHUNK = 64  # noisy tokens that share a call, where groups are smaller

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def sequences(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """(begin, end) of each sequence that isn't empty."""
    ends = cu_seqlens.tolist()
    return [(a, b) for a, b in zip(ends, ends[1:], strict=False) if b > a]


def nothing(like: Tensor) -> Tensor:
    """What stands for an output that there isn't."""
    return like.new_empty(0)


def like_rows(q: Tensor) -> Tensor:
    """Empty, of q's shape (B, H, N, D), laid out as (B, N, H, D)."""
    B, H, N, D = q.shape
    return q.new_empty(B, N, H, D).transpose(1, 2)


class Attended:
    """Output and log-sum-exp of some rows over the keys merged so far, in the sums' dtype."""

    def __init__(self, out: Tensor, lse: Tensor):
        self.out, self.lse = out.to(lse.dtype), lse

    def merge(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Rows `rows` attend to further keys as well."""
        before = self.lse[:, :, rows]
        both = torch.logaddexp(before, lse)
        kept, added = (torch.exp(part - both).unsqueeze(-1) for part in (before, lse))
        self.out[:, :, rows] = self.out[:, :, rows] * kept + out * added
        self.lse[:, :, rows] = both


def chunks(length: int, group_size: int) -> list[slice]:
    """The noisy stream cut into runs of whole groups."""
    step = max(1, CHUNK // group_size) * group_size
    return [slice(at, min(at + step, length)) for at in range(0, length, step)]


def _mask(size: int, group_size: int, like: Tensor) -> Maybe:
    """What a chunk's tokens see of its own clean keys and, behind them, of its own noisy ones, to add to the scores."""
    group = torch.arange(size) // group_size
    seen = torch.cat([group.unsqueeze(1) > group, group.unsqueeze(1) == group], 1)
    return torch.zeros(size, 2 * size, dtype=like.dtype).masked_fill_(~seen, -torch.inf)


def _self_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (q.to(dtype) * k.to(dtype)).sum(-1) * scale


def _noisy_forward(
    q: Tensor, k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor, group_size: int, scale: float
) -> Attended:
    length = q.shape[2]
    if group_size == 1:
        # A token sees itself, then the clean tokens before it: causal attention, one place apart.
        attended = Attended(own_v.clone(), _self_scores(q, own_k, scale))
        if length > 1:
            part = _flash(q[:, :, 1:], k[:, :, :-1], v[:, :, :-1], 0.0, True, scale=scale)
            attended.merge(slice(1, None), *part)
        return attended
    attended = Attended(torch.empty_like(q), _self_scores(q, q, 0.0))
    for rows in chunks(length, group_size):
        keys, values, mask = _near(k, v, own_k, own_v, rows, group_size)
        out, lse = _flash(q[:, :, rows], keys, values, 0.0, False, attn_mask=mask, scale=scale)
        attended.out[:, :, rows], attended.lse[:, :, rows] = out, lse
        if rows.start:
            before = slice(0, rows.start)
            part = _flash(q[:, :, rows], k[:, :, before], v[:, :, before], 0.0, False, scale=scale)
            attended.merge(rows, *part)
    return attended


def _near(
    k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor, rows: slice, group_size: int
) -> tuple[Tensor, Tensor, Maybe]:
    """Keys and values of a chunk by both streams, and the mask; by the noisy one alone where the chunk is one group."""
    if rows.stop - rows.start <= group_size:
        return own_k[:, :, rows], own_v[:, :, rows], None
    keys = torch.cat([k[:, :, rows], own_k[:, :, rows]], 2)
    values = torch.cat([v[:, :, rows], own_v[:, :, rows]], 2)
    return keys, values, _mask(rows.stop - rows.start, group_size, k)


class Gradients:
    """Sums of what the parts add to the gradients of one stream's q, k and v, in the sums' dtype."""

    def __init__(self, *tensors: Tensor):
        dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
        self.sums = [torch.zeros(t.shape, dtype=dtype) for t in tensors]

    def add(self, index: int, rows: slice, grad: Tensor) -> None:
        self.sums[index][:, :, rows] += grad


def _noisy_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor, out: Tensor, lse: Tensor,
    group_size: int, scale: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, own_k, own_v."""
    sums = Gradients(q, k, v, own_k, own_v)

    def part(rows: slice, keys: Tensor, values: Tensor, causal: bool, mask: Maybe = None) -> tuple[Tensor, ...]:
        return _flash_backward(
            grad[:, :, rows], q[:, :, rows], keys, values, out[:, :, rows], lse[:, :, rows], 0.0, causal,
            attn_mask=mask, scale=scale,
        )  # fmt: skip

    if group_size == 1:
        _single_backward(sums, grad, q, own_k, own_v, out, lse, scale)
        if q.shape[2] > 1:
            before, behind = slice(0, -1), slice(1, None)
            dq, dk, dv = part(behind, k[:, :, before], v[:, :, before], True)
            sums.add(0, behind, dq), sums.add(1, before, dk), sums.add(2, before, dv)
        return sums.sums
    for rows in chunks(q.shape[2], group_size):
        keys, values, mask = _near(k, v, own_k, own_v, rows, group_size)
        dq, dk, dv = part(rows, keys, values, False, mask)
        size = rows.stop - rows.start
        sums.add(0, rows, dq), sums.add(3, rows, dk[:, :, -size:]), sums.add(4, rows, dv[:, :, -size:])
        if mask is not None:
            sums.add(1, rows, dk[:, :, :size]), sums.add(2, rows, dv[:, :, :size])
        if rows.start:
            before = slice(0, rows.start)
            dq, dk, dv = part(rows, k[:, :, before], v[:, :, before], False)
            sums.add(0, rows, dq), sums.add(1, before, dk), sums.add(2, before, dv)
    return sums.sums


def _single_backward(
    sums: Gradients, grad: Tensor, q: Tensor, own_k: Tensor, own_v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> None:
    """What a token's look at itself adds."""
    wide = [t.to(lse.dtype) for t in (grad, q, own_k, own_v, out)]
    grad, q, own_k, own_v, out = wide
    p = torch.exp(_self_scores(q, own_k, scale) - lse).unsqueeze(-1)
    slope = p * (grad * (own_v - out)).sum(-1, keepdim=True) * scale
    every = slice(None)
    sums.add(0, every, slope * own_k), sums.add(3, every, slope * q), sums.add(4, every, p * grad)


def _expanded(k: Tensor, q: Tensor) -> Tensor:
    """A key head for each query head."""
    ratio = q.shape[1] // k.shape[1]
    return k if ratio == 1 else k.repeat_interleave(ratio, 1)


def _folded(grad: Tensor, like: Tensor) -> Tensor:
    """The gradient of grouped heads, summed into theirs, with `like`'s dtype and layout."""
    ratio = grad.shape[1] // like.shape[1]
    return torch.empty_like(like).copy_(grad if ratio == 1 else grad.unflatten(1, (-1, ratio)).sum(2))


def _over_sequences(cu_seqlens: Maybe, length: int) -> Iterator[slice]:
    spans = [(0, length)] if cu_seqlens is None else sequences(cu_seqlens)
    return (slice(*span) for span in spans if span[1] > span[0])


def _cut(rows: slice) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor[:, :, rows]


def forward(
    q: Maybe, k: Tensor, v: Tensor, q_noisy: Tensor, k_noisy: Tensor, v_noisy: Tensor, group_size: int, scale: float,
    cu_seqlens: Maybe,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The op under the CPU key."""
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    out_noisy, lse_noisy = like_rows(q_noisy), q_noisy.new_empty(q_noisy.shape[:3], dtype=dtype)
    out, lse = (nothing(out_noisy), nothing(lse_noisy)) if q is None else (like_rows(q), torch.empty_like(lse_noisy))
    keys = [_expanded(t, q_noisy) for t in (k, v, k_noisy, v_noisy)]
    for rows in _over_sequences(cu_seqlens, k.shape[2]):
        cut = _cut(rows)
        attended = _noisy_forward(cut(q_noisy), *map(cut, keys), group_size, scale)
        out_noisy[:, :, rows], lse_noisy[:, :, rows] = attended.out, attended.lse
        if q is not None:
            out[:, :, rows], lse[:, :, rows] = _flash(cut(q), cut(keys[0]), cut(keys[1]), 0.0, True, scale=scale)
    return out, out_noisy, lse, lse_noisy


def backward(
    grad: Maybe, grad_noisy: Tensor, q: Maybe, k: Tensor, v: Tensor, q_noisy: Tensor, k_noisy: Tensor, v_noisy: Tensor,
    out: Tensor, out_noisy: Tensor, lse: Tensor, lse_noisy: Tensor, group_size: int, scale: float, cu_seqlens: Maybe,
) -> list[Tensor]:  # fmt: skip
    """The op's gradient under the CPU key: of q (or nothing), k, v and the noisy ones."""
    keys = [_expanded(t, q_noisy) for t in (k, v, k_noisy, v_noisy)]
    wide = Gradients(q_noisy, q_noisy, *keys).sums
    for rows in _over_sequences(cu_seqlens, k.shape[2]):
        cut: Any = _cut(rows)
        noisy = _noisy_backward(
            cut(grad_noisy), cut(q_noisy), *map(cut, keys), cut(out_noisy), cut(lse_noisy), group_size, scale
        )
        for total, part in zip(wide[1:], noisy, strict=True):
            total[:, :, rows] = part
        if q is not None and grad is not None:
            clean = _flash_backward(
                cut(grad), cut(q), cut(keys[0]), cut(keys[1]), cut(out), cut(lse), 0.0, True, scale=scale
            )
            wide[0][:, :, rows] = clean[0]
            wide[2][:, :, rows] += clean[1]
            wide[3][:, :, rows] += clean[2]
    dq = nothing(grad_noisy) if q is None else _folded(wide[0], q)
    likes = (q_noisy, k, v, k_noisy, v_noisy)
    dq_noisy, dk, dv, dk_noisy, dv_noisy = (_folded(g, like) for g, like in zip(wide[1:], likes, strict=True))
    return [dq, dk, dv, dq_noisy, dk_noisy, dv_noisy]
