"""adamw_ema_step: global-norm clipping, AdamW and EMA over a block's whole parameter list, in one call, no
host sync.

The definition first, then the op and the public function. The kernels are csrc/cpu/adamw_ema.cpp and
csrc/cuda/adamw_ema.cu.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dbkernels._library import backend, define
from dbkernels.philox import check_address, round_stochastically, signed

CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm; so do we, to agree with it
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def global_norm(grads: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, 0-dim on their device, summed in float64, rounded to the state's
    dtype."""
    norms = torch._foreach_norm(list(grads), 2, dtype=torch.float64)
    return torch.linalg.vector_norm(torch.stack(norms)).to(_state_dtype(grads[0].dtype))


def adamw_ema_step_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: Sequence[float],
    max_norm: float | None,
    ema_decay: float | None,
    masters: Sequence[Tensor] = (),
    stochastic_rounding: bool = False,
    seed: int = 0,
    offset: int = 0,
) -> Tensor:
    """The definition: every tensor is updated in place where the norm is finite. `weight_decay`: one a tensor;
    `masters`: one a tensor, or none."""
    norm = global_norm(grads)
    dtype = norm.dtype
    keep = ~torch.isfinite(norm)
    scaled = [g.to(dtype) for g in grads]
    if max_norm is not None:
        scaled = torch._foreach_mul(scaled, torch.clamp(max_norm / (norm + CLIP_EPS), max=1.0))
    step_size = lr / (1 - beta1**step)
    root = math.sqrt(1 - beta2**step)
    moments = torch._foreach_lerp(list(exp_avgs), scaled, 1 - beta1)
    squares = torch._foreach_mul(list(exp_avg_sqs), beta2)
    torch._foreach_addcmul_(squares, scaled, scaled, 1 - beta2)
    denominators = torch._foreach_sqrt(squares)
    torch._foreach_div_(denominators, root)
    torch._foreach_add_(denominators, eps)
    source = [p.to(dtype) for p in (masters or params)]
    decayed = torch._foreach_mul(source, [1 - lr * decay for decay in weight_decay])
    torch._foreach_addcdiv_(decayed, moments, denominators, -step_size)
    _commit(masters, decayed if masters else [], keep)
    _commit(params, _rounded(decayed, seed, offset) if stochastic_rounding else decayed, keep)
    _commit(exp_avgs, moments, keep)
    _commit(exp_avg_sqs, squares, keep)
    if emas and ema_decay is not None:
        now = [p.to(dtype) for p in (masters or params)]
        _commit(emas, torch._foreach_lerp(list(emas), now, 1 - ema_decay), keep)
    return norm


def _rounded(values: Sequence[Tensor], seed: int, offset: int) -> list[Tensor]:
    """Stochastically rounded. Groups of eight elements are counted through the list; each tensor begins a new one."""
    firsts = itertools.accumulate(((v.numel() + 7) // 8 for v in values), initial=0)
    return [
        round_stochastically(v, first, seed=seed % 2**64, offset=offset)
        for v, first in zip(values, firsts, strict=False)
    ]


def _commit(targets: Sequence[Tensor], values: Sequence[Tensor], keep: Tensor) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(torch.where(keep, target, value.to(target.dtype)))


def _fake(params: list[Tensor], grads: list[Tensor], *rest: object) -> Tensor:
    return torch.empty((), dtype=_state_dtype(grads[0].dtype), device=grads[0].device)


define(
    "adamw_ema_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] emas, SymInt step, float lr, float beta1, float beta2, float eps, float[] weight_decay, "
    "float? max_norm, float? ema_decay, Tensor(e!)[] masters, bool stochastic_rounding, SymInt seed, SymInt offset) "
    "-> Tensor",
    adamw_ema_step_reference,
    _fake,
)


def _check_lists(lists: dict[str, Sequence[Tensor]]) -> None:
    params = lists["params"]
    if not len(params):
        raise ValueError("params is empty: pass the parameters that received a gradient")
    if params[0].dtype not in _FLOATS:
        raise TypeError(f"params must be floating point, got {params[0].dtype}")
    given, state, device = params[0].dtype, _state_dtype(params[0].dtype), params[0].device
    shapes = [getattr(param, "shape", None) for param in params]
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} has {len(tensors)} tensors and params {len(params)}: pass one for each")
        dtype = given if name in ("params", "grads") else state
        for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
            # One line where all is well: a block has a hundred tensors, and each step asks.
            if not (isinstance(tensor, Tensor) and tensor.dtype is dtype and tensor.shape == shape
                    and tensor.device == device):  # fmt: skip
                _complain(f"{name}[{i}]", tensor, shape, device, dtype)


def _complain(name: str, tensor: Tensor, shape: torch.Size | None, device: torch.device, dtype: torch.dtype) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}: leave out parameters without one")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}: moments, EMA and masters of halves are float32")
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, its parameter {tuple(shape or ())}: they must match")
    raise ValueError(f"{name} is on {tensor.device}, params[0] on {device}: move the list to one device")


