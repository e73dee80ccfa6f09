"""Losses and gradients of a vocabulary head that never holds all logits, and expectations over its softmax.

A chunk of rows at a time: logits, losses and the logits' gradient, written where the logits were; the rows' gradients
come from it at once. The head's gradient needs all rows. Where its float32 sum is no larger than a chunk of logits, or
is the result itself, it adds up over the chunks. Else, for halves on a GPU, a second walk over chunks of *words* makes
their logits again, all rows at once, and each word's gradient in one product: a third more arithmetic than one walk,
but no float32 copy of the head's gradient, and none of the passes over it that a chunk of rows would cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dbkernels import _products as products
from dbkernels._levels import compute_dtype
from dbkernels.cross_entropy_rows import cross_entropy_columns, cross_entropy_rows

if TYPE_CHECKING:
    from dbkernels.denoising_cross_entropy import Head

CPU_LOGITS, GPU_LOGITS = 2**19, 2**24  # of a chunk: 2 MiB of float32, in the cache; 64 MiB
LEAST_ROWS = 256  # fewer would read the head too often: at 3 TB/s a product of 217 rows takes as long as its weights
TILE = 128  # chunks of several tiles are whole ones
ALIGNED = 64  # logits a row's stride is a multiple of: wide loads, and products without a slow edge
SMALLEST = 1e-12  # least norm that normalize divides by, as torch.nn.functional.normalize's


def logits_budget(device: torch.device) -> int:
    """Return how many logits a chunk may have."""
    return CPU_LOGITS if device.type == "cpu" else GPU_LOGITS


def chunk_rows(rows: int, width: int, budget: int) -> int:
    """Return how many rows of logits of a vocabulary of `width` are made at once."""
    step = max(LEAST_ROWS, budget // width)
    step -= step % TILE if step > TILE else 0
    return min(step, rows)


def chunk_words(rows: int, width: int, budget: int) -> int:
    """Return how many words' gradients are made at once: their logits and float32 gradients take a chunk's memory."""
    step = max(TILE, budget // (rows + width))
    return step - step % TILE


def spans(count: int, step: int) -> Iterator[slice]:
    """Cut `count` things into slices of `step`."""
    return (slice(at, min(at + step, count)) for at in range(0, count, max(step, 1)))


def part(tensor: Tensor, rows: slice) -> Tensor:
    """Return these rows, without a view where they are all."""
    return tensor if rows.start == 0 and rows.stop == len(tensor) else tensor[rows]


def _times(tensor: Tensor, *factors: Tensor | None) -> Tensor:
    """Multiply by those factors that there are."""
    for factor in factors:
        tensor = tensor if factor is None else tensor * factor
    return tensor


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what gradients wait in for the upstream one: in float16 a mean's would vanish before the loss's scale."""
    return torch.float32 if dtype == torch.float16 else dtype


def is_plain(head: Head) -> bool:
    """Whether the head's operand is h itself."""
    return head.z is None and head.c_out is None and head.logit_scale is None and not head.normalize


def is_sized(head: Head) -> bool:
    """Whether the operand could overflow: float16 on a GPU, unless it is h itself."""
    return head.weight.dtype == torch.float16 and products.mixed(head.weight) and not is_plain(head)


class Operand(NamedTuple):
    """What the head is multiplied by: D times the logit scale, in the dtype that the product takes; in float16 divided
    in each row by `size` (R, 1), so that it can't overflow."""

    x: Tensor
    size: Tensor | None


