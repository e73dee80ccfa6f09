"""The ops as modules, with the state_dict keys of the PyTorch modules that they replace."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dbkernels.ada_norm import ada_layer_norm, ada_rms_norm
from dbkernels.edm_loss import edm_loss
from dbkernels.gated_residual_norm import gated_residual_norm


class AdaLayerNorm(nn.Module):
    """`ada_layer_norm` as a module; without shift and scale a drop-in replacement for nn.LayerNorm(dim).

    Args:
        dim: width of the last dimension. eps: added to the variance.
        affine: learn `weight` and, with bias, `bias`, both (dim,).

    Raises:
        ValueError: dim < 1 or eps is negative.
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
        """Normalise x, (..., dim), with shift and scale per sample or per token. Return x's shape and dtype."""
        return ada_layer_norm(x, shift, scale, weight=self.weight, bias=self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, affine={self.weight is not None}"


class AdaRMSNorm(nn.Module):
    """`ada_rms_norm` as a module; without shift and scale a drop-in replacement for nn.RMSNorm(dim).

    Args:
        dim: width of the last dimension. eps: added to the mean square.
        affine: learn `weight`, (dim,).

    Raises:
        ValueError: dim < 1 or eps is negative.
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
        """Normalise x, (..., dim), with shift and scale per sample or per token. Return x's shape and dtype."""
        return ada_rms_norm(x, shift, scale, weight=self.weight, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, affine={self.weight is not None}"


class GatedResidualNorm(nn.Module):
    """`gated_residual_norm` as a module: the step between attention and MLP in a DiT block.

    Args:
        dim: width of the last dimension. eps: added to the variance (the mean square for "rms").
        norm: "layer" or "rms".
        affine: learn `weight` (and `bias` with "layer"), (dim,).

    Raises:
        ValueError: dim < 1, eps is negative or norm is unknown.
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
        """Return x + gate·branch, (..., dim), and its norm; gate, shift and scale are per sample or per token."""
        return gated_residual_norm(
            x, branch, gate, shift, scale, weight=self.weight, bias=self.bias, eps=self.eps, norm=self.norm
        )

    def extra_repr(self) -> str:
        return f"{self.dim}, norm={self.norm!r}, eps={self.eps}, affine={self.weight is not None}"


class EDMLoss(nn.Module):
    """`edm_loss` as a module, with a fixed sigma_data and reduction.

    Raises:
        ValueError: at the first call, sigma_data or reduction is out of range.
    """

    def __init__(self, sigma_data: float = 0.5, reduction: str = "mean"):
        super().__init__()
        self.sigma_data, self.reduction = sigma_data, reduction

    def forward(self, F: Tensor, z: Tensor, y: Tensor, sigma: float | Tensor, weight: float = 1.0) -> Tensor:
        """Return `weight` times the loss of F, z, y (B, ...) at noise levels sigma (B,), by `reduction`."""
        return edm_loss(F, z, y, sigma, sigma_data=self.sigma_data, reduction=self.reduction, weight=weight)

    def extra_repr(self) -> str:
        return f"sigma_data={self.sigma_data}, reduction={self.reduction!r}"


def _check(dim: int, eps: float) -> None:
    if dim < 1:
        raise ValueError(f"dim={dim} must be at least 1: it is the width that is normalised")
    if not eps >= 0:
        raise ValueError(f"eps={eps} must be zero or positive")
