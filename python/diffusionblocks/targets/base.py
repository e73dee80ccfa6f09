"""What a block denoises: the space noise is added in, the loss there, and the denoised estimate."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

import dbkernels

from ..noise import edm


class Output(NamedTuple):
    """What a block says about a noised target.

    raw: logits (B, K) or F, of the target's shape. denoised: D, of the target's shape.
    """

    raw: Tensor
    denoised: Tensor


class Objective(NamedTuple):
    """What training wants of a batch: the unweighted loss, of the levels' shape or their mean, and |y - D|^2 without
    gradient, of the levels' shape."""

    per_sample: Tensor
    error: Tensor


class Target(nn.Module):
    """What y is to a block: how noise hides it, what of it the network sees, how an estimate is read, and the loss.

    The same for all blocks, so with independent blocks it is fixed. A subclass defines `read`, `loss`, `check` and
    `check_noised`; one whose noise isn't y + sigma eps also `noised` and `inputs`.
    sigma_data: root mean square of the clean target per element. stratified: a batch's levels are spread evenly over
    their distribution, not drawn one by one.
    """

    level = "sigma"  # what a noise level is called
    stratified = False

    def __init__(self, sigma_data: float):
        super().__init__()
        edm.check_sigma_data(sigma_data)
        self.sigma_data = sigma_data

    def clean(self, y: Tensor) -> Tensor:
        """The point that noise is added to."""
        return y

    def level_shape(self, y: Tensor) -> tuple[int, ...]:
        """Shape of the noise levels to draw for a batch: (B,), one a sample."""
        return (len(y),)

    def noised(self, y: Tensor, sigma: Tensor, *, seed: int, offset: int) -> Tensor:
        """z = y + sigma eps, the same for the same address on every device."""
        return dbkernels.inject_noise(self.clean(y), sigma, seed=seed, offset=offset)

    def inputs(self, z: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """What the stem gets of z and of sigma: c_in z and c_noise."""
        c = edm.precondition(sigma, self.sigma_data)
        return edm.expand_as(c.c_in, z) * z, c.c_noise

    def read(self, head: nn.Module, h: Tensor, cond: Tensor, z: Tensor, sigma: Tensor) -> Output:
        """Features and conditioning -> raw output and D."""
        raise NotImplementedError

    def loss(self, output: Output, z: Tensor, y: Tensor, sigma: Tensor, weight: float = 1.0) -> Tensor:
        """Return `weight` times the loss per sample, (B,)."""
        raise NotImplementedError

    def objective(
        self, head: nn.Module, h: Tensor, cond: Tensor, z: Tensor, y: Tensor, sigma: Tensor, weight: float = 1.0
    ) -> Objective:
        """Return `weight` times the loss, and the error, straight from features where the raw output isn't needed."""
        output = self.read(head, h, cond, z, sigma)
        error = (self.clean(y).detach() - output.denoised.detach()).square().flatten(1).sum(1)
        return Objective(self.loss(output, z, y, sigma, weight), error)

    def check(self, y: Tensor) -> None:
        """Raise ValueError unless `y` is a batch of targets."""
        raise NotImplementedError

    def check_noised(self, z: Tensor) -> None:
        """Raise ValueError unless `z` is a batch of noised targets."""
        raise NotImplementedError
