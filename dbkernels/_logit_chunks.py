"""Losses and gradients of a vocabulary head that never holds all logits, and expectations over its softmax.

One chunk of rows at a time: compute logits, losses and the logits' gradient, which overwrites the logits, and from it
the rows' gradients. The head's gradient needs all rows. If its float32 sum is no larger than a chunk of logits, or is
the result itself, it is summed over the chunks. Otherwise, for halves on a GPU, a second loop over chunks of *words*
recomputes their logits, all rows at once, and each word's gradient in one product: a third more arithmetic than one
loop, but no float32 copy of the head's gradient, and none of the passes over it that a chunk of rows would cost.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dbkernels import _products as products
from dbkernels._dtypes import compute_dtype, kept_dtype
from dbkernels._head import Head, Operand, State, half_norms, is_plain, is_sized, make_logits, part, times
from dbkernels.cross_entropy_rows import cross_entropy_columns, cross_entropy_rows

CPU_LOGITS, GPU_LOGITS = 2**19, 2**24  # per chunk: 2 MiB of float32, in the cache; 64 MiB
LEAST_ROWS = 256  # fewer would read the head too often: at 3 TB/s a product of 217 rows takes as long as its weights
TILE = 128  # chunks of several tiles are cut to whole ones
ALIGNED = 64  # a row's stride is a multiple of so many logits: wide loads, and products without a slow edge


def logits_budget(device: torch.device) -> int:
    """Return how many logits a chunk may have."""
    return CPU_LOGITS if device.type == "cpu" else GPU_LOGITS


def chunk_rows(rows: int, width: int, budget: int) -> int:
    """Return how many rows of logits of a vocabulary of `width` are computed at once."""
    step = max(LEAST_ROWS, budget // width)
    step -= step % TILE if step > TILE else 0
    return min(step, rows)


def chunk_words(rows: int, width: int, budget: int) -> int:
    """Return how many words' gradients are computed at once: logits and float32 gradients fit a chunk's memory."""
    step = max(TILE, budget // (rows + width))
    return step - step % TILE


def spans(count: int, step: int) -> Iterator[slice]:
    """Cut `count` things into slices of `step`."""
    return (slice(at, min(at + step, count)) for at in range(0, count, max(step, 1)))


def _in_units(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors in units of the largest, with which float16 neither overflows nor vanishes, and the unit."""
    unit = factor.abs().nan_to_num(0).amax() if len(factor) else factor.new_ones(())
    unit = unit.clamp(min=torch.finfo(factor.dtype).tiny)
    return factor / unit, unit


