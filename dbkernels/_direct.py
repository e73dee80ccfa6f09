"""Decide whether an op may bypass PyTorch's dispatcher, which takes longer than a small kernel runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dbkernels._library import HAS_TRITON, backend

_PLAIN = (Tensor, torch.nn.Parameter)
_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack
_tracing = torch._C._is_tracing  # torch.jit.trace records what the dispatcher sees
_has_storage = torch._C._has_storage  # the tensors of batched gradients have none


def direct(x: Tensor, *others: Tensor | None) -> bool:
    """Return whether all are plain tensors, x on a GPU, and nothing traces, transforms or watches the call.

    Otherwise the op must go through the dispatcher: for torch.compile, torch.jit.trace, fake tensors and other dispatch
    modes, forward-mode differentiation, batched gradients, the transforms of torch.func, tensor subclasses,
    DBKERNELS_BACKEND=reference, and every other device.
    """
    if not x.is_cuda or torch.compiler.is_compiling() or _modes() or _transform() is not None or _tracing():
        return False
    if not HAS_TRITON or forward_ad._current_level >= 0 or backend() == "reference":
        return False
    for tensor in (x, *others):
        if tensor is not None and (tensor.__class__ not in _PLAIN or not _has_storage(tensor)):
            return False
    return True


def kind(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """Return the key of checks and launches: dtype, shape, strides and device of a tensor, or None."""
    return None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride(), tensor.get_device())
