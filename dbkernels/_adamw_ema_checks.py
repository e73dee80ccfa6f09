"""Checks of adamw_ema_step's arguments, whose errors name the argument."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dbkernels._dtypes import FLOATS, compute_dtype
from dbkernels.philox import check_address


def are_bfloat16(first: Tensor | None) -> bool:
    """Return whether moments, by the first of them, are bfloat16: then they are rounded at random."""
    return isinstance(first, Tensor) and first.dtype == torch.bfloat16


def check_lists(lists: dict[str, Sequence[Tensor]]) -> None:
    """Raise unless the lists match params in length, shapes and device, and have the dtypes that go with params'.

    Both moments may be bfloat16, unless params are float64."""
    params = lists["params"]
    if not len(params):
        raise ValueError("params is empty: pass the parameters that received a gradient")
    if params[0].dtype not in FLOATS:
        raise TypeError(f"params must be floating point, got {params[0].dtype}")
    given, state, device = params[0].dtype, compute_dtype(params[0].dtype), params[0].device
    first = lists["exp_avgs"][0] if len(lists["exp_avgs"]) else None
    moments = torch.bfloat16 if state == torch.float32 and are_bfloat16(first) else state
    dtypes = {"params": given, "grads": given, "exp_avgs": moments, "exp_avg_sqs": moments}
    shapes = [getattr(param, "shape", None) for param in params]
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} has {len(tensors)} tensors and params {len(params)}: pass one for each")
        dtype = dtypes.get(name, state)
        for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
            # One expression if all is well: a block has a hundred tensors, checked in each step.
            if not (isinstance(tensor, Tensor) and tensor.dtype is dtype and tensor.shape == shape
                    and tensor.device == device):  # fmt: skip
                _complain(f"{name}[{i}]", tensor, shape, device, dtype)


def _complain(name: str, tensor: Tensor, shape: torch.Size | None, device: torch.device, dtype: torch.dtype) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}: leave out parameters without one")
    if tensor.dtype != dtype:
        raise TypeError(
            f"{name} must be {dtype}, got {tensor.dtype}: moments, EMA and masters of halves are float32; both "
            "moments may be bfloat16"
        )
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, its parameter {tuple(shape or ())}: they must match")
    raise ValueError(f"{name} is on {tensor.device}, params[0] on {device}: move the list to one device")


def _check_number(name: str, value: Any, low: float, high: float, bounds: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not low <= value < high:
        raise ValueError(f"{name}={value} must be in {bounds}")


def check_scalar(name: str, value: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Raise unless a number given as a tensor is 0-dim, of `dtype`, on the params' device. Its value isn't read."""
    if value.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} as a tensor, got {value.dtype}: pass {name}.to({dtype})")
    if value.dim():
        raise ValueError(f"{name} has shape {tuple(value.shape)}: as a tensor it must be 0-dim")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, params[0] on {device}: move it there")


def check_norm(norm: Any, param: Tensor) -> None:
    """Raise unless the norm is a 0-dim tensor of the dtype of the parameter's moments, on its device."""
    if not isinstance(norm, Tensor):
        raise TypeError(f"norm must be a tensor, got {type(norm).__name__}: pass the result of dbkernels.total_norm")
    check_scalar("norm", norm, compute_dtype(param.dtype), param.device)


def check_numbers(
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    max_norm: float | None,
    ema_decay: float | Tensor | None,
) -> None:
    """Raise unless all numbers are in range. Tensors aren't checked here."""
    if not isinstance(step, Tensor):
        if isinstance(step, bool) or not isinstance(step, (int, torch.SymInt)):
            raise TypeError(f"step must be an int or an int64 tensor, got {type(step).__name__}")
        if step < 1:
            raise ValueError(f"step={step} must be 1 or more: it is the number of this update, counted from 1")
    if not isinstance(lr, Tensor):
        _check_number("lr", lr, 0.0, math.inf, "[0, inf)")
    _check_number("betas[0]", betas[0], 0.0, 1.0, "[0, 1)")
    _check_number("betas[1]", betas[1], 0.0, 1.0, "[0, 1)")
    _check_number("eps", eps, 0.0, math.inf, "[0, inf)")
    if max_norm is not None:
        _check_number("max_norm", max_norm, math.ulp(0.0), math.inf, "(0, inf); None for no clipping")
    if ema_decay is not None and not isinstance(ema_decay, Tensor):
        _check_number("ema_decay", ema_decay, 0.0, 1.0 + 1e-12, "[0, 1]")


def check_rounding(
    dtype: torch.dtype,
    masters: Sequence[Tensor] | None,
    stochastic: bool,
    moments: bool,
    seed: int | Tensor | None,
    offset: int | Tensor,
) -> None:
    """Raise unless masters and stochastic rounding suit the params' dtype and each other, and a seed is given for
    stochastic rounding of params, or of moments (moments=True), alone."""
    if masters is not None and stochastic:
        raise ValueError("masters and stochastic_rounding exclude each other: a master keeps what rounding would lose")
    if masters is not None and dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"masters are for float16 and bfloat16 params, got {dtype}: leave them out")
    if stochastic and dtype != torch.bfloat16:
        raise ValueError(f"stochastic_rounding is for bfloat16 params, got {dtype}: pass masters, or leave it out")
    if (stochastic or moments) != (seed is not None):
        raise ValueError("seed and stochastic_rounding=True or bfloat16 moments go together: pass both or neither")
    check_address(0 if seed is None or isinstance(seed, Tensor) else seed, 0 if isinstance(offset, Tensor) else offset)


def decays_of(weight_decay: float | Sequence[float], count: int) -> list[float]:
    """Return a decay for each of `count` tensors. Raise unless they are that many, each zero or positive."""
    if isinstance(weight_decay, (int, float)):
        _check_number("weight_decay", weight_decay, 0.0, math.inf, "[0, inf)")
        return [float(weight_decay)] * count
    decays = list(weight_decay)
    if len(decays) != count:
        raise ValueError(f"weight_decay has {len(decays)} values for {count} tensors: pass a float or one per tensor")
    for i, decay in enumerate(decays):
        _check_number(f"weight_decay[{i}]", decay, 0.0, math.inf, "[0, inf)")
    return [float(decay) for decay in decays]
