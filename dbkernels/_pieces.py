"""Bounded views of a tensor, so that the temporaries of a definition in PyTorch stay small."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PIECE = 2**20  # elements worked on at once, a multiple of 8: temporaries are some MiB, however large the tensors


def pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Return a contiguous tensor in views of at most PIECE elements; the whole under a compiler, which fuses."""
    if tensor.numel() <= PIECE or torch.compiler.is_compiling():
        return (tensor,)
    return tensor.view(-1).split(PIECE)
