"""mask_tokens and masked_cross_entropy: masked diffusion's noise, and its loss at the masked positions only.

Both are composed of other ops: random numbers by address, and denoising_cross_entropy on the masked rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dbkernels._address import Number
from dbkernels.denoising_cross_entropy import denoising_cross_entropy
from dbkernels.philox import philox_uniform


def mask_tokens(
    tokens: Tensor, alpha: float | Tensor, mask_id: int, *, seed: Number, offset: Number = 0
) -> tuple[Tensor, Tensor]:
    """Replace each token by `mask_id` with probability 1 - alpha, by address: the same on every device.

    Args:
        tokens: (B, N) int64 or int32.
        alpha: probability of keeping a token, in [0, 1]: a float, or one per sample, (B,). A tensor's values
            aren't checked, as that would synchronise the device.
        seed: in [0, 2^64); offset: in [0, 2^32), for example the step; ints or 0-dim tensors, as for `philox_uniform`.

    Returns:
        (tokens, masked): the tokens with masks, and a bool tensor of the masked positions, both (B, N).

    Raises:
        TypeError: tokens aren't integers, or alpha is neither a float nor a floating tensor.
        ValueError: a shape doesn't fit; a float alpha, seed or offset is out of range.

    Source: Shi et al. 2024 (MD4), eq. 1; Salmon et al. 2011 (Philox4x32-10).
    """
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"tokens must be int64 or int32, got {getattr(tokens, 'dtype', type(tokens).__name__)}")
    if tokens.dim() != 2:
        raise ValueError(f"tokens must be (B, N), got {tuple(tokens.shape)}")
    if isinstance(alpha, Tensor):
        if not alpha.is_floating_point():
            raise TypeError(f"alpha must be floating point, got {alpha.dtype}")
        if alpha.shape not in (tokens.shape[:1], torch.Size()) or alpha.device != tokens.device:
            raise ValueError(f"alpha must have shape {(len(tokens),)} on {tokens.device}, got {tuple(alpha.shape)}")
        alpha = alpha.reshape(-1, 1)
    elif isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"alpha must be a float or a tensor, got {type(alpha).__name__}")
    elif not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} must be in [0, 1]: it is the probability of keeping a token")
    masked = philox_uniform(tokens.shape, seed=seed, offset=offset, device=tokens.device) >= alpha
    return torch.where(masked, mask_id, tokens), masked


def masked_cross_entropy(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    masked: Tensor,
    *,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    **head: Any,
) -> Tensor:
    """Compute denoising_cross_entropy at the masked positions; the others cost no product with the head.

    Indexing the masked positions synchronises the device once. While a CUDA graph is captured, which can't, all
    positions go through the head, weighted by 0 where not masked.

    Args:
        h: (..., d); weight: (V, d); target: (...), int64; masked: (...), bool.
        row_weight: (...), for example -alpha'(t)/(1 - alpha(t)), one per position.
        reduction: "mean" over the masked positions, "sum", or "none", (...), 0 where not masked.
        head: bias, logit_scale, softcap, normalize and ignore_index of `denoising_cross_entropy`.

    Returns:
        float32 (float64 for float64), () or target's shape, in nats. Without masked positions a mean is NaN.

    Raises:
        TypeError: masked isn't bool.
        ValueError: its shape isn't target's; and as `denoising_cross_entropy`.

    Source: Shi et al. 2024 (MD4), eq. 5.
    """
    if not isinstance(masked, Tensor) or masked.dtype != torch.bool:
        raise TypeError(f"masked must be a bool tensor, got {getattr(masked, 'dtype', type(masked).__name__)}")
    if masked.shape != target.shape or masked.device != target.device:
        raise ValueError(
            f"masked has shape {tuple(masked.shape)} on {masked.device}, not target's {tuple(target.shape)}"
        )
    if h.shape[:-1] != target.shape:
        raise ValueError(f"h has shape {tuple(h.shape)}, whose rows aren't target's {tuple(target.shape)}")
    if row_weight is not None and row_weight.shape != target.shape:
        raise ValueError(f"row_weight has shape {tuple(row_weight.shape)}, not target's {tuple(target.shape)}")
    if masked.is_cuda and torch.cuda.is_current_stream_capturing():
        return _of_all(h, weight, target, masked, row_weight, reduction, head)
    places = masked.flatten().nonzero().squeeze(1)
    loss = denoising_cross_entropy(
        h.reshape(-1, h.shape[-1]).index_select(0, places),
        weight,
        target.flatten()[places],
        row_weight=None if row_weight is None else row_weight.flatten()[places],
        reduction=reduction,
        **head,
    )
    if reduction != "none":
        return loss
    return loss.new_zeros(target.numel()).index_copy(0, places, loss).view(target.shape)


def _of_all(
    h: Tensor, weight: Tensor, target: Tensor, masked: Tensor, row_weight: Tensor | None, reduction: str, head: Any
) -> Tensor:
    """Compute the same with all rows, ignoring those that aren't masked. Their h is set to 0: NaN would spread."""
    ignored = head.get("ignore_index", -100)
    return denoising_cross_entropy(
        torch.where(masked.unsqueeze(-1), h, 0),
        weight,
        torch.where(masked, target, ignored),
        row_weight=row_weight,
        reduction=reduction,
        **head,
    )