class _Chunks:
    """The state of one call: the running sums, and the rows' results that the loop over words needs."""

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
        # Logits are computed a second time, unless one chunk had all rows, with operands in one unit.
        self.again = self.by_words and self.rows > 0 and (sized or self.step < self.rows)
        self.share = torch.empty(0) if factor is None else factor
        self.unit: Tensor | None = None
        if self.wants and self.mixed and head.weight.dtype == torch.float16:
            self.share, self.unit = _in_units(self.share)
        self.gradients = {name: self._room(name) for name, want in self.wants.items() if want}
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
        """Allocate a gradient; sums that aren't taken in one product start from zero."""
        given = getattr(self.head, name)
        by_row = name in ("h", "z", "posterior_z")
        kept = by_row or (name == "weight" and self.by_words)
        make = torch.zeros if name in ("bias", "logit_scale") or self.rows == 0 else torch.empty
        return make(given.shape, dtype=kept_dtype(given.dtype) if kept else self.dtype, device=self.device)

    def _gradient(self, buffer: Tensor, width: int) -> Tensor:
        """Return the view for the gradient of the logits in `buffer`: their place, for halves each row's first half."""
        return (buffer.view(self.head.weight.dtype) if self.mixed else buffer)[:, :width]

    def chunk_losses(self, rows: slice) -> Tensor:
        """Return the losses of a chunk of rows; add its part to the gradients."""
        head, state, whole = self.head, State(self.head, rows), slice(0, self.words)
        buffer = part(self.buffer, slice(0, rows.stop - rows.start))
        logits = buffer if buffer.shape[1] == self.words else buffer[:, : self.words]
        capped = make_logits(head, state.operand, self.halved, logits, rows, whole)
        target = part(self.target, rows)
        if not self.gradients:
            return cross_entropy_rows(logits, target, None, None)
        if self.again:
            self._keep(state.operand, rows)
            torch.gather(logits, 1, part(self.index, rows), out=part(self.at, rows))
        g = self._gradient(buffer, self.words) if self.mixed else logits
        loss = cross_entropy_rows(logits, target, part(self.share, rows), g if self.mixed else None)
        self._add(state, rows, g, capped)
        return loss

    def _keep(self, operand: Operand, rows: slice) -> None:
        """Keep the operands of a chunk for the loop over words."""
        if not is_plain(self.head):
            part(self.operand.x, rows).copy_(operand.x)
        if self.operand.size is not None and operand.size is not None:
            part(self.operand.size, rows).copy_(operand.size)

    def _add(self, state: State, rows: slice, g: Tensor, capped: Tensor | None) -> None:
        head, gradients = self.head, self.gradients
        if "posterior_z" in gradients and head.table is not None and head.precision is not None:
            precision = part(head.precision, rows).unsqueeze(1)
            grad = times(products.expected_rows(g, head.table), precision, self.unit)
            part(gradients["posterior_z"], rows).copy_(grad)
        self._uncap(g, capped)
        if "bias" in gradients:
            gradients["bias"] += times(g.sum(0, dtype=self.dtype), self.unit)
        if "weight" in gradients and not self.by_words:
            self._add_weight(g.T, state.operand.x, rows.start == 0)
        if {"h", "z", "logit_scale"} & gradients.keys():
            self._add_rows(state, rows, times(products.expected_rows(g, head.weight), self.unit))
        if self.by_words and not self.again:
            for words in spans(self.words, chunk_words(self.rows, head.weight.shape[1], self.budget)):
                self._set_weight(words, g[:, words].T, state.operand.x)

    @staticmethod
    def _uncap(g: Tensor, capped: Tensor | None) -> None:
        if capped is not None:
            g.mul_(capped.square_().neg_().add_(1))

    def _add_weight(self, g: Tensor, x: Tensor, fresh: bool) -> None:
        total = self.gradients["weight"]
        x = x if self.mixed else x.to(total.dtype)
        products.product(g, x, total) if fresh else products.add_product(total, g, x)

    def _add_rows(self, state: State, rows: slice, back: Tensor) -> None:
        if "logit_scale" in self.gradients:
            self.gradients["logit_scale"] += (back * state.x).sum()
        grad = state.backward(times(back, state.scale))
        for name, factor in (("h", state.c_out), ("z", state.c_skip)):
            if name in self.gradients:
                part(self.gradients[name], rows).copy_(times(grad, factor))

    def _set_weight(self, words: slice, g: Tensor, x: Tensor) -> None:
        """Write the head's gradient for some words, g (words, R) @ x, in one product."""
        total = part(self.gradients["weight"], words)
        products.product(g, x, total) if total.dtype == self.dtype else total.copy_(
            products.product(g, x, torch.empty(total.shape, dtype=self.dtype, device=self.device))
        )

    def head_gradient(self, loss: Tensor) -> None:
        """Compute the head's gradient, one chunk of words at a time, from recomputed logits and the rows' losses."""
        del self.buffer
        head, share, size = self.head, self.share, self.operand.size
        rows, step = slice(0, self.rows), chunk_words(self.rows, head.weight.shape[1], self.budget)
        if size is not None:
            share, unit = _in_units(share * size.squeeze(1))
            self.unit = times(unit, self.unit)
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
        if self.unit is not None and "weight" in self.gradients:
            self.gradients["weight"].mul_(self.unit)
        return {name: grad.to(kept_dtype(getattr(self.head, name).dtype)) for name, grad in self.gradients.items()}


def loss_and_gradients(
    head: Head, target: Tensor, factor: Tensor | None, wants: dict[str, bool]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the losses (R,), and the requested gradients of Σ factor·loss. target: -1 where ignored."""
    work = _Chunks(head, target, factor, wants)
    losses = [work.chunk_losses(rows) for rows in spans(work.rows, work.step)]
    if len(losses) == 1:
        loss = losses[0]
    else:
        loss = torch.cat(losses) if losses else torch.empty(0, dtype=work.dtype, device=work.device)
    if work.again:
        work.head_gradient(loss)
    return loss, work.result()


def probabilities(head: Head) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, softmax of their logits), one chunk of rows at a time, in the sums' dtype."""
    rows, words, halved = len(head.h), len(head.weight), half_norms(head)
    step = chunk_rows(rows, words, logits_budget(head.h.device))
    buffer = torch.empty(step, words, dtype=compute_dtype(head.h.dtype), device=head.h.device)
    for chunk in spans(rows, step):
        logits = part(buffer, slice(0, chunk.stop - chunk.start))
        make_logits(head, State(head, chunk).operand, halved, logits, chunk, slice(0, words))
        yield chunk, logits.softmax(-1)
