"""The optimizer of one part (a block, or what the blocks share): AdamW and an exponential moving average of weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import dbkernels


@dataclass
class _Group:
    """Parameters of one dtype that had a gradient in the same steps. following: 0-dim int64, the number of their next
    update; on the device, since only it knows whether an update was skipped."""

    indices: list[int]
    following: Tensor


class PartOptimizer:
    """AdamW + EMA over one part's trainable parameters, its state in plain tensors that Residency can move.

    A parameter without a gradient isn't touched, nor are its moments, its average or its count of updates. An update
    whose gradients' norm isn't finite changes nothing and doesn't count.

    named_parameters: (name, parameter) pairs of any floating dtypes; those without requires_grad are left out. Moments
    and averages are float32, float64 of float64. betas, eps, weight_decay: AdamW's; tensors with fewer than two
    dimensions (biases, norms) are not decayed. ema_decay: 0 keeps no average.
    Raises: ValueError on a setting out of range; TypeError on a parameter that isn't floating point.
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
        for name, p in trained:
            if not p.is_floating_point():
                raise TypeError(f"parameter {name} is {p.dtype}: only real floating point is trained; freeze it")
        self.names = [name for name, _ in trained]
        self.params = [p for _, p in trained]
        self.betas, self.eps, self.ema_decay = betas, eps, ema_decay
        self.weight_decay = [weight_decay if p.dim() > 1 else 0.0 for p in self.params]
        self.exp_avgs = [torch.zeros_like(p, dtype=_wide(p)) for p in self.params]
        self.exp_avg_sqs = [torch.zeros_like(p, dtype=_wide(p)) for p in self.params]
        self.emas = [p.detach().to(_wide(p), copy=True) for p in self.params] if ema_decay else []
        self._groups: list[_Group] = []
        self._averaged, self._halves = False, dict[int, Tensor]()  # half weights while their averages stand in
        self.counts = dict.fromkeys(self.names, 0)

    @property
    def counts(self) -> dict[str, int]:
        """Updates that each parameter has had, by name. Waits for the device."""
        counts = {i: int(group.following) - 1 for group in self._groups for i in group.indices}
        return {name: counts[i] for i, name in enumerate(self.names)}

    @counts.setter
    def counts(self, counts: dict[str, int]) -> None:
        alike: dict[tuple[torch.dtype, int], list[int]] = {}
        for i, (name, p) in enumerate(zip(self.names, self.params, strict=True)):
            alike.setdefault((p.dtype, counts[name]), []).append(i)
        self._groups = [_Group(indices, torch.tensor(count + 1)) for (_, count), indices in alike.items()]

    @property
    def steps(self) -> int:
        """Updates that the part has had. Waits for the device."""
        return max(self.counts.values(), default=0)

    @torch.no_grad()
    def step(self, lr: float) -> Tensor | None:
        """Make one update from the parameters' gradients. Returns their norm (0-dim, on the device), None without any.

        Where the norm isn't finite nothing changes. Gradients are released.
        """
        for p in self.params:
            if p.grad is not None and p.grad.is_sparse:
                p.grad = p.grad.to_dense()
        self._split()
        groups = [group for group in self._groups if self.params[group.indices[0]].grad is not None]
        norm = None
        if len(groups) > 1:
            moving = [[self.params[i] for i in group.indices] for group in groups]
            norm = torch.nn.utils.get_total_norm([p.grad for part in moving for p in part])  # type: ignore[misc]
            _hold_back(norm, moving)
        for group in groups:
            alone = self._update(group, lr)
            norm = alone if norm is None else norm
        self.zero_grad()
        return norm

    def _split(self) -> None:
        """Let parameters that have no gradient in this step count for themselves from now on."""
        groups = []
        for group in self._groups:
            moving = [i for i in group.indices if self.params[i].grad is not None]
            resting = [i for i in group.indices if self.params[i].grad is None]
            both = moving and resting
            groups += [_Group(part, group.following.clone() if both else group.following)
                       for part in (moving, resting) if part]  # fmt: skip
        self._groups = groups

    def _update(self, group: _Group, lr: float) -> Tensor:
        def of(tensors: list[Tensor]) -> list[Tensor]:
            return [tensors[i] for i in group.indices]

        params = of(self.params)  # type: ignore[arg-type]
        group.following = group.following.to(params[0].device)
        return dbkernels.adamw_ema_step(
            params,
            [p.grad for p in params],  # type: ignore[misc]
            of(self.exp_avgs),
            of(self.exp_avg_sqs),
            of(self.emas) if self.emas else None,
            step=group.following,
            lr=lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=[self.weight_decay[i] for i in group.indices],
            ema_decay=self._warm_ema_decay(group.following) if self.emas else None,
        )

    def _warm_ema_decay(self, step: Tensor) -> Tensor:
        """Return the decay of update number `step`: shorter at first, so that the average forgets the start."""
        number = step.double()
        return ((1 + number) / (10 + number)).clamp(max=self.ema_decay)

    def zero_grad(self) -> None:
        """Release the gradients."""
        for p in self.params:
            p.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """The state by name: "exp_avg/...", "exp_avg_sq/...", "ema/..."."""
        kinds = {"exp_avg": self.exp_avgs, "exp_avg_sq": self.exp_avg_sqs, "ema": self.emas}
        return {f"{kind}/{name}": t for kind, ts in kinds.items() for name, t in zip(self.names, ts, strict=False)}

    def swap_ema(self) -> None:
        """Exchange weights and their average; called again it undoes itself, to the last bit.

        Tensors of one dtype change places without a copy. The average of half weights stays and is rounded into their
        place: exchanged, it would be rounded itself.
        """
        self._averaged = not self._averaged
        for i, (p, ema) in enumerate(zip(self.params, self.emas, strict=False)):
            if p.dtype == ema.dtype:
                p.data, ema.data = ema.data, p.data
            elif self._averaged:
                self._halves[i], p.data = p.data, ema.to(p.dtype)
            else:
                p.data = self._halves.pop(i)


def _wide(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def learning_rate(step: int, *, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up over `warmup` steps to `peak`, then a cosine to zero at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def clip_gradients(optimizers: Iterable[PartOptimizer], max_norm: float) -> Tensor:
    """Scale the gradients of several parts to a joint 2-norm of at most `max_norm`, if that is positive; returns the
    norm, on the device. Where it isn't finite every part gets a NaN, so that none is updated without the others.
    """
    parts = [[p for p in optimizer.params if p.grad is not None] for optimizer in optimizers]
    params = [p for part in parts for p in part]
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])  # type: ignore[misc]
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
    _hold_back(norm, parts)
    return norm


def _hold_back(norm: Tensor, parts: Iterable[list[nn.Parameter]]) -> None:
    """Put a NaN into a gradient of each part if the norm isn't finite, without waiting for the device."""
    factor = torch.where(norm.isfinite(), 1.0, torch.nan)
    for part in parts:
        grads = (p.grad for p in part if p.grad is not None and p.grad.numel())
        for grad in list(grads)[:1]:
            grad[(0,) * grad.dim()].mul_(factor)
