"""One class label per sample, denoised as a point of a codebook; cross-entropy of the head's logits."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from .base import Features, Loss, Noised, Output
from .codebook import CodebookTarget, spread_codebook
from .devices import check_labels


class LabelTarget(CodebookTarget):
    """Class labels (B,) as points of a fixed codebook.

    Args:
        num_classes: K.
        dim: Width of the embeddings, d.
        table: A codebook of one's own, (K, d); by default unit vectors, orthonormal if K <= d.
        sigma_data: Root mean square of the embeddings per element; 1 / sqrt(d) by default.

    Raises: ValueError if the sizes don't fit.

    Examples:
        >>> import torch, diffusionblocks as db
        >>> target = db.LabelTarget(num_classes=10, dim=64)
        >>> target.clean(torch.tensor([3, 1])).shape
        torch.Size([2, 64])
    """

    def __init__(self, num_classes: int, dim: int, *, table: Tensor | None = None, sigma_data: float | None = None):
        table = spread_codebook(num_classes, dim) if table is None else table
        if table.shape != (num_classes, dim):
            raise ValueError(f"table must be (num_classes, dim) = ({num_classes}, {dim}), got {tuple(table.shape)}")
        super().__init__(table, sigma_data=sigma_data)
        self.shape = (dim,)

    def sample_shape(self, y: Tensor) -> tuple[int, ...]:
        return (self.table.shape[1],)

    def read(self, features: Features, z: Tensor, sigma: Tensor) -> Output:
        """Return logits (B, K) and D (B, d), float32, for z (B, d) and sigma (B,)."""
        return self.posterior(features.head(features.h, features.cond), z, sigma)

    def loss(
        self, features: Features, noised: Noised, y: Tensor, sigma: Tensor, *, weight: float = 1.0, error: bool = False
    ) -> Loss:
        """Return `weight` times the cross-entropy per sample, (B,), nats."""
        output = self.read(features, noised.z, sigma)
        entropy = functional.cross_entropy(output.raw, y.long(), reduction="none")
        return Loss(entropy if weight == 1 else entropy * weight, self.error(output, y) if error else None)

    def error(self, output: Output, y: Tensor) -> Tensor:
        """Return |y - D|^2 per sample, (B,), without gradient."""
        return (self.clean(y).detach() - output.denoised.detach()).square().sum(-1)

    def check(self, y: Tensor) -> None:
        """Raise ValueError unless `y` is a non-empty (B,) integer tensor of labels in [0, K); on a device their values
        aren't read."""
        if y.dim() != 1 or y.dtype not in (torch.int64, torch.int32) or len(y) == 0:
            raise ValueError(f"labels must be a non-empty 1-d integer tensor, got {tuple(y.shape)} {y.dtype}")
        check_labels("labels", y, self.num_classes)

    def check_noised(self, z: Tensor) -> None:
        """Raise ValueError unless `z` is a non-empty floating (B, d)."""
        width = self.table.shape[1]
        if z.dim() != 2 or z.shape[1] != width or len(z) == 0 or not z.is_floating_point():
            raise ValueError(f"z must be a floating (B >= 1, {width}), got {tuple(z.shape)} {z.dtype}")
