"""When an op may call its kernel itself, past PyTorch's dispatcher, which takes longer than a small kernel runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dbkernels._library import backend

_PLAIN = (Tensor, torch.nn.Parameter)
_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack


def direct(x: Tensor, *others: Tensor | None) -> bool:
    """Return whether all are plain tensors, x on a GPU, and nothing traces, transforms or watches the call.

    Otherwise the op must go through the dispatcher: for torch.compile, fake tensors and other dispatch modes, the
    transforms of torch.func, tensor subclasses, DBKERNELS_BACKEND=reference, and every other device.
    """
    if not x.is_cuda or torch.compiler.is_compiling() or _modes() or _transform() is not None:
        return False
    for tensor in (x, *others):
        if tensor is not None and tensor.__class__ not in _PLAIN:
            return False
    return backend() != "reference"


def kind(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """Return what checks and launches depend on: dtype, shape, strides and device of a tensor, or None."""
    return None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride(), tensor.get_device())