class _State:
    """D of some rows, x, how it came about, and the operand of their logits."""

    def __init__(self, head: Head, rows: slice):
        self.norm: Tensor | None = None
        self.c_out: Tensor | None = None
        self.c_skip: Tensor | None = None
        self.scale: Tensor | None = None
        self.x = part(head.h, rows)
        self.operand = Operand(self.x, None)
        if not is_plain(head):
            self._make(head, rows)

    def _make(self, head: Head, rows: slice) -> None:
        dtype = compute_dtype(head.h.dtype)
        x = self.x.to(dtype)
        if head.c_out is not None:
            self.c_out = part(head.c_out, rows).unsqueeze(1)
            x = x * self.c_out
        if head.z is not None and head.c_skip is not None:
            self.c_skip = part(head.c_skip, rows).unsqueeze(1)
            x = torch.addcmul(x, part(head.z, rows).to(dtype), self.c_skip)
        if head.normalize:
            self.norm = x.norm(dim=1, keepdim=True)
            x = x / self.norm.clamp(min=SMALLEST)
        self.x = x
        if head.logit_scale is not None:
            self.scale = head.logit_scale.to(dtype)
            x = x * self.scale
        size = None
        if is_sized(head):
            size = x.abs().amax(1, keepdim=True).clamp(min=1)
            x = x / size
        self.operand = Operand(x.to(head.weight.dtype) if products.mixed(head.weight) else x, size)

    def backward(self, grad: Tensor) -> Tensor:
        """From the gradient of D to that of c_out·h + c_skip·z."""
        if self.norm is None:
            return grad
        # Below SMALLEST the divisor is a constant, and nothing is projected out.
        along = torch.where(self.norm >= SMALLEST, (self.x * grad).sum(1, keepdim=True), 0)
        return (grad - self.x * along) / self.norm.clamp(min=SMALLEST)


def half_norms(head: Head) -> Tensor | None:
    """Return |E_k|²/2 of the posterior's table, (V,)."""
    return None if head.table is None else head.table.to(compute_dtype(head.h.dtype)).square().sum(-1) / 2


def make_logits(
    head: Head, operand: Operand, halved: Tensor | None, out: Tensor, rows: slice, words: slice
) -> Tensor | None:
    """Write the logits of some rows and words to `out`. Return tanh of the capped ones, which their gradient wants."""
    products.logits_of(operand.x, part(head.weight, words), out)
    if operand.size is not None:
        out.mul_(operand.size)
    if head.bias is not None:
        out.add_(part(head.bias, words))
    capped = None
    if head.softcap is not None:
        capped = torch.tanh(out.div_(head.softcap))
        torch.mul(capped, head.softcap, out=out)
    if head.posterior_z is not None and head.table is not None and head.precision is not None:
        evidence = products.logits_of(part(head.posterior_z, rows), part(head.table, words))
        if halved is not None:
            evidence.sub_(part(halved, words))
        out.addcmul_(evidence, part(head.precision, rows).unsqueeze(1))
    return capped


