"""The ops as modules. Their state_dict keys are those of the PyTorch modules they stand for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dbkernels.ada_norm import ada_layer_norm, ada_rms_norm
from dbkernels.edm_loss import edm_loss
from dbkernels.gated_residual_norm import gated_residual_norm


class AdaLayerNorm(nn.Module):
    """`ada_layer_norm` with weights of its own, if any; without shift and scale a drop-in for nn.LayerNorm(dim).

    affine: learn `weight` (and `bias` if asked), both (dim,). Raises: ValueError if dim < 1 or eps is negative.
    """

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-6,
        affine: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check(dim, eps)
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype)) if affine and bias else None

    def forward(self, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """x: (..., dim); shift, scale: per sample or per token -> x's shape and dtype."""
        return ada_layer_norm(x, shift, scale, weight=self.weight, bias=self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, affine={self.weight is not None}"


class AdaRMSNorm(nn.Module):
    """`ada_rms_norm` with a weight of its own, if any; without shift and scale a drop-in for nn.RMSNorm(dim).

    affine: learn `weight`, (dim,). Raises: ValueError if dim < 1 or eps is negative.
    """

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-6,
        affine: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check(dim, eps)
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype)) if affine else None

    def forward(self, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """x: (..., dim); shift, scale: per sample or per token -> x's shape and dtype."""
        return ada_rms_norm(x, shift, scale, weight=self.weight, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, affine={self.weight is not None}"


class GatedResidualNorm(nn.Module):
    """`gated_residual_norm` with weights of its own, if any: what a DiT block does between attention and MLP.

    norm: "layer" or "rms". affine: learn `weight` (and `bias` with "layer"), (dim,).
    Raises: ValueError if dim < 1, eps is negative or norm is unknown.
    """

    def __init__(
        self,
        dim: int,
        *,
        norm: str = "layer",
        eps: float = 1e-6,
        affine: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check(dim, eps)
        if norm not in ("layer", "rms"):
            raise ValueError(f'norm must be "layer" or "rms", got {norm!r}')
        self.dim, self.norm, self.eps = dim, norm, eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype)) if affine else None
        with_bias = affine and norm == "layer"
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype)) if with_bias else None

    def forward(self, x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """x, branch: (..., dim); gate, shift, scale: per sample or per token -> x + gate·branch, and its norm."""
        return gated_residual_norm(
            x, branch, gate, shift, scale, weight=self.weight, bias=self.bias, eps=self.eps, norm=self.norm
        )

    def extra_repr(self) -> str:
        return f"{self.dim}, norm={self.norm!r}, eps={self.eps}, affine={self.weight is not None}"


class EDMLoss(nn.Module):
    """`edm_loss` with its sigma_data and reduction kept.

    Raises: ValueError if sigma_data or reduction is out of range, at the first call.
    """

    def __init__(self, sigma_data: float = 0.5, reduction: str = "mean"):
        super().__init__()
        self.sigma_data, self.reduction = sigma_data, reduction

    def forward(self, F: Tensor, z: Tensor, y: Tensor, sigma: float | Tensor, weight: float = 1.0) -> Tensor:
        """F, z, y: (B, ...); sigma: (B,) -> `weight` times the loss, by `reduction`."""
        return edm_loss(F, z, y, sigma, sigma_data=self.sigma_data, reduction=self.reduction, weight=weight)

    def extra_repr(self) -> str:
        return f"sigma_data={self.sigma_data}, reduction={self.reduction!r}"


def _check(dim: int, eps: float) -> None:
    if dim < 1:
        raise ValueError(f"dim={dim} must be at least 1: it is the width that is normalised")
    if not eps >= 0:
        raise ValueError(f"eps={eps} must be zero or positive")
