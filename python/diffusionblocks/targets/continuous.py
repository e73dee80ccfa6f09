"""Images, latents and other continuous targets: EDM's weighted L2 loss."""

from __future__ import annotations

from numbers import Integral

from torch import Tensor

import dbkernels

from ..noise import edm
from .base import Features, Loss, Noised, Output, Target


class ContinuousTarget(Target):
    """A target that is itself the point noise is added to.

    Args:
        sigma_data: Root mean square of the target per element.
        shape: Shape of one sample, e.g. (3, 32, 32); learnt from the first training batch if not given.
    """

    def __init__(self, sigma_data: float = edm.SIGMA_DATA, *, shape: tuple[int, ...] | None = None):
        super().__init__(sigma_data)
        sizes = shape if isinstance(shape, (tuple, list)) else [None]
        if shape is not None and not all(isinstance(size, Integral) and size > 0 for size in sizes):
            raise ValueError(f"shape must be that of one sample, e.g. (1,) or (3, 32, 32), got {shape!r}")
        self.shape = self.given = None if shape is None else tuple(map(int, shape))

    def add_noise(self, y: Tensor, sigma: Tensor, *, seed: int | Tensor, offset: int | Tensor) -> Noised:
        """Return c_in z alone, written in one pass: the loss takes it as it is."""
        scaled, c_noise = dbkernels.inject_noise(
            y, sigma, sigma_data=self.sigma_data, return_c_noise=True, seed=seed, offset=offset
        )
        return Noised(scaled, scaled, c_noise)

    def read(self, features: Features, z: Tensor, sigma: Tensor) -> Output:
        """Return F = head(h, cond) and D = c_skip z + c_out F, float32."""
        c = edm.precondition(sigma, self.sigma_data)
        F = features.head(features.h, features.cond).float()
        return Output(F, edm.expand_as(c.c_skip, z) * z.float() + edm.expand_as(c.c_out, z) * F)

    def answer(self, output: Output) -> Tensor:
        """Return y: F, or what a network predicts in its place, is no answer."""
        return output.denoised

    def loss(
        self, features: Features, noised: Noised, y: Tensor, sigma: Tensor, *, weight: float = 1.0, error: bool = False
    ) -> Loss:
        """Return `weight` times EDM's weighted |D - y|^2 per sample, (B,), as |F - (y - c_skip z) / c_out|^2, which
        doesn't overflow at small sigma. Source: arXiv 2206.00364, eq. 8."""
        F = features.head(features.h, features.cond).float()
        if F.shape != y.shape:
            raise ValueError(f"the head must give F in y's shape {tuple(y.shape)}, got {tuple(F.shape)}")
        per_sample = dbkernels.edm_loss(
            F, noised.z, y, sigma, sigma_data=self.sigma_data, z_scaled=True, reduction="sample", weight=weight
        )
        scale = edm.precondition(sigma, self.sigma_data).c_out.square() / weight if error else None
        return Loss(per_sample, None if scale is None else per_sample.detach() * scale * F[0].numel())

    def check(self, y: Tensor) -> None:
        """Raise ValueError unless `y` is a non-empty floating tensor."""
        if not y.is_floating_point() or y.dim() == 0 or y.numel() == 0:
            raise ValueError(f"the target y must be a non-empty floating (B, ...), got {tuple(y.shape)} {y.dtype}")
        if self.given is not None and tuple(y.shape[1:]) != self.given:
            what, shape = "images" if len(self.given) == 3 else "targets y", ", ".join(map(str, self.given))
            raise ValueError(f"{what} must be (B, {shape}) as ContinuousTarget's shape says, got {tuple(y.shape)}")

    def check_noised(self, z: Tensor) -> None:
        """Raise ValueError unless `z` is a non-empty floating (B, ...)."""
        if not z.is_floating_point() or z.dim() == 0 or z.numel() == 0:
            raise ValueError(f"z must be a non-empty floating (B, ...), got {tuple(z.shape)} {z.dtype}")