def _in_units(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors in units of the largest, with which float16 neither overflows nor vanishes, and the unit."""
    unit = factor.abs().nan_to_num(0).amax() if len(factor) else factor.new_ones(())
    unit = unit.clamp(min=torch.finfo(factor.dtype).tiny)
    return factor / unit, unit


class _Chunks:
    """The work of one call: the sums as they add up, and what the walk over words needs of the rows."""

    def __init__(self, head: Head, target: Tensor, factor: Tensor | None, wants: dict[str, bool]):
        self.head, self.target, self.device = head, target, head.h.device
        self.rows, (self.words, width) = len(head.h), head.weight.shape
        self.dtype, self.mixed = compute_dtype(head.h.dtype), products.mixed(head.weight)
        self.budget = logits_budget(self.device)
        self.step = chunk_rows(self.rows, self.words, self.budget)
        self.halved = half_norms(head)
        self.wants = wants if factor is not None else {}
        sized, large = is_sized(head), self.words * width > self.budget
        self.by_words = self.wants.get("weight", False) and self.mixed and (large or sized)
        # Logits are made a second time, unless one chunk of rows was all, with operands in one unit.
        self.again = self.by_words and self.rows > 0 and (sized or self.step < self.rows)
        self.share = torch.empty(0) if factor is None else factor
        self.unit: Tensor | None = None
        if self.wants and self.mixed and head.weight.dtype == torch.float16:
            self.share, self.unit = _in_units(self.share)
        self.found = {name: self._room(name) for name, want in self.wants.items() if want}
        stride = -(-self.words // ALIGNED) * ALIGNED if self.mixed else self.words
        self.buffer = torch.empty(self.step, stride, dtype=self.dtype, device=self.device)
        if self.again:
            x = head.h if is_plain(head) else torch.empty_like(head.h)
            self.operand = Operand(x, self._row_numbers() if sized else None)
            self.at = self._row_numbers()
            self.index = target.clamp(0, self.words - 1).unsqueeze(1)

    def _row_numbers(self) -> Tensor:
        return torch.empty(self.rows, 1, dtype=self.dtype, device=self.device)

    def _room(self, name: str) -> Tensor:
        """Make room for a gradient; sums that aren't taken in one product start from zero."""
        given = getattr(self.head, name)
        by_row = name in ("h", "z", "posterior_z")
        kept = by_row or (name == "weight" and self.by_words)
        make = torch.zeros if name in ("bias", "logit_scale") or self.rows == 0 else torch.empty
        return make(given.shape, dtype=kept_dtype(given.dtype) if kept else self.dtype, device=self.device)

    def _gradient(self, buffer: Tensor, width: int) -> Tensor:
        """Return where the gradient of the logits in `buffer` goes: their place, for halves each row's first half."""
        return (buffer.view(self.head.weight.dtype) if self.mixed else buffer)[:, :width]

    def walk_rows(self, rows: slice) -> Tensor:
        """Return the losses of a chunk of rows; add its part to the gradients."""
        head, state, whole = self.head, _State(self.head, rows), slice(0, self.words)
        buffer = part(self.buffer, slice(0, rows.stop - rows.start))
        logits = buffer if buffer.shape[1] == self.words else buffer[:, : self.words]
        capped = make_logits(head, state.operand, self.halved, logits, rows, whole)
        target = part(self.target, rows)
        if not self.found:
            return cross_entropy_rows(logits, target, None, None)
        if self.again:
            self._keep(state.operand, rows)
            torch.gather(logits, 1, part(self.index, rows), out=part(self.at, rows))
        g = self._gradient(buffer, self.words) if self.mixed else logits
        loss = cross_entropy_rows(logits, target, part(self.share, rows), g if self.mixed else None)
        self._add(state, rows, g, capped)
        return loss

    def _keep(self, operand: Operand, rows: slice) -> None:
        """Keep the operands of a chunk for the walk over words."""
        if not is_plain(self.head):
            part(self.operand.x, rows).copy_(operand.x)
        if self.operand.size is not None and operand.size is not None:
            part(self.operand.size, rows).copy_(operand.size)

    def _add(self, state: _State, rows: slice, g: Tensor, capped: Tensor | None) -> None:
        head, found = self.head, self.found
        if "posterior_z" in found and head.table is not None and head.precision is not None:
            precision = part(head.precision, rows).unsqueeze(1)
            part(found["posterior_z"], rows).copy_(_times(products.expected_rows(g, head.table), precision, self.unit))
        self._uncap(g, capped)
        if "bias" in found:
            found["bias"] += _times(g.sum(0, dtype=self.dtype), self.unit)
        if "weight" in found and not self.by_words:
            self._add_weight(g.T, state.operand.x, rows.start == 0)
        if {"h", "z", "logit_scale"} & found.keys():
            self._add_rows(state, rows, _times(products.expected_rows(g, head.weight), self.unit))
        if self.by_words and not self.again:
            for words in spans(self.words, chunk_words(self.rows, head.weight.shape[1], self.budget)):
                self._set_weight(words, g[:, words].T, state.operand.x)

    @staticmethod
    def _uncap(g: Tensor, capped: Tensor | None) -> None:
        if capped is not None:
            g.mul_(capped.square_().neg_().add_(1))

    def _add_weight(self, g: Tensor, x: Tensor, fresh: bool) -> None:
        total = self.found["weight"]
        x = x if self.mixed else x.to(total.dtype)
        products.product(g, x, total) if fresh else products.add_product(total, g, x)

    def _add_rows(self, state: _State, rows: slice, back: Tensor) -> None:
        if "logit_scale" in self.found:
            self.found["logit_scale"] += (back * state.x).sum()
        grad = state.backward(_times(back, state.scale))
        for name, factor in (("h", state.c_out), ("z", state.c_skip)):
            if name in self.found:
                part(self.found[name], rows).copy_(_times(grad, factor))

    def _set_weight(self, words: slice, g: Tensor, x: Tensor) -> None:
        """Write the head's gradient for some words, g (words, R) @ x, in one product."""
        total = part(self.found["weight"], words)
        products.product(g, x, total) if total.dtype == self.dtype else total.copy_(
            products.product(g, x, torch.empty(total.shape, dtype=self.dtype, device=self.device))
        )

    def walk_words(self, loss: Tensor) -> None:
        """Find the head's gradient, a chunk of words at a time, from logits made again; the rows' losses are known."""
        del self.buffer
        head, share, size = self.head, self.share, self.operand.size
        rows, step = slice(0, self.rows), chunk_words(self.rows, head.weight.shape[1], self.budget)
        if size is not None:
            share, unit = _in_units(share * size.squeeze(1))
            self.unit = _times(unit, self.unit)
        buffer = torch.empty(self.rows, min(step, self.words), dtype=self.dtype, device=self.device)
        for words in spans(self.words, step):
            logits = buffer[:, : words.stop - words.start]
            capped = make_logits(head, self.operand, self.halved, logits, rows, words)
            g = self._gradient(buffer, logits.shape[1])
            cross_entropy_columns(logits, self.target, self.at, loss, share, words.start, g)
            self._uncap(g, capped)
            self._set_weight(words, g.T, self.operand.x)

    def result(self) -> dict[str, Tensor]:
        """Return the gradients in the dtypes they are kept in."""
        if self.unit is not None and "weight" in self.found:
            self.found["weight"].mul_(self.unit)
        return {name: grad.to(kept_dtype(getattr(self.head, name).dtype)) for name, grad in self.found.items()}


def loss_and_gradients(
    head: Head, target: Tensor, factor: Tensor | None, wants: dict[str, bool]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the losses (R,), and the gradients of Σ factor·loss that are wanted. target: -1 where ignored."""
    if _is_short(head, wants):
        return _short(head, target, factor, wants)
    work = _Chunks(head, target, factor, wants)
    losses = [work.walk_rows(rows) for rows in spans(work.rows, work.step)]
    if len(losses) == 1:
        loss = losses[0]
    else:
        loss = torch.cat(losses) if losses else torch.empty(0, dtype=work.dtype, device=work.device)
    if work.again:
        work.walk_words(loss)
    return loss, work.result()


def _is_short(head: Head, wants: dict[str, bool]) -> bool:
    """Whether one chunk of a head without options is all, and each gradient one product."""
    weight, budget = head.weight, logits_budget(head.h.device)
    if any(field is not None for field in head[2:10]) or head.normalize or head.softcap is not None:
        return False
    if weight.dtype.itemsize == 2 and (weight.dtype == torch.float16 or not products.mixed(weight)):
        return False
    few = weight.numel() <= budget or not products.mixed(weight) or not wants["weight"]
    return few and 0 < head.h.shape[0] <= chunk_rows(head.h.shape[0], weight.shape[0], budget)


def _short(
    head: Head, target: Tensor, factor: Tensor | None, wants: dict[str, bool]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute what `_Chunks` does in such a case, in a fraction of the host's time: small inputs wait for it."""
    h, weight = head.h, head.weight
    rows, words, halves = h.shape[0], weight.shape[0], products.mixed(weight)
    stride = -(-words // ALIGNED) * ALIGNED if halves else words
    dtype = torch.float32 if halves else h.dtype
    buffer = torch.empty((rows, stride), dtype=dtype, device=h.device)
    logits = buffer if stride == words else buffer[:, :words]
    products.product(h, weight.T, logits)
    if factor is None or not (wants["h"] or wants["weight"]):
        return cross_entropy_rows(logits, target, None, None), {}
    g = buffer.view(weight.dtype)[:, :words] if halves else logits
    loss, found = cross_entropy_rows(logits, target, factor, g if halves else None), {}
    for name, a, b, shape in (("h", g, weight, h.shape), ("weight", g.T, h, weight.shape)):
        if wants[name]:
            grad = products.product(a, b, torch.empty(shape, dtype=dtype, device=h.device))
            found[name] = grad.to(h.dtype) if halves else grad
    return loss, found


def probabilities(head: Head) -> Iterator[tuple[slice, Tensor]]:
    """Yield softmax of the logits, a chunk of rows at a time, in the sums' dtype."""
    rows, words, halved = len(head.h), len(head.weight), half_norms(head)
    step = chunk_rows(rows, words, logits_budget(head.h.device))
    buffer = torch.empty(step, words, dtype=compute_dtype(head.h.dtype), device=head.h.device)
    for chunk in spans(rows, step):
        logits = part(buffer, slice(0, chunk.stop - chunk.start))
        make_logits(head, _State(head, chunk).operand, halved, logits, chunk, slice(0, words))
        yield chunk, logits.softmax(-1)
