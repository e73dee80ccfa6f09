"""denoising_cross_entropy of few rows on a GPU, where host time is the limit: all that depends on the kind of input is
prepared once, and marks, losses and their gradient are one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dbkernels import _logit_chunks as chunks
from dbkernels import _products as products
from dbkernels._direct import direct
from dbkernels.edm_loss import times_upstream

MOST_ROWS = 1024  # that each program of the kernel counts
MOST_KINDS = 4096  # shapes that change in every step must not fill the memory
_prepared: dict[Any, FewRows | None] = {}


class FewRows:
    """Loss and gradients of a plain head, all logits at once, for one kind of input."""

    def __init__(self, h: Tensor, weight: Tensor, ignore_index: int, mean: bool):
        from dbkernels.triton.cross_entropy_rows import prepare_rows

        words, self.flat, self.device = weight.shape[0], h.dim() == 2, h.device
        self.rows, self.width, self.words = h.numel() // h.shape[-1], h.shape[-1], words
        self.half = h.dtype if products.mixed(weight) else None
        self.dtype = h.dtype if self.half is None else torch.float32
        layout = (self.rows, words), words, words if self.half is None else 2 * words, h.get_device()
        self.loss_launch = prepare_rows(*layout, False, False, ignore_index, True, mean)
        self.gradient_launch = prepare_rows(*layout, True, self.half is not None, ignore_index, True, mean)

    def __call__(self, h: Tensor, weight: Tensor, target: Tensor, want_h: bool, want_weight: bool) -> list[Any]:
        """Return the loss, and the gradients of h and weight or None."""
        x = h if self.flat else h.reshape(self.rows, self.width)
        logits = products.wide(x, weight.T)
        loss = torch.empty((self.rows,), dtype=self.dtype, device=self.device)
        if not want_h and not want_weight:
            self.loss_launch(logits, target, loss, loss, logits)
            return [loss.sum(), None, None]
        g = logits if self.half is None else logits.view(self.half)[:, : self.words]
        self.gradient_launch(logits, target, loss, loss, g)
        grad_h = self._narrow(products.wide(g, weight)) if want_h else None
        grad_weight = self._narrow(products.wide(g.T, x)) if want_weight else None
        if grad_h is not None and not self.flat:
            grad_h = grad_h.view(h.shape)
        return [loss.sum(), grad_h, grad_weight]

    def _narrow(self, grad: Tensor) -> Tensor:
        return grad if self.half is None else grad.to(self.half)


class FewRowsLoss(torch.autograd.Function):
    """The loss, computed with its gradients, which are kept for the upstream one."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, target: Tensor, few: FewRows) -> Tensor:
        ctx.wants = ctx.needs_input_grad[:2]
        loss, *grads = few(h, weight, target, *ctx.wants)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND)
        of_h, of_weight = ctx.saved_tensors
        of_h = None if of_h is None else times_upstream(of_h, upstream)
        return of_h, None if of_weight is None else times_upstream(of_weight, upstream), None, None


NO_SECOND = (
    "denoising_cross_entropy has no second derivative: drop create_graph=True, or set DBKERNELS_BACKEND=reference"
)


def few_rows(h: Tensor, weight: Tensor, target: Tensor, ignore_index: int, reduction: str) -> FewRows | None:
    """Return the call prepared for this kind of input, or None where it needs the general path, which checks it."""
    if not isinstance(h, Tensor) or weight is None or target is None or not direct(h, weight, target):
        return None
    kind = (
        h.dtype, h.shape, h.get_device(), weight.dtype, weight.shape, weight.get_device(), target.dtype, target.shape,
        target.get_device(), target.stride(), ignore_index, reduction, chunks.GPU_LOGITS,
    )  # fmt: skip
    if kind in _prepared:
        return _prepared[kind]
    if len(_prepared) >= MOST_KINDS:
        _prepared.clear()
    _prepared[kind] = FewRows(h, weight, ignore_index, reduction == "mean") if _fits(h, weight, target) else None
    return _prepared[kind]


def _fits(h: Tensor, weight: Tensor, target: Tensor) -> bool:
    if h.dtype == torch.float16 or not h.is_floating_point() or h.dtype.itemsize < 2 or h.dim() < 2:
        return False
    alike = h.dtype == weight.dtype and h.device == weight.device == target.device and weight.dim() == 2
    if not alike or target.dtype != torch.int64 or target.shape != h.shape[:-1] or not target.is_contiguous():
        return False
    rows, words = target.numel(), weight.shape[0]
    if weight.shape[1] != h.shape[-1] or not 0 < rows <= MOST_ROWS or 0 in weight.shape:
        return False
    budget = chunks.logits_budget(h.device)
    return rows * words <= budget and (weight.numel() <= budget or h.dtype.itemsize > 2)
