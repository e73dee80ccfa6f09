"""Images, latents and other continuous targets: EDM's weighted L2 loss."""

from __future__ import annotations

from torch import Tensor, nn

import dbkernels

from ..noise import edm
from .base import Output, Target


class ContinuousTarget(Target):
    """A target that is itself the point noise is added to (an image, a latent); EDM's weighted L2 loss.

    sigma_data: root mean square of the target per element.
    """

    def __init__(self, sigma_data: float = edm.SIGMA_DATA):
        super().__init__(sigma_data)

    def read(self, head: nn.Module, h: Tensor, cond: Tensor, z: Tensor, sigma: Tensor) -> Output:
        """Features -> F = head(h, cond) and D = c_skip z + c_out F, float32."""
        c = edm.precondition(sigma, self.sigma_data)
        F = head(h, cond).float()
        return Output(F, edm.expand_as(c.c_skip, z) * z.float() + edm.expand_as(c.c_out, z) * F)

    def loss(self, output: Output, z: Tensor, y: Tensor, sigma: Tensor, weight: float = 1.0) -> Tensor:
        """Return `weight` times EDM's weighted |D - y|^2 per sample, (B,), as |F - (y - c_skip z) / c_out|^2: no
        overflow at small sigma. The factor is known to the op, so that backward has none left to apply."""
        F, data = output.raw, self.sigma_data
        return dbkernels.edm_loss(F, z, y, sigma, sigma_data=data, reduction="sample", weight=weight)

    def check(self, y: Tensor) -> None:
        """Raise ValueError unless `y` is a non-empty floating tensor."""
        if not y.is_floating_point() or y.dim() == 0 or y.numel() == 0:
            raise ValueError(f"the target y must be a non-empty floating (B, ...), got {tuple(y.shape)} {y.dtype}")

    def check_noised(self, z: Tensor) -> None:
        """Raise ValueError unless `z` is a non-empty floating (B, ...)."""
        if not z.is_floating_point() or z.dim() == 0 or z.numel() == 0:
            raise ValueError(f"z must be a non-empty floating (B, ...), got {tuple(z.shape)} {z.dtype}")
