"""Tokens as points of a codebook, denoised in groups: the target of sequences."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import dbkernels

from .base import Objective, Output, Target
from .devices import check_labels


class TokenTarget(Target):
    """Labels (B, N) as points of a fixed codebook; cross-entropy under the posterior readout
    head(h) + (z E^T - |E|^2/2) / sigma^2, which says exactly what z tells of its own token.

    table: (K, d) embeddings. group_size: consecutive tokens that share a noise level; 0 is one level a sequence.
    Raises: ValueError if the table is not (K >= 2, d) or group_size is negative. Source: docs/method.md.
    """

    def __init__(self, table: Tensor, *, group_size: int = 1):
        if table.dim() != 2 or len(table) < 2:
            raise ValueError(f"table must be (K, d) with K >= 2, got {tuple(table.shape)}")
        if group_size < 0:
            raise ValueError(f"group_size must be positive, or 0 for one level a sequence, got {group_size}")
        super().__init__(1 / math.sqrt(table.shape[1]))
        self.group_size = group_size
        self.table = nn.Parameter(table.detach().clone(), requires_grad=False)

    @property
    def classes(self) -> int:
        """K."""
        return len(self.table)

    def embeddings(self) -> Tensor:
        """The codebook: (K, d)."""
        return self.table

    def evidence(self, z: Tensor) -> Tensor:
        """What z says of each label, in units of 1 / sigma^2: (B, N, d) -> (B, N, K), float32."""
        table = self.table.float()
        with torch.autocast(z.device.type, enabled=False):
            return z.float() @ table.T - table.square().sum(-1) / 2

    def clean(self, y: Tensor) -> Tensor:
        """Labels (B, N) -> (B, N, d)."""
        return self.table[y]

    def level_shape(self, y: Tensor) -> tuple[int, ...]:
        """(B, groups), for labels or noised tokens of N places."""
        size = self.group_size or y.shape[1]
        return (len(y), -(-y.shape[1] // size))

    def by_token(self, sigma: Tensor, y: Tensor) -> Tensor:
        """Levels (B, groups) -> (B, N)."""
        return sigma.repeat_interleave(self.group_size or y.shape[1], 1)[:, : y.shape[1]]

    def by_group(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Means (B, groups) of values (B, N)."""
        size = self.group_size or values.shape[1]
        full = nn.functional.pad(values, (0, shape[1] * size - values.shape[1]), value=math.nan)
        return full.view(*shape, size).nanmean(-1)

    def noised(self, y: Tensor, sigma: Tensor, *, seed: int, offset: int) -> Tensor:
        return dbkernels.inject_noise((y, self.table), self.by_token(sigma, y), seed=seed, offset=offset)

    def inputs(self, z: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return super().inputs(z, self.by_token(sigma, z))

    def read(self, head: nn.Module, h: Tensor, cond: Tensor, z: Tensor, sigma: Tensor) -> Output:
        """Features h (B, N, D), z (B, N, d), levels (B, groups) -> logits (B, N, K) and D (B, N, d), float32."""
        logits = head(h, cond).float()
        logits = logits + self.evidence(z) / self.by_token(sigma, z).float().square().unsqueeze(-1)
        with torch.autocast(logits.device.type, enabled=False):
            return Output(logits, logits.softmax(-1) @ self.table.float())

    def objective(
        self, head: nn.Module, h: Tensor, cond: Tensor, z: Tensor, y: Tensor, sigma: Tensor, weight: float = 1.0
    ) -> Objective:
        """The same, never holding all logits. head: has a `linear` from features to the vocabulary."""
        linear, posterior = head.linear, (z, self.table, self.by_token(sigma, y))
        rest = {"bias": linear.bias, "posterior": posterior}
        row_weight = None if weight == 1 else torch.full(y.shape, weight, device=y.device)
        loss = dbkernels.denoising_cross_entropy(h, linear.weight, y, row_weight=row_weight, **rest)
        with torch.no_grad():
            D = dbkernels.softmax_embedding(h, linear.weight, self.table, **rest)
            error = (self.clean(y) - D).float().square().sum(-1)
        return Objective(loss, self.by_group(error, sigma.shape))

    def check(self, y: Tensor) -> None:
        """Raise ValueError unless `y` is a non-empty (B, N) int64 tensor of labels in [0, K); on a device their values
        aren't read."""
        if y.dim() != 2 or y.dtype != torch.int64 or y.numel() == 0:
            raise ValueError(f"labels must be a non-empty (B, N) int64 tensor, got {tuple(y.shape)} {y.dtype}")
        check_labels("labels", y, self.classes)

    def check_noised(self, z: Tensor) -> None:
        """Raise ValueError unless `z` is a non-empty floating (B, N, d)."""
        width = self.table.shape[1]
        if z.dim() != 3 or z.shape[2] != width or z.numel() == 0 or not z.is_floating_point():
            raise ValueError(f"z must be a floating (B >= 1, N >= 1, {width}), got {tuple(z.shape)} {z.dtype}")
