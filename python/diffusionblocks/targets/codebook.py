"""Classes as points of a fixed codebook; base of the targets of labels and of tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from .base import Output, Target, check_logits


class CodebookTarget(Target):
    """Classes embedded by the rows of a fixed table; logits are decoded by Bayes' rule.

    The posterior readout is head(h) + (z E^T - |E|^2 / 2) / sigma^2: z's own likelihood of each class is exact, and the
    network adds only the rest. Source: docs/method.md.

    Args:
        table: Embeddings, (K, d).

    Raises: ValueError if the table is not (K >= 2, d).
    """

    def __init__(self, table: Tensor, *, sigma_data: float | None = None):
        if not isinstance(table, Tensor):
            raise TypeError(f"table must be a tensor (K, d), as spread_codebook(K, d) makes one, got {table!r:.60}")
        if table.dim() != 2 or len(table) < 2 or not table.shape[1]:
            raise ValueError(f"table must be (K, d) with K >= 2 and d >= 1, got {tuple(table.shape)}")
        super().__init__(sigma_data or 1 / math.sqrt(table.shape[1]))
        self.table = nn.Parameter(table.detach().clone(), requires_grad=False)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.table)

    def embeddings(self) -> Tensor:
        """Return the codebook in use, (K, d)."""
        return self.table

    def clean(self, y: Tensor) -> Tensor:
        """Return the embeddings of labels: (...) integers -> (..., d)."""
        return self.embeddings()[y]

    def evidence(self, z: Tensor) -> Tensor:
        """Return z's log-likelihood of each class, up to a constant, in units of 1 / sigma^2: (..., d) -> (..., K),
        float32."""
        table = self.embeddings().float()
        with torch.autocast(z.device.type, enabled=False):
            return z.float() @ table.T - table.square().sum(-1) / 2

    def level_per_point(self, sigma: Tensor, z: Tensor) -> Tensor:
        """Return the level of each embedded point: one per label here."""
        return sigma

    def posterior(self, logits: Tensor, z: Tensor, sigma: Tensor) -> Output:
        """Return logits (..., K) updated by z's evidence, and D = softmax E, float32.

        Raises: ValueError if the head doesn't give K logits per point.
        """
        check_logits(logits.shape, (*z.shape[:-1], self.num_classes))
        levels = self.level_per_point(sigma, z).float()
        logits = logits.float() + self.evidence(z) / levels.square().unsqueeze(-1)
        with torch.autocast(logits.device.type, enabled=False):
            return Output(logits, logits.softmax(-1) @ self.embeddings().float())

    def start(self, count: int, sigma: float, *, seed: int, device: torch.device) -> Tensor:
        """Return z = 0, the centre of the noise: no class is favoured, and nothing is drawn."""
        return torch.zeros(count, *self.known_shape(), device=device)


def spread_codebook(num_classes: int, dim: int, *, seed: int = 0) -> Tensor:
    """Return a codebook of unit vectors, (num_classes, dim) float32: orthonormal if num_classes <= dim, else random.

    Raises: ValueError if num_classes < 2 or dim < 1.
    """
    if num_classes < 2 or dim < 1:
        raise ValueError(f"a codebook needs num_classes >= 2 and dim >= 1, got {num_classes} and {dim}")
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(max(num_classes, dim), dim, generator=generator, dtype=torch.float64)
    rows = torch.linalg.qr(normal).Q if num_classes <= dim else functional.normalize(normal, dim=-1)
    return rows[:num_classes].float().contiguous()
