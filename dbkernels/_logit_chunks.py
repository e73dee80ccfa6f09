"""Logits a chunk of rows at a time: losses and gradients of a vocabulary head, and expectations over its softmax.

Products of halves keep float32 sums: on a GPU by the library, on a CPU by converting blocks of the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dbkernels._levels import compute_dtype

if TYPE_CHECKING:
    from dbkernels.denoising_cross_entropy import Head

CPU_LOGITS, GPU_LOGITS = 2**19, 2**24  # of a chunk: 2 MiB of float32, in the cache; 64 MiB
LEAST_ROWS = 256  # fewer would read the head too often
CONVERTED = 4096  # rows of the head that are converted at once


def spans(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Chunks of rows of logits of a vocabulary of `width`."""
    step = max(LEAST_ROWS, (CPU_LOGITS if device.type == "cpu" else GPU_LOGITS) // width)
    return (slice(at, min(at + step, rows)) for at in range(0, rows, step))


def _blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of the head in the sums' dtype: one, unless they must be converted."""
    dtype = compute_dtype(weight.dtype)
    if weight.dtype == dtype:
        yield slice(None), weight
        return
    for at in range(0, len(weight), CONVERTED):
        rows = slice(at, at + CONVERTED)
        yield rows, weight[rows].to(dtype)


def _mixed(weight: Tensor) -> bool:
    """Whether the library multiplies halves into float32."""
    return weight.device.type == "cuda" and weight.dtype.itemsize == 2


def _wide(a: Tensor, b: Tensor) -> Tensor:
    """The float32 product of halves, by the GPU's library."""
    return torch.mm(a, b, out_dtype=torch.float32)


def logits_of(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, summed and returned in the sums' dtype. x: in it, or as weight on a GPU."""
    if _mixed(weight):
        return _wide(x.to(weight.dtype), weight.T)
    x = x.to(compute_dtype(weight.dtype))
    logits = x.new_empty(len(x), len(weight))
    for rows, block in _blocks(weight):
        torch.mm(x, block.T, out=logits[:, rows]) if block is weight else logits[:, rows].copy_(x @ block.T)
    return logits


def expected_rows(p: Tensor, weight: Tensor) -> Tensor:
    """p @ weight, summed in the sums' dtype."""
    if _mixed(weight):
        return _wide(p.to(weight.dtype), weight)
    if weight.dtype == p.dtype:
        return torch.mm(p, weight)
    total = p.new_zeros(len(p), weight.shape[1])
    for rows, block in _blocks(weight):
        total.addmm_(p[:, rows], block)
    return total


def _times(tensor: Tensor, *factors: Tensor | None) -> Tensor:
    """The product with those factors that there are."""
    for factor in factors:
        tensor = tensor if factor is None else tensor * factor
    return tensor


def _add_outer(total: Tensor, fresh: bool, g: Tensor, x: Tensor, *factors: Tensor | None) -> None:
    """total += (g.T @ x)·factors, summed in total's dtype; fresh: what total held is written over."""
    if g.dtype != total.dtype:
        outer = _times(_wide(g.T, x.to(g.dtype)), *factors)
        total.copy_(outer) if fresh else total.add_(outer)
    else:
        total.addmm_(g.T, _times(x, *factors), beta=0 if fresh else 1)


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """What gradients wait in for the upstream gradient: in float16 a mean's would vanish before a loss scale comes."""
    return torch.float32 if dtype == torch.float16 else dtype


class _State:
    """D of a chunk of rows: x, brought to `size` or less in each row, so that no half overflows."""

    def __init__(self, head: Head, rows: slice):
        dtype = compute_dtype(head.h.dtype)
        x = head.h[rows].to(dtype)
        self.c_out = None if head.c_out is None else head.c_out[rows].unsqueeze(1)
        self.c_skip = None if head.c_skip is None else head.c_skip[rows].unsqueeze(1)
        x = x if self.c_out is None else x * self.c_out
        if head.z is not None:
            x = torch.addcmul(x, head.z[rows].to(dtype), self.c_skip)
        self.length = x.norm(dim=1, keepdim=True).clamp(min=1e-12) if head.normalize else None
        self.x = x if self.length is None else x / self.length
        large = head.z is not None and self.length is None and _mixed(head.weight)
        self.size = self.x.abs().amax(1, keepdim=True).clamp(min=1) if large else None

    def operand(self) -> Tensor:
        return self.x if self.size is None else self.x / self.size

    def backward(self, grad: Tensor) -> Tensor:
        """From the gradient of x to that of c_out·h + c_skip·z."""
        if self.length is None:
            return grad
        return (grad - self.x * (self.x * grad).sum(1, keepdim=True)) / self.length


def _chunk_logits(head: Head, state: _State, rows: slice, half_norms: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Logits of a chunk, and tanh of the capped ones, which their gradient wants."""
    logits, capped = logits_of(state.operand(), head.weight), None
    if state.size is not None:
        logits.mul_(state.size)
    if head.logit_scale is not None:
        logits.mul_(head.logit_scale.to(logits.dtype))
    if head.bias is not None:
        logits.add_(head.bias)
    if head.softcap is not None:
        capped = torch.tanh(logits.div_(head.softcap))
        logits = capped * head.softcap
    if head.posterior_z is not None and head.table is not None and head.precision is not None:
        evidence = logits_of(head.posterior_z[rows], head.table)
        if half_norms is not None:
            evidence.sub_(half_norms)
        logits.addcmul_(evidence, head.precision[rows].unsqueeze(1))
    return logits, capped


class _Sums:
    """The gradients as they add up; of the head's in the sums' dtype."""

    def __init__(self, head: Head, wants: dict[str, bool]):
        self.head, self.dtype = head, compute_dtype(head.h.dtype)
        self.found: dict[str, Tensor] = {}
        for name in wants:
            given = getattr(head, name)
            if wants[name]:
                kind = kept_dtype(given.dtype) if name in ("h", "z", "posterior_z") else self.dtype
                # The first chunk writes over the head's gradient: a fill of it would be felt.
                make = torch.zeros if name in ("bias", "logit_scale") or len(head.h) == 0 else torch.empty
                self.found[name] = make(given.shape, dtype=kind, device=given.device)

    def add(self, state: _State, rows: slice, g: Tensor, unit: Tensor | None, capped: Tensor | None) -> None:
        """g: the gradient of the chunk's logits, in units of `unit`, in the dtype that products take."""
        head, found = self.head, self.found
        if "posterior_z" in found and head.table is not None and head.precision is not None:
            found["posterior_z"][rows] = _times(expected_rows(g, head.table), head.precision[rows].unsqueeze(1), unit)
        if capped is not None:
            g = (g * (1 - capped * capped)).to(g.dtype)
        if "bias" in found:
            found["bias"] += _times(g.sum(0, dtype=found["bias"].dtype), unit)
        scale = None if head.logit_scale is None else head.logit_scale.to(self.dtype)
        if "weight" in found:
            sized, largest = g, None
            if state.size is not None:
                largest = state.size.amax()
                sized = (g * (state.size / largest)).to(g.dtype)
            _add_outer(found["weight"], rows.start == 0, sized, state.operand(), unit, scale, largest)
        if {"h", "z", "logit_scale"} & found.keys():
            self._add_rows(state, rows, _times(expected_rows(g, head.weight), unit), scale)

    def _add_rows(self, state: _State, rows: slice, back: Tensor, scale: Tensor | None) -> None:
        if "logit_scale" in self.found:
            self.found["logit_scale"] += (back * state.x).sum()
        grad = state.backward(_times(back, scale))
        for name, factor in (("h", state.c_out), ("z", state.c_skip)):
            if name in self.found:
                self.found[name][rows] = _times(grad, factor)

    def result(self) -> dict[str, Tensor]:
        return {name: grad.to(kept_dtype(getattr(self.head, name).dtype)) for name, grad in self.found.items()}


def loss_and_gradients(
    head: Head, target: Tensor, factor: Tensor | None, wants: dict[str, bool]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses (R,), and the gradients of Σ factor·loss that are wanted. target: -1 where ignored."""
    dtype, sums = compute_dtype(head.h.dtype), _Sums(head, wants)
    loss = torch.empty(len(head.h), dtype=dtype, device=head.h.device)
    half_norms = None if head.table is None else head.table.to(dtype).square().sum(-1) / 2
    for rows in spans(len(head.h), len(head.weight), head.h.device):
        state = _State(head, rows)
        logits, capped = _chunk_logits(head, state, rows, half_norms)
        if factor is None or not sums.found:
            loss[rows] = torch.ops.dbkernels.cross_entropy_rows.default(logits, target[rows], None, None)
            continue
        share, unit, beside = factor[rows], None, None
        if _mixed(head.weight):
            # In units of the largest factor, halves neither overflow nor vanish.
            unit = share.abs().amax().clamp(min=torch.finfo(dtype).tiny)
            share, beside = share / unit, torch.empty_like(logits, dtype=head.weight.dtype)
        loss[rows] = torch.ops.dbkernels.cross_entropy_rows.default(logits, target[rows], share, beside)
        sums.add(state, rows, logits if beside is None else beside, unit, capped)
        del logits, beside, capped  # or the next chunk would be made beside this one
    return loss, sums.result()


def probabilities(head: Head) -> Iterator[tuple[slice, Tensor]]:
    """softmax of the logits, a chunk of rows at a time, in the sums' dtype."""
    half_norms = None if head.table is None else head.table.to(compute_dtype(head.h.dtype)).square().sum(-1) / 2
    for rows in spans(len(head.h), len(head.weight), head.h.device):
        logits, _ = _chunk_logits(head, _State(head, rows), rows, half_norms)
        yield rows, logits.softmax(-1)
