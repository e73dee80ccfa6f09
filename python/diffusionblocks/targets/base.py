"""The clean target y of a denoiser: how noise is added, the network's inputs, the loss, the denoised estimate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import dbkernels

from ..noise import edm


class Features(NamedTuple):
    """A block's output: the features h, the head that decodes them, and the conditioning (or None)."""

    head: Callable[[Tensor, Any], Tensor]
    h: Tensor
    cond: Any


class Output(NamedTuple):
    """A decoded output. raw: logits (..., K) or F, of y's shape. denoised: D, of z's shape."""

    raw: Tensor
    denoised: Tensor


class Noised(NamedTuple):
    """A noised batch. z: what the loss takes; scaled: c_in z, and c_noise: the stem's inputs."""

    z: Tensor
    scaled: Tensor
    c_noise: Tensor


class Loss(NamedTuple):
    """A batch's loss. per_sample: unreduced, of the levels' shape, or means of it; error: |y - D|^2, of the levels'
    shape, without gradient, None unless asked for."""

    per_sample: Tensor
    error: Tensor | None


def linear_of(head: Any) -> nn.Linear | None:
    """Return the linear map that is all that a head's forward(features, cond) does: None unless that is certain.

    The class that defines the forward promises it by `is_linear = True`; the map is the head's `linear`, or else the
    head itself. Hooks and forwards that were replaced do more."""
    of = (vars(kind) for kind in type(head).__mro__)
    promised = next((own.get("is_linear", False) for own in of if own.keys() & {"forward", "is_linear"}), False)
    linear = getattr(head, "linear", head) if promised and head.is_linear else None
    if not isinstance(linear, nn.Linear) or any(map(_does_more, {head, linear})):
        return None
    return linear if linear is head or type(linear).forward is nn.Linear.forward else None


def _does_more(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return "forward" in vars(module) or type(module).__call__ is not nn.Module.__call__ or any(hooks)


def check_logits(made: Sequence[int], wanted: Sequence[int]) -> None:
    """Raise ValueError unless a head's logits have the shape wanted: others could be broadcast to it unseen."""
    if tuple(made) != tuple(wanted):
        raise ValueError(f"the head must give one logit per class, {tuple(wanted)}, got {tuple(made)}")


class Target(nn.Module):
    """Base class of targets. All blocks share one, so independent blocks need it fixed.

    A subclass defines `read`, `loss`, `check`, `check_noised`; one whose noise isn't y + sigma eps also `noised`,
    `inputs`, `start` and `advance`.

    Args:
        sigma_data: Root mean square of the clean target per element.

    Attributes:
        shape: Shape of one sample of z, known from the first training batch if not before; sampling needs it.
    """

    level = "sigma"  # name of a noise level
    example_shape: tuple[int, ...] = (3, 32, 32)  # of a sample, in messages
    stratified = False  # spread a batch's levels evenly over their distribution instead of drawing each

    def __init__(self, sigma_data: float):
        super().__init__()
        edm.check_sigma_data(sigma_data)
        self.sigma_data = sigma_data
        self.shape: tuple[int, ...] | None = None

    def clean(self, y: Tensor) -> Tensor:
        """Return the points that noise is added to."""
        return y

    def sample_shape(self, y: Tensor) -> tuple[int, ...]:
        """Return the shape of one sample of z for a batch y."""
        return tuple(y.shape[1:])

    def level_shape(self, y: Tensor) -> tuple[int, ...]:
        """Return the shape of a batch's noise levels: (B,), one per sample."""
        return (len(y),)

    def noised(self, y: Tensor, sigma: Tensor, *, seed: int | Tensor, offset: int | Tensor) -> Tensor:
        """Return z = y + sigma eps, the same for one (seed, offset) on every device."""
        return dbkernels.inject_noise(self.clean(y), sigma, seed=seed, offset=offset)

    def inputs(self, z: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return the stem's inputs c_in z and c_noise."""
        c = edm.precondition(sigma, self.sigma_data)
        return edm.expand_as(c.c_in, z) * z, c.c_noise

    def add_noise(self, y: Tensor, sigma: Tensor, *, seed: int | Tensor, offset: int | Tensor) -> Noised:
        """Return the noised batch of a training step."""
        z = self.noised(y, sigma, seed=seed, offset=offset)
        return Noised(z, *self.inputs(z, sigma))

    def read(self, features: Features, z: Tensor, sigma: Tensor) -> Output:
        """Return the decoded output for z at the levels sigma."""
        raise NotImplementedError

    def loss(
        self, features: Features, noised: Noised, y: Tensor, sigma: Tensor, *, weight: float = 1.0, error: bool = False
    ) -> Loss:
        """Return `weight` times the loss of a batch, and the error if asked for."""
        raise NotImplementedError

    def start(self, count: int, sigma: float, *, seed: int, device: torch.device) -> Tensor:
        """Return z at the highest level, (count, *shape): sigma eps.

        Raises: ValueError if the shape of a sample isn't known.
        """
        return sigma * dbkernels.philox_normal((count, *self.known_shape()), seed=seed, device=device)

    def advance(self, z: Tensor, output: Output, sigma: float, below: float, *, seed: int, step: int) -> Tensor:
        """Return z at the level `below`: an Euler step. Source: arXiv 2206.00364, algorithm 1 without churn."""
        r = below / sigma
        return r * z + (1 - r) * output.denoised

    def answer(self, output: Output) -> Tensor:
        """Return what a model is asked for, of its last output: logits, or y itself."""
        return output.raw

    def known_shape(self) -> tuple[int, ...]:
        """Return the shape of one sample of z. Raises: ValueError if it isn't known."""
        if self.shape is None:
            raise ValueError(
                f"the shape of a sample isn't known yet: train, or set model.target.shape, e.g. {self.example_shape}"
            )
        return self.shape

    def check(self, y: Tensor) -> None:
        """Raise ValueError unless `y` is a batch of targets."""
        raise NotImplementedError

    def check_noised(self, z: Tensor) -> None:
        """Raise ValueError unless `z` is a batch of noised targets."""
        raise NotImplementedError