def _check_number(name: str, value: float, low: float, high: float, bounds: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not low <= value < high:
        raise ValueError(f"{name}={value} must be in {bounds}")


def _check_numbers(
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    max_norm: float | None,
    ema_decay: float | None,
) -> None:
    if isinstance(step, bool) or not isinstance(step, (int, torch.SymInt)):
        raise TypeError(f"step must be an int, got {type(step).__name__}")
    if step < 1:
        raise ValueError(f"step={step} must be 1 or more: it is the number of this update, counted from 1")
    _check_number("lr", lr, 0.0, math.inf, "[0, inf)")
    _check_number("betas[0]", betas[0], 0.0, 1.0, "[0, 1)")
    _check_number("betas[1]", betas[1], 0.0, 1.0, "[0, 1)")
    _check_number("eps", eps, 0.0, math.inf, "[0, inf)")
    if max_norm is not None:
        _check_number("max_norm", max_norm, math.ulp(0.0), math.inf, "(0, inf); None for no clipping")
    if ema_decay is not None:
        _check_number("ema_decay", ema_decay, 0.0, 1.0 + 1e-12, "[0, 1]")


def _check_rounding(
    dtype: torch.dtype, masters: Sequence[Tensor] | None, stochastic: bool, seed: int | None, offset: int
) -> None:
    if masters is not None and stochastic:
        raise ValueError("masters and stochastic_rounding exclude each other: a master keeps what rounding would lose")
    if masters is not None and dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"masters are for float16 and bfloat16 params, got {dtype}: leave them out")
    if stochastic and dtype != torch.bfloat16:
        raise ValueError(f"stochastic_rounding is for bfloat16 params, got {dtype}: pass masters, or leave it out")
    if stochastic != (seed is not None):
        raise ValueError("seed and stochastic_rounding=True go together: pass both or neither")
    check_address(seed or 0, offset)


def _decays(weight_decay: float | Sequence[float], count: int) -> list[float]:
    if isinstance(weight_decay, (int, float)):
        _check_number("weight_decay", weight_decay, 0.0, math.inf, "[0, inf)")
        return [float(weight_decay)] * count
    decays = list(weight_decay)
    if len(decays) != count:
        raise ValueError(f"weight_decay has {len(decays)} values for {count} tensors: pass a float or one a tensor")
    for i, decay in enumerate(decays):
        _check_number(f"weight_decay[{i}]", decay, 0.0, math.inf, "[0, inf)")
    return [float(decay) for decay in decays]


