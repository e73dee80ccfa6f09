"""Tokens under masks (MD4): the noise is masks, its level the time t, the loss the likelihood bound's integrand."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

import dbkernels

from ..noise import mask_schedule
from ..noise.rng import draw, stream
from .base import Features, Loss, Noised, Output, Target, check_logits, linear_of
from .devices import check_labels

T_MIN = 1e-3  # a partition's last edge must be positive; below it lies the bound's reconstruction term
C_NOISE = 4.0  # t spans [0, 1], the embedding expects about [-2, 2]


class MaskedTarget(Target):
    """Tokens (B, N) int64, of which noise at time t in (0, 1] leaves a share alpha(t) and masks the others.

    The loss of a sample is the masked places' cross-entropy times weight(t) / N: its mean over t in [0, 1] is the
    bound, in nats per token.

    Args:
        vocab_size: Number of tokens; `vocab_size` itself is the mask's id.
        never: A token that is never written, since it is a tokenizer's own mask.

    Raises: ValueError if there are fewer than two tokens.
    Source: Shi et al. 2024 (MD4), arXiv 2406.04329, eq. 5.
    """

    level = "t"
    example_shape = (128,)  # tokens of a text
    stratified = True

    def __init__(self, vocab_size: int, never: int | None = None):
        super().__init__(sigma_data=1.0)  # tokens are no points: nothing is scaled
        if vocab_size < 2:
            raise ValueError(f"vocab_size={vocab_size} must be at least 2")
        self.mask_id, self.never = vocab_size, never

    def noised(self, y: Tensor, sigma: Tensor, *, seed: int | Tensor, offset: int | Tensor) -> Tensor:
        """Return y with masks, the same for one (seed, offset) on every device. sigma: the times, (B,)."""
        return dbkernels.mask_tokens(y, mask_schedule.alpha(sigma), self.mask_id, seed=seed, offset=offset)[0]

    def inputs(self, z: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return z as it is, and c_noise: the time, over the range that the noise embedding resolves."""
        return z, C_NOISE * (sigma.float() - 0.5)

    def read(self, features: Features, z: Tensor, sigma: Tensor) -> Output:
        """Return logits (B, N, V), float32, and z with the likeliest tokens in place of masks."""
        logits = features.head(features.h, features.cond).float()
        check_logits(logits.shape, (*z.shape, self.mask_id))
        return Output(logits, torch.where(z == self.mask_id, self.writable(logits).argmax(-1), z))

    def writable(self, logits: Tensor) -> Tensor:
        """Return logits (..., V) with no chance for the token that is never written."""
        if self.never is None:
            return logits
        logits = logits.clone()
        logits[..., self.never] = -torch.inf
        return logits

    def loss(
        self, features: Features, noised: Noised, y: Tensor, sigma: Tensor, *, weight: float = 1.0, error: bool = False
    ) -> Loss:
        """Return `weight` times weight(t) / N times the masked places' cross-entropy, (B,), nats.

        A linear head never makes the logits of visible places. The error is the loss itself: information
        per unit of t.
        """
        head, masked = features.head, noised.z == self.mask_id
        row_weight = (mask_schedule.weight(sigma) / (y.shape[1] / weight)).unsqueeze(1).expand(y.shape)
        linear = linear_of(head)
        if linear is not None:
            check_logits((*y.shape, linear.out_features), (*y.shape, self.mask_id))
            entropy = dbkernels.masked_cross_entropy(
                features.h, linear.weight, y, masked, bias=linear.bias, row_weight=row_weight, reduction="none"
            )
        else:
            logits = head(features.h, features.cond).float()
            check_logits(logits.shape, (*y.shape, self.mask_id))
            entropy = functional.cross_entropy(logits.transpose(1, 2), y, reduction="none")
            entropy = torch.where(masked, entropy, 0) * row_weight
        per_sample = entropy.sum(1)
        return Loss(per_sample, per_sample.detach() / weight if error else None)

    def start(self, count: int, sigma: float, *, seed: int, device: torch.device) -> Tensor:
        """Return nothing but masks."""
        return torch.full((count, *self.known_shape()), self.mask_id, device=device)

    def advance(self, z: Tensor, output: Output, sigma: float, below: float, *, seed: int, step: int) -> Tensor:
        """Return z with masks revealed: each with probability (alpha(s) - alpha(t)) / (1 - alpha(t)), all at s = 0.

        Source: Shi et al. 2024 (MD4), algorithm 2.
        """
        tokens = draw(self.writable(output.raw), seed=stream(seed, "tokens"), offset=step)
        return self.reveal(z, tokens, sigma, below, seed=seed, step=step)

    def reveal(self, z: Tensor, tokens: Tensor, t: float, s: float, *, seed: int, step: int) -> Tensor:
        """Return z with some masks replaced by `tokens`, as a step from time t to time s does."""
        kept = mask_schedule.alpha(torch.tensor([t, s], dtype=torch.float64))
        share = float((kept[1] - kept[0]) / (1 - kept[0])) if s > 0 else 1.0
        u = dbkernels.philox_uniform(tuple(z.shape), seed=stream(seed, "reveal"), offset=step, device=z.device)
        return torch.where((z == self.mask_id) & (u < share), tokens, z)

    def check(self, y: Tensor) -> None:
        """Raise ValueError unless `y` is a non-empty (B, N) int64 tensor of tokens; on a device they aren't read."""
        self._check_tokens(y, "y", self.mask_id)

    def check_noised(self, z: Tensor) -> None:
        """Raise ValueError unless `z` is a non-empty (B, N) int64 tensor of tokens and masks; on a device they aren't
        read."""
        self._check_tokens(z, "z", self.mask_id + 1)

    def _check_tokens(self, tokens: Tensor, name: str, count: int) -> None:
        if tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.numel() == 0:
            raise ValueError(f"{name} must be non-empty int64 tokens (B, N), got {tuple(tokens.shape)} {tokens.dtype}")
        check_labels(f"{name}'s tokens", tokens, count)
