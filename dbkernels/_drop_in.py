"""The modules that `replace` puts in: AdaLayerNorm and AdaRMSNorm, called as the norms that they replace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dbkernels._dtypes import compute_dtype
from dbkernels.ada_norm import ada_layer_norm, ada_rms_norm
from dbkernels.nn import AdaLayerNorm, AdaRMSNorm


class _DropIn(nn.Module):
    """A module called with one tensor, by position or by the argument name of the replaced module's forward.

    argument: that name. promotes: inputs narrower than the weight are returned in the weight's dtype, as by a module
    that multiplies by its weight last.
    """

    argument = "input"
    promotes = False
    weight: nn.Parameter | None

    def _input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        given = (*args, *(kwargs[name] for name in kwargs if name == self.argument))
        if len(given) != 1 or len(args) + len(kwargs) != 1:
            raise TypeError(
                f"{type(self).__name__} takes one tensor, {self.argument}; it got {len(args)} positional arguments and "
                f"{sorted(kwargs)}"
            )
        x = given[0]
        if self.promotes and self.weight is not None:
            x = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        return x


class DropInLayerNorm(_DropIn, AdaLayerNorm):
    """AdaLayerNorm in place of an nn.LayerNorm, with its parameters."""

    def __init__(self, dim: int, eps: float, weight: nn.Parameter | None, bias: nn.Parameter | None):
        super().__init__(dim, eps=eps, device="meta")
        self.weight, self.bias = weight, bias

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Normalise x, (..., dim). Return its shape and dtype."""
        x = self._input(args, kwargs)
        return ada_layer_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)


class DropInRMSNorm(_DropIn, AdaRMSNorm):
    """AdaRMSNorm in place of an RMSNorm, with its weight. eps None: the machine epsilon of the arithmetic's dtype."""

    def __init__(self, dim: int, eps: float | None, weight: nn.Parameter | None):
        super().__init__(dim, eps=eps or 0.0, device="meta")
        self.eps = eps  # type: ignore[assignment]
        self.weight = weight

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Normalise x, (..., dim). Return its shape and dtype."""
        x = self._input(args, kwargs)
        eps = torch.finfo(compute_dtype(x.dtype)).eps if self.eps is None else self.eps
        return ada_rms_norm(x, weight=self.weight, eps=eps)
