"""Latents of networks that were pretrained at discrete timesteps: their own inputs, predictions and loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..noise import edm
from .base import Features, Loss, Noised, Output
from .continuous import ContinuousTarget

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")


class ScheduledTarget(ContinuousTarget):
    """A continuous target for a network that takes x_t and a timestep, with x_t = c_in z and z = y + sigma eps.

    Variance preserving, sigma^2 = (1 - abar) / abar: x_t = sqrt(abar) y + sqrt(1 - abar) eps. Flow matching,
    sigma = t / (1 - t): x_t = (1 - t) y + t eps.

    Args:
        prediction: What the network predicts: "epsilon", "v_prediction", "sample", or "flow" (eps - y).
        log_sigmas: ln sigma of each timestep, rising; None for flow matching, which has no table.
        timesteps: How many there are, if there is no table.
        shape: Shape of one sample, e.g. (4, 32, 32); learnt from the first training batch if not given.

    Raises: ValueError on an unknown prediction, or on a table that is missing or has no use.
    Source: arXiv 2006.11239, eq. 14 (epsilon); 2202.00512, appendix D (v); 2403.03206, eq. 13 (flow).
    """

    log_sigmas: Tensor | None

    def __init__(
        self,
        prediction: str,
        log_sigmas: Tensor | None = None,
        *,
        timesteps: int = 1000,
        shape: tuple[int, ...] | None = None,
    ):
        super().__init__(1.0, shape=shape)
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")
        if (log_sigmas is None) != (prediction == "flow"):
            raise ValueError(f"prediction={prediction!r} {'needs' if log_sigmas is None else 'takes no'} log_sigmas")
        self.prediction, self.timesteps = prediction, timesteps if log_sigmas is None else len(log_sigmas)
        self.register_buffer("log_sigmas", None if log_sigmas is None else log_sigmas.double(), persistent=False)

    def timestep(self, sigma: Tensor) -> Tensor:
        """Return the timestep of a level, float32, between two of them by ln sigma."""
        table = self.log_sigmas
        if table is None:
            return self.timesteps * sigma.float() / (1 + sigma.float())
        level = sigma.double().log()
        above = torch.searchsorted(table, level).clamp(1, len(table) - 1)
        share = (level - table[above - 1]) / (table[above] - table[above - 1])
        return (above - 1 + share.clamp(0, 1)).float()

    def sigma(self, timestep: Tensor) -> Tensor:
        """Return the level of a timestep, float64; inf where flow matching is at noise alone.

        Raises: ValueError if a timestep is outside of the network's, for which their values are read.
        """
        t, table = timestep.double(), self.log_sigmas
        last = self.timesteps if table is None else self.timesteps - 1
        if not ((t >= 0) & (t <= last)).all():
            raise ValueError(f"timesteps must be in [0, {last}], got {float(t.min()):g} to {float(t.max()):g}")
        if table is None:
            return t / (self.timesteps - t)
        below = t.long().clamp(max=len(table) - 2)
        return torch.lerp(table[below], table[below + 1], t - below).exp()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        table = self.log_sigmas
        super()._apply(fn, recurse)
        if table is not None and self.log_sigmas is not None:
            self.log_sigmas = table.to(self.log_sigmas.device)  # never in halves, which tell few timesteps apart
        return self

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return c_skip and c_out, with which D = c_skip z + c_out F, and c_in, each of sigma's shape, float32."""
        sigma = sigma.float()
        if self.prediction == "flow":
            c_in = 1 / (1 + sigma)
            return c_in, -sigma * c_in, c_in
        c_in = (1 + sigma.square()).rsqrt()
        if self.prediction == "epsilon":
            return torch.ones_like(sigma), -sigma, c_in
        if self.prediction == "v_prediction":
            return c_in.square(), -sigma * c_in, c_in
        return torch.zeros_like(sigma), torch.ones_like(sigma), c_in

    def clean(self, y: Tensor) -> Tensor:
        """Return y as float32: halves would round the noise of low levels away."""
        return y.float()

    def inputs(self, z: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return the network's inputs x_t and the timestep."""
        _, _, c_in = self.scalings(sigma)
        return edm.expand_as(c_in, z) * z, self.timestep(sigma)

    def add_noise(self, y: Tensor, sigma: Tensor, *, seed: int | Tensor, offset: int | Tensor) -> Noised:
        """Return z, x_t and the timestep."""
        z = self.noised(y, sigma, seed=seed, offset=offset)
        return Noised(z, *self.inputs(z, sigma))

    def read(self, features: Features, z: Tensor, sigma: Tensor) -> Output:
        """Return the prediction F, of z's channels (further ones predict variances), and D, float32."""
        c_skip, c_out, _ = self.scalings(sigma)
        F = features.head(features.h, features.cond)[:, : z.shape[1]].float()
        return Output(F, edm.expand_as(c_skip, z) * z.float() + edm.expand_as(c_out, z) * F)

    def loss(
        self, features: Features, noised: Noised, y: Tensor, sigma: Tensor, *, weight: float = 1.0, error: bool = False
    ) -> Loss:
        """Return `weight` times the mean square of the prediction's error per sample, (B,)."""
        c_skip, c_out, _ = self.scalings(sigma)
        F = features.head(features.h, features.cond)[:, : y.shape[1]].float()
        wanted = (y.float() - edm.expand_as(c_skip, y) * noised.z) / edm.expand_as(c_out, y)
        per_sample = (F - wanted).square().flatten(1).mean(1)
        wrong = per_sample.detach() * c_out.square() * F[0].numel() if error else None
        return Loss(weight * per_sample, wrong)
