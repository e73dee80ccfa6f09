"""Filter logits by temperature, top-k and top-p.

Filters matter at the first denoising steps. At the last ones z determines the token, whatever the temperature.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable

import torch
from torch import Tensor

from ..arguments import check_whole

Filter = Callable[[Tensor], Tensor]


def filtered(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Divide logits by the temperature, up to a constant per row, and set those of filtered tokens to -inf.

    Args:
        logits: (..., V).
        temperature: positive divisor.
        top_k: keep the top_k likeliest tokens; of equally likely ones the first.
        top_p: keep the fewest likeliest tokens whose probabilities reach top_p.

    Returns:
        (..., V) float32.

    Raises:
        ValueError: temperature isn't positive, top_k is less than 1, or top_p isn't in (0, 1].
    """
    check_filters(temperature, top_k, top_p)
    logits = logits.float()
    # the largest becomes 0, so no temperature makes it infinite; a temperature that rounds to 0 would make it NaN
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, torch.finfo(torch.float32).tiny)
    if top_k is not None and top_k < logits.shape[-1]:
        order = logits.sort(dim=-1, descending=True, stable=True).indices
        logits = logits.scatter(-1, order[..., top_k:], -torch.inf)
    if top_p is not None and top_p < 1:
        falling, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        beyond = falling.cumsum(-1) - falling >= top_p  # likelier tokens already reach top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    return logits


def check_filters(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError unless these are arguments of `filtered`."""
    if not isinstance(temperature, numbers.Real) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature!r} must be positive: for the likeliest token take top_k=1")
    if top_k is not None:
        check_whole("top_k", top_k, 1, ", or None for all tokens")
    if top_p is not None and (not isinstance(top_p, numbers.Real) or not 0 < top_p <= 1):
        raise ValueError(f"top_p={top_p!r} must be in (0, 1]")