def adamw_ema_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor] | None,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Sequence[float] = 0.0,
    max_norm: float | None = None,
    ema_decay: float | None = None,
    masters: Sequence[Tensor] | None = None,
    stochastic_rounding: bool = False,
    seed: int | None = None,
    offset: int = 0,
) -> Tensor:
    """One optimizer step of a block: clip by the global norm, AdamW with decoupled decay, then EMA, all in
    place.

    The norm never leaves the device: clipping uses it there, and if it isn't finite nothing is updated, which
    the returned norm says. `grads` are read, not scaled. In float32 the result is that of
    `torch.nn.utils.clip_grad_norm_`, `torch.optim.AdamW(fused=True)` and `ema.lerp_(param, 1 - ema_decay)`.

    Args:
        params: the parameters, updated in place; float16, bfloat16, float32 or float64, all of one dtype and
            device.
        grads: their gradients, same shapes and dtype.
        exp_avgs, exp_avg_sqs: first and second moments, updated in place; float32 (float64 for float64
            params).
        emas: running averages of params, updated in place, the moments' dtype; or None.
        step: number of this update, from 1 (for the bias correction).
        lr: learning rate; betas, eps: as in torch.optim.AdamW.
        weight_decay: a float, or one a tensor (0 for norms and biases; the clipping norm stays global).
        max_norm: clip the gradients' global 2-norm to this; None for no clipping.
        ema_decay: ema = ema_decay·ema + (1 - ema_decay)·param; needs emas.
        masters: float32 copies of float16 or bfloat16 params, updated in place of them; params become the masters
            rounded, and emas average the masters. An update smaller than a half type's last place isn't lost.
        stochastic_rounding: round the new bfloat16 params up or down by chance, right on average: a master's effect
            without its memory. The same bits on every device for the same (seed, offset) and list.
        seed: in [0, 2^64), needed for stochastic_rounding; offset: in [0, 2^32), for example the step.

    Returns:
        The gradients' global norm before clipping: 0-dim, the moments' dtype, on the device; NaN or inf if
        the step was skipped.

    Raises:
        TypeError: an argument's type or dtype is wrong.
        ValueError: lists differ in length, shapes or device; a number is out of range; emas without
            ema_decay; masters or stochastic_rounding with each other or with params of another dtype;
            stochastic_rounding without a seed.

    Source: Loshchilov and Hutter 2019 (AdamW); Karras et al. 2022 (EMA of the weights).
    """
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if (emas is None) != (ema_decay is None):
        raise ValueError("emas and ema_decay go together: pass both or neither")
    if emas is not None:
        lists["emas"] = emas
    if masters is not None:
        lists["masters"] = masters
    _check_lists(lists)
    _check_numbers(step, lr, betas, eps, max_norm, ema_decay)
    _check_rounding(params[0].dtype, masters, stochastic_rounding, seed, offset)
    decays = _decays(weight_decay, len(params))
    with torch.no_grad():
        return _run(
            lists,
            (step, lr, *betas, eps, decays, max_norm, ema_decay),
            (stochastic_rounding, signed(seed or 0), offset),
        )


def _run(lists: dict[str, Sequence[Tensor]], numbers: tuple[Any, ...], rounding: tuple[Any, ...]) -> Tensor:
    """Call the op on contiguous tensors; strided ones go through copies."""
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "emas", "masters")
    given = [list(lists.get(name, ())) for name in names]
    dense = [[tensor.contiguous() for tensor in tensors] for tensors in given]
    op: Any = adamw_ema_step_reference if backend() == "reference" else torch.ops.dbkernels.adamw_ema_step
    norm = op(*dense[:-1], *numbers, dense[-1], *rounding)
    mutated = [i for i, name in enumerate(names) if name != "grads"]
    for i in mutated:
        for tensor, copy in zip(given[i], dense[i], strict=True):
            if copy is not tensor:
                tensor.copy_(copy)
    if not torch.compiler.is_compiling():
        # An op that is only registered doesn't tell autograd that its arguments changed; a stale saved tensor
        # must fail.
        torch.autograd.graph.increment_version([tensor for i in mutated for tensor in dense[i]])
    return norm
