"""The first step whose loss or gradient isn't finite, remembered without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..denoiser import BlockLoss


class NonFiniteLoss(RuntimeError):
    """Training met a loss or gradient that isn't finite; no checkpoint was written after it."""


class FiniteWatch:
    """Remembers the first bad step on the device. level: name of a noise level, for the message."""

    def __init__(self, device: torch.device, level: str):
        self.level = level
        # step, block, ends of the levels, and whether the batches themselves were bad
        self.first_bad = torch.full((5,), -1.0, dtype=torch.float64, device=device)
        self.bad_batch = torch.zeros((), dtype=torch.bool, device=device)  # of the present step

    def look(self, *given: Tensor) -> None:
        """Look at a batch's own values before a step uses them."""
        for t in given:
            if t.numel() and (t.is_floating_point() or t.is_complex()):
                ends = torch.stack(torch.aminmax(torch.view_as_real(t) if t.is_complex() else t))
                self.bad_batch.logical_or_(~ends.isfinite().all())

    def update(self, step: float | Tensor, block: float | Tensor, losses: Sequence[BlockLoss], norm: Tensor) -> None:
        """Look at a step's micro-batches and the gradients' norm. The levels remembered are the first bad loss's,
        or all."""
        ends = (loss.sigma.double().aminmax() for loss in losses)
        low, high = (torch.stack(end) for end in zip(*ends, strict=True))
        bad = ~torch.stack([loss.loss for loss in losses]).isfinite()
        first, some = bad.int().argmax(), bad.any()
        low, high = torch.where(some, low.take(first), low.min()), torch.where(some, high.take(first), high.max())
        seen = torch.stack([torch.zeros_like(low) + step, torch.zeros_like(low) + block, low, high, self.bad_batch])
        found = (some | ~norm.isfinite()) & (self.first_bad[0] < 0)
        self.first_bad.copy_(torch.where(found, seen, self.first_bad))  # in place: a CUDA graph writes there
        self.bad_batch.zero_()

    def forget(self) -> None:
        """Forget bad steps: weights from before them were loaded."""
        self.first_bad.fill_(-1.0)
        self.bad_batch.zero_()

    def check(self) -> None:
        """Raise NonFiniteLoss if there was a bad step. Waits for the device."""
        step, block, low, high, bad_batch = self.first_bad.tolist()
        if step >= 0:
            what = "Lower lr, raise warmup, or use precision='float32'"
            if bad_batch:
                what = "The batch itself, x or y, holds NaN or infinity: mend the data"
            raise NonFiniteLoss(
                f"the loss or gradient of block {block:.0f} is not finite at step {step:.0f} ({self.level} from "
                f"{low:.4g} to {high:.4g}); no checkpoint was written after it. {what}, "
                "and start again or resume from the last checkpoint"
            )
