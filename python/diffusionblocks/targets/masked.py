"""Tokens as a target: the noise is masks, its level the time t, and the loss the likelihood bound's integrand."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

import dbkernels

from ..noise import mask_schedule as masking
from .base import Objective, Output, Target
from .devices import check_labels

T_MIN = 1e-3  # a partition's last edge must be positive; what lies below is the bound's reconstruction term
C_NOISE = 4.0  # t spans [0, 1], the embedding expects about [-2, 2]


class MaskedTarget(Target):
    """Tokens (B, N) int64, of which noise at time t in (0, 1] leaves a share alpha(t) and masks the others.

    symbols: size of the alphabet; `symbols` itself is the mask. The loss of a sample is the masked places'
    cross-entropy times weight(t) / N: its mean over t in [0, 1] is the bound, in nats a token.
    Raises: ValueError if there are fewer than two symbols.
    Source: Shi et al. 2024 (MD4), eq. 5.
    """

    level = "t"
    stratified = True

    def __init__(self, symbols: int):
        super().__init__(sigma_data=1.0)  # tokens are no points: nothing is scaled
        if symbols < 2:
            raise ValueError(f"symbols={symbols} must be at least 2")
        self.mask_id = symbols

    def noised(self, y: Tensor, sigma: Tensor, *, seed: int, offset: int) -> Tensor:
        """y with masks, the same for the same address on every device. sigma: the times, (B,)."""
        return dbkernels.mask_tokens(y, masking.alpha(sigma), self.mask_id, seed=seed, offset=offset)[0]

    def inputs(self, z: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """z as it is, and c_noise: the time, over the range that the noise embedding resolves."""
        return z, C_NOISE * (sigma.float() - 0.5)

    def read(self, head: nn.Module, h: Tensor, cond: Tensor, z: Tensor, sigma: Tensor) -> Output:
        """Features (B, N, D) -> logits (B, N, V), float32, and z with the likeliest tokens in place of masks."""
        logits = head(h, cond).float()
        return Output(logits, torch.where(z == self.mask_id, logits.argmax(-1), z))

    def loss(self, output: Output, z: Tensor, y: Tensor, sigma: Tensor, weight: float = 1.0) -> Tensor:
        """Return weight·weight(t) / N times the sum of the masked places' cross-entropy, (B,), nats."""
        entropy = functional.cross_entropy(output.raw.transpose(1, 2), y, reduction="none")
        return weight * masking.weight(sigma) * torch.where(z == self.mask_id, entropy, 0).mean(1)

    def objective(
        self, head: nn.Module, h: Tensor, cond: Tensor, z: Tensor, y: Tensor, sigma: Tensor, weight: float = 1.0
    ) -> Objective:
        """`loss` without the logits of visible places; as error the same again: information, per unit of t."""
        row_weight = (masking.weight(sigma) / (y.shape[1] / weight)).unsqueeze(1).expand(y.shape)
        entropy = dbkernels.masked_cross_entropy(
            h, head.weight, y, z == self.mask_id, bias=head.bias, row_weight=row_weight, reduction="none"
        )
        per_sample = entropy.sum(1)
        return Objective(per_sample, per_sample.detach())

    def check(self, y: Tensor) -> None:
        """Raise ValueError unless `y` is a non-empty (B, N) int64 tensor of symbols; on a device they aren't read."""
        self._check_tokens(y, "y", self.mask_id)

    def check_noised(self, z: Tensor) -> None:
        """Raise ValueError unless `z` is a non-empty (B, N) int64 tensor of symbols and masks; on a device they aren't
        read."""
        self._check_tokens(z, "z", self.mask_id + 1)

    def _check_tokens(self, tokens: Tensor, name: str, count: int) -> None:
        if tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.numel() == 0:
            raise ValueError(f"{name} must be non-empty int64 tokens (B, N), got {tuple(tokens.shape)} {tokens.dtype}")
        check_labels(f"{name}'s tokens", tokens, count)
