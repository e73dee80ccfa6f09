"""Tokens as points of a codebook, denoised in groups: the target of sequences."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as functional
from torch import Tensor

import dbkernels

from .base import Features, Loss, Noised, Output, linear_of
from .codebook import CodebookTarget
from .devices import check_labels


class TokenTarget(CodebookTarget):
    """Tokens (B, N) as points of a fixed codebook; cross-entropy under the posterior readout.

    Args:
        table: Embeddings, (K, d); `spread_codebook(vocab_size, dim)` makes one.
        group_size: Consecutive tokens that share a noise level; 0 is one level per sequence.

    Raises: ValueError if the table is not (K >= 2, d) or group_size is negative. Source: docs/method.md.
    """

    example_shape = (128, 64)  # tokens of a text, and the codebook's width

    def __init__(self, table: Tensor, *, group_size: int = 1):
        super().__init__(table)
        if group_size < 0:
            raise ValueError(f"group_size must be positive, or 0 for one level per sequence, got {group_size}")
        self.group_size = group_size

    def sample_shape(self, y: Tensor) -> tuple[int, ...]:
        return (y.shape[1], self.table.shape[1])

    def level_shape(self, y: Tensor) -> tuple[int, ...]:
        """Return (B, groups), for tokens or noised tokens of N places."""
        size = self.group_size or y.shape[1]
        return (len(y), -(-y.shape[1] // size))

    def level_per_point(self, sigma: Tensor, z: Tensor) -> Tensor:
        """Return the level of each token: (B, groups) -> (B, N)."""
        return sigma.repeat_interleave(self.group_size or z.shape[1], 1)[:, : z.shape[1]]

    def group_means(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return means over groups: (B, N) -> (B, groups)."""
        size = self.group_size or values.shape[1]
        full = functional.pad(values, (0, shape[1] * size - values.shape[1]), value=math.nan)
        return full.view(*shape, size).nanmean(-1)

    def noised(self, y: Tensor, sigma: Tensor, *, seed: int | Tensor, offset: int | Tensor) -> Tensor:
        return dbkernels.inject_noise((y, self.table), self.level_per_point(sigma, y), seed=seed, offset=offset)

    def inputs(self, z: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return super().inputs(z, self.level_per_point(sigma, z))

    def read(self, features: Features, z: Tensor, sigma: Tensor) -> Output:
        """Return logits (B, N, K) and D (B, N, d), float32, for z (B, N, d) and levels (B, groups)."""
        return self.posterior(features.head(features.h, features.cond), z, sigma)

    def loss(
        self, features: Features, noised: Noised, y: Tensor, sigma: Tensor, *, weight: float = 1.0, error: bool = False
    ) -> Loss:
        """Return `weight` times the cross-entropy, nats.

        Its mean, 0-dim, if the head is linear: all logits are never held at once. Otherwise per token, (B, N).
        """
        linear = linear_of(features.head)
        if linear is None:
            return self._loss_of_logits(features, noised, y, sigma, weight, error)
        posterior = (noised.z, self.table, self.level_per_point(sigma, y))
        row_weight = None if weight == 1 else torch.full(y.shape, weight, device=y.device)
        rest = {"bias": linear.bias, "posterior": posterior}
        loss = dbkernels.denoising_cross_entropy(features.h, linear.weight, y, row_weight=row_weight, **rest)
        if not error:
            return Loss(loss, None)
        with torch.no_grad():
            D = dbkernels.softmax_embedding(features.h, linear.weight, self.table, **rest)
        return Loss(loss, self._error(D, y, sigma))

    def _loss_of_logits(
        self, features: Features, noised: Noised, y: Tensor, sigma: Tensor, weight: float, error: bool
    ) -> Loss:
        output = self.read(features, noised.z, sigma)
        entropy = functional.cross_entropy(output.raw.transpose(1, 2), y, reduction="none")
        return Loss(entropy * weight, self._error(output.denoised.detach(), y, sigma) if error else None)

    def _error(self, D: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
        return self.group_means((self.clean(y) - D).float().square().sum(-1), tuple(sigma.shape))

    def check(self, y: Tensor) -> None:
        """Raise ValueError unless `y` is a non-empty (B, N) int64 tensor of tokens in [0, K); on a device their values
        aren't read."""
        if y.dim() != 2 or y.dtype != torch.int64 or y.numel() == 0:
            raise ValueError(f"labels must be a non-empty (B, N) int64 tensor, got {tuple(y.shape)} {y.dtype}")
        check_labels("labels", y, self.num_classes)

    def check_noised(self, z: Tensor) -> None:
        """Raise ValueError unless `z` is a non-empty floating (B, N, d)."""
        width = self.table.shape[1]
        if z.dim() != 3 or z.shape[2] != width or z.numel() == 0 or not z.is_floating_point():
            raise ValueError(f"z must be a floating (B >= 1, N >= 1, {width}), got {tuple(z.shape)} {z.dtype}")
