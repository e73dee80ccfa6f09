"""The optimizer of one part (a block, or what the blocks share): AdamW and an exponential moving average of weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

import dbkernels


class PartOptimizer:
    """AdamW + EMA over one part's trainable parameters, its state in plain tensors that Residency can move.

    named_parameters: (name, parameter) pairs; those without requires_grad are left out. betas, eps, weight_decay:
    AdamW's; tensors with fewer than two dimensions (biases, norms) are not decayed. ema_decay: 0 keeps no average.
    Raises: ValueError on a setting out of range.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        ema_decay: float = 0.0,
    ):
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}")
        if weight_decay < 0:
            raise ValueError(f"weight_decay must be zero or positive, got {weight_decay}")
        trained = [(name, p) for name, p in named_parameters if p.requires_grad]
        self.names = [name for name, _ in trained]
        self.params = [p for _, p in trained]
        self.betas, self.eps, self.ema_decay, self.steps = betas, eps, ema_decay, 0
        self.weight_decay = [weight_decay if p.dim() > 1 else 0.0 for p in self.params]
        self.exp_avgs = [torch.zeros_like(p, dtype=torch.float32) for p in self.params]
        self.exp_avg_sqs = [torch.zeros_like(p, dtype=torch.float32) for p in self.params]
        self.emas = [p.detach().float().clone() for p in self.params] if ema_decay else []

    @torch.no_grad()
    def step(self, lr: float) -> Tensor | None:
        """One update from the parameters' gradients. Returns their norm (0-dim, on the device), None without any.

        Where the norm isn't finite nothing changes. Gradients are released.
        """
        if not self.params:
            return None
        self.steps += 1
        norm = dbkernels.adamw_ema_step(
            self.params,
            [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params],
            self.exp_avgs,
            self.exp_avg_sqs,
            self.emas or None,
            step=self.steps,
            lr=lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            ema_decay=self.warm_ema_decay() if self.emas else None,
        )
        self.zero_grad()
        return norm

    def warm_ema_decay(self) -> float:
        """The decay of this step: shorter at first, so that the average forgets the start."""
        return min(self.ema_decay, (1 + self.steps) / (10 + self.steps))

    def zero_grad(self) -> None:
        """Release the gradients."""
        for p in self.params:
            p.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """The state by name: "exp_avg/...", "exp_avg_sq/...", "ema/..."."""
        kinds = {"exp_avg": self.exp_avgs, "exp_avg_sq": self.exp_avg_sqs, "ema": self.emas}
        return {f"{kind}/{name}": t for kind, ts in kinds.items() for name, t in zip(self.names, ts, strict=False)}

    def swap_ema(self) -> None:
        """Exchange weights and their average, without a copy; called again it undoes itself."""
        for p, ema in zip(self.params, self.emas, strict=False):
            p.data, ema.data = ema.data.to(p.dtype), p.data.to(ema.dtype)


def learning_rate(step: int, *, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up over `warmup` steps to `peak`, then a cosine to zero at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def clip_gradients(optimizers: Iterable[PartOptimizer], max_norm: float) -> Tensor:
    """Scale the gradients of several parts to a joint 2-norm of at most `max_norm`; returns the norm, on the device."""
    params = [p for optimizer in optimizers for p in optimizer.params]
    return torch.nn.utils.clip_grad_norm_(params, max_norm if max_norm > 0 else math.inf)
