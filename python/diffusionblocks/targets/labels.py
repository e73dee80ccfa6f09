"""Labels as points of a codebook: cross-entropy of the head's logits."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from ..noise import edm
from .base import Output, Target
from .devices import check_labels


class ClassTarget(Target):
    """A label as a point of a codebook; cross-entropy of the head's logits.

    table: (K, d) embeddings. trainable: learn it (then all blocks must share one copy). normalize: rows are brought to
    unit length before use. raw_estimate: D is the mean of the rows as stored, not as used (the published
    code's walk, which leaves the space it was trained in). readout: how logits come from features h (B, D) and z:
    "posterior", head(h) + (z E^T - |E|^2/2) / sigma^2, which gives exactly what z says about the label and leaves the
    rest to the network; "plain", head(h); "edm", head(c_out h + c_skip z), the published code's.
    Raises: ValueError on an unknown readout or a table that is not (K >= 2, d).
    """

    READOUTS = ("posterior", "plain", "edm")

    def __init__(
        self,
        table: Tensor,
        *,
        sigma_data: float | None = None,
        readout: str = "posterior",
        trainable: bool = False,
        normalize: bool = False,
        raw_estimate: bool = False,
    ):
        super().__init__(sigma_data or 1 / math.sqrt(max(table.shape[-1], 1)))
        if readout not in self.READOUTS:
            raise ValueError(f"readout must be one of {', '.join(self.READOUTS)}, got {readout!r}")
        if table.dim() != 2 or len(table) < 2:
            raise ValueError(f"table must be (K, d) with K >= 2, got {tuple(table.shape)}")
        self.readout, self.normalize, self.raw_estimate = readout, normalize, raw_estimate
        self.table = nn.Parameter(table.detach().clone(), requires_grad=trainable)

    @property
    def classes(self) -> int:
        """K."""
        return len(self.table)

    def embeddings(self) -> Tensor:
        """The codebook as used: (K, d)."""
        return functional.normalize(self.table, dim=-1) if self.normalize else self.table

    def evidence(self, z: Tensor) -> Tensor:
        """What z says of each class, in units of 1 / sigma^2: (B, d) -> (B, K), float32."""
        table = self.embeddings().float()
        with torch.autocast(z.device.type, enabled=False):
            return z.float() @ table.T - table.square().sum(-1) / 2

    def clean(self, y: Tensor) -> Tensor:
        """Labels (B,) int64 -> (B, d)."""
        return self.embeddings()[y]

    def read(self, head: nn.Module, h: Tensor, cond: Tensor, z: Tensor, sigma: Tensor) -> Output:
        """Features h (B, D), conditioning (B, C), z (B, d), sigma (B,) -> logits (B, K) and D (B, d), float32."""
        table = self.embeddings().float()
        if self.readout == "edm":
            c = edm.precondition(sigma, self.sigma_data)
            h = edm.expand_as(c.c_out, h) * h + edm.expand_as(c.c_skip, z) * z
        logits = head(h, cond).float()
        if self.readout == "posterior":
            logits = logits + self.evidence(z) / sigma.float().square().unsqueeze(-1)
        with torch.autocast(logits.device.type, enabled=False):
            denoised = logits.softmax(-1) @ (self.table.float() if self.raw_estimate else table)
        return Output(logits, denoised)

    def loss(self, output: Output, z: Tensor, y: Tensor, sigma: Tensor, weight: float = 1.0) -> Tensor:
        """Return `weight` times the cross-entropy per sample, (B,), nats."""
        entropy = functional.cross_entropy(output.raw, y.long(), reduction="none")
        return entropy if weight == 1 else entropy * weight

    def check(self, y: Tensor) -> None:
        """Raise ValueError unless `y` is a non-empty (B,) integer tensor of labels in [0, K); on a device their values
        aren't read."""
        if y.dim() != 1 or y.dtype not in (torch.int64, torch.int32) or len(y) == 0:
            raise ValueError(f"labels must be a non-empty 1-d integer tensor, got {tuple(y.shape)} {y.dtype}")
        check_labels("labels", y, self.classes)

    def check_noised(self, z: Tensor) -> None:
        """Raise ValueError unless `z` is a non-empty floating (B, d)."""
        width = self.table.shape[1]
        if z.dim() != 2 or z.shape[1] != width or len(z) == 0 or not z.is_floating_point():
            raise ValueError(f"z must be a floating (B >= 1, {width}), got {tuple(z.shape)} {z.dtype}")


def spread_codebook(classes: int, dim: int, *, seed: int = 0) -> Tensor:
    """A fixed codebook of unit vectors, (classes, dim) float32: orthonormal if classes <= dim, else random.

    Raises: ValueError if classes < 2 or dim < 1.
    """
    if classes < 2 or dim < 1:
        raise ValueError(f"a codebook needs classes >= 2 and dim >= 1, got {classes} and {dim}")
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(max(classes, dim), dim, generator=generator, dtype=torch.float64)
    rows = torch.linalg.qr(normal).Q if classes <= dim else functional.normalize(normal, dim=-1)
    return rows[:classes].float().contiguous()
