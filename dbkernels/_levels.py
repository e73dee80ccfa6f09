"""Shared by the ops that take a noise level: checks, and sigma's form for the kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

from dbkernels._library import backend

_transform = torch._C._functorch.peek_interpreter_stack


def broadcast(sigma: Tensor, dims: int) -> Tensor:
    """Append size-1 dimensions to sigma, (), (B,) or (B, N), to broadcast over `dims` dimensions."""
    return sigma.reshape(sigma.shape + (1,) * (dims - sigma.dim()))


def as_defined() -> bool:
    """Return whether an op is to run its definition: with DBKERNELS_BACKEND=reference, or within a transform of
    torch.func or forward-mode differentiation, which support PyTorch's own operations only."""
    if torch.compiler.is_compiling():
        return False
    return backend() == "reference" or _transform() is not None or forward_ad._current_level >= 0


def readable(tensor: Tensor) -> bool:
    """Return whether a check may read values: not on a GPU, which it would synchronise, not of an empty tensor, and not
    within a compiler or a transform of torch.func."""
    hidden = torch.compiler.is_compiling() or isinstance(tensor, FakeTensor) or _transform() is not None
    return tensor.device.type == "cpu" and tensor.numel() > 0 and not hidden


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is a tensor of 16, 32 or 64-bit floats."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}: cast it first")


def check_sigma_data(sigma_data: float) -> None:
    """Raise unless the target's std is a positive number."""
    if isinstance(sigma_data, bool) or not isinstance(sigma_data, (int, float)):
        raise TypeError(f"sigma_data must be a float, got {type(sigma_data).__name__}")
    if not 0.0 < sigma_data < math.inf:
        raise ValueError(f"sigma_data={sigma_data} must be positive and finite: it is the target's std")


def check_sigma(sigma: float | Tensor, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return sigma as a tensor (), (B,) or (B, N) in `dtype`, on the device of `x`, which messages call `name`."""
    if isinstance(sigma, Tensor):
        return _check_tensor(sigma, name, x).to(dtype)
    check_level(sigma)
    return torch.full((), sigma, dtype=dtype, device=x.device)


def check_level(sigma: float) -> None:
    """Raise unless `sigma` is a valid standard deviation."""
    if isinstance(sigma, bool) or not isinstance(sigma, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"sigma must be a float or a tensor, got {type(sigma).__name__}")
    if not 0.0 <= sigma < math.inf:
        raise ValueError(f"sigma={sigma} must be finite and not negative: it is a standard deviation")


def _check_tensor(sigma: Tensor, name: str, x: Tensor) -> Tensor:
    if not sigma.is_floating_point():
        raise TypeError(f"sigma must be floating point, got {sigma.dtype}: cast it with .float()")
    if sigma.device != x.device:
        raise ValueError(f"sigma is on {sigma.device} and {name} on {x.device}: move sigma to {name}'s device first")
    if sigma.dim() <= min(2, x.dim()) and sigma.shape == x.shape[: sigma.dim()]:
        return sigma
    if sigma.numel() == 1:
        return sigma.reshape(())
    shape = sigma.shape
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) <= min(2, x.dim()) and shape == x.shape[: len(shape)]:
        return sigma.reshape(shape)
    raise ValueError(
        f"sigma has shape {tuple(sigma.shape)}, which fits {name} of shape {tuple(x.shape)} neither as a scalar "
        f"nor per sample {tuple(x.shape[:1])} nor per token {tuple(x.shape[:2])}: give it one of these shapes"
    )
