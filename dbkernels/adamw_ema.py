"""adamw_ema_step: clipping by the global norm, AdamW and EMA over a list of parameters, in one call, with no host sync.

The op and the public function. The definition is dbkernels/_adamw_ema_definition.py, the kernels are
csrc/cpu/adamw_ema.cpp, dbkernels/triton/adamw_ema.py and csrc/cuda/adamw_ema.cu.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dbkernels._adamw_ema_checks import (
    are_bfloat16,
    check_lists,
    check_norm,
    check_numbers,
    check_rounding,
    check_scalar,
    decays_of,
)
from dbkernels._adamw_ema_definition import adamw_ema_step_reference
from dbkernels._direct import direct
from dbkernels._dtypes import compute_dtype
from dbkernels._library import HAS_TRITON, backend, compiled, define, lib, register_triton
from dbkernels.philox import check_address, signed

_PLAIN = {Tensor, torch.nn.Parameter}


def _fake(params: list[Tensor], grads: list[Tensor], *rest: object) -> Tensor:
    return torch.empty((), dtype=compute_dtype(grads[0].dtype), device=grads[0].device)


_SCHEMA = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] emas, SymInt step, float lr, float beta1, float beta2, float eps, float[] weight_decay, "
    "float? max_norm, float? ema_decay, Tensor(e!)[] masters, bool stochastic_rounding, SymInt seed, SymInt offset, "
    "Tensor? norm"
)
define(f"adamw_ema_step{_SCHEMA}) -> Tensor", adamw_ema_step_reference, _fake)

# The same with numbers on the device: a tensor, where it is given, replaces the number of its name.
_NUMBERS = {"step": 5, "lr": 6, "ema_decay": 12, "seed": 15, "offset": 16}  # places among the arguments
lib.define(
    f"adamw_ema_step.capturable{_SCHEMA}, Tensor(f!)? step_tensor, Tensor? lr_tensor, Tensor? ema_decay_tensor, "
    "Tensor? seed_tensor, Tensor? offset_tensor) -> Tensor"
)


def _with_tensors(*args: Any) -> tuple[Any, ...]:
    """Return the capturable form's arguments as the definition takes them."""
    numbers = list(args[:-5])
    for place, tensor in zip(_NUMBERS.values(), args[-5:], strict=True):
        if tensor is not None:
            numbers[place] = tensor
    return tuple(numbers)


def _capturable(*args: Any) -> Tensor:
    arguments = _with_tensors(*args)
    params, step = arguments[0], arguments[5]
    if params[0].device.type != "cpu":
        return adamw_ema_step_reference(*arguments)
    result = torch.ops.dbkernels.adamw_ema_step(*_read(arguments))
    if isinstance(step, Tensor):
        step.add_(torch.isfinite(result))
    return result


def _read(arguments: Sequence[Any]) -> list[Any]:
    """Return arguments with Python's numbers for tensors, checked: on the host, reading one waits for nothing."""
    read = list(arguments)
    for place in _NUMBERS.values():
        if isinstance(read[place], Tensor):
            read[place] = read[place].item()
    number, lr, beta1, beta2, eps, _, max_norm, ema_decay = read[5:13]
    check_numbers(number, lr, (beta1, beta2), eps, max_norm, ema_decay)
    check_address(0, read[16])
    return read


lib.impl("adamw_ema_step.capturable", _capturable, "CompositeExplicitAutograd")
torch.library.register_fake("dbkernels::adamw_ema_step.capturable", _fake, lib=lib)


def _triton_kernel(*args: Any) -> Tensor:
    from dbkernels.triton.adamw_ema_list import step

    return step(*args)


# Where the CUDA library was built its kernel has both keys.
if importlib.util.find_spec("dbkernels._C_cuda") is None and HAS_TRITON:
    register_triton("adamw_ema_step", _triton_kernel)
    if backend() != "reference":
        lib.impl("adamw_ema_step.capturable", lambda *args: _triton_kernel(*_with_tensors(*args)), "CUDA")


@functools.cache
def _triton_serves() -> bool:
    """Return whether GPU tensors take the Triton kernels: where Triton is, and the CUDA library isn't."""
    return compiled("_C_cuda") is None and HAS_TRITON


def adamw_ema_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor] | None,
    *,
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Sequence[float] = 0.0,
    max_norm: float | None = None,
    norm: Tensor | None = None,
    ema_decay: float | Tensor | None = None,
    masters: Sequence[Tensor] | None = None,
    stochastic_rounding: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
) -> Tensor:
    """Take one optimizer step: clip by the global norm, AdamW with decoupled weight decay, then EMA, all in place.

    The norm never leaves the device: clipping uses it there, and a norm that isn't finite skips the update, which the
    returned norm shows. `grads` are read, not scaled. In float32 the result is that of
    `torch.nn.utils.clip_grad_norm_`, `torch.optim.AdamW(fused=True)` and `ema.lerp_(param, 1 - ema_decay)`.

    Several lists (parts of a network with an optimizer each, or parameters of several dtypes) share one norm by
    `norm=dbkernels.total_norm(all_grads)`: each call clips by it, and if it isn't finite none is updated.

    Leave parameters without a gradient, and their state, out of every list: they aren't decayed or averaged.

    `step`, `lr`, `ema_decay`, `seed` and `offset` are Python numbers, or 0-dim tensors on the params' device, with the
    same bits as a result; a step with tensors can be captured in a CUDA graph and replayed with new values in them. The
    op adds one to a `step` tensor if the update happened and leaves it if it was skipped, so it numbers the next update
    without a host read. The values of tensors on a GPU aren't checked.

    A bfloat16 second moment with beta2 = .999 would stand still if it were rounded to nearest: a step that changes it
    by a thousandth is less than half its last place. Rounded at random the stored moments are unbiased, being linear in
    what was stored before, with noise: about 3 % of a second moment of beta2 = .999, .5 % of a first one of
    beta1 = .9. Each update takes the moments as computed, in float32; their rounding reaches the next one.

    Args:
        params: the parameters, updated in place; float16, bfloat16, float32 or float64, all of one dtype and device.
        grads: their gradients, same shapes and dtype.
        exp_avgs, exp_avg_sqs: first and second moments, updated in place; float32 (float64 for float64 params), or both
            bfloat16, which are rounded up or down at random when they are stored, after the update that used them.
        emas: running averages of params, updated in place; float32 (float64 for float64 params); or None.
        step: number of this update, from 1 (for the bias correction); a tensor: int64, updated in place.
        lr: learning rate; a tensor: float64.
        betas, eps: as in torch.optim.AdamW.
        weight_decay: a float, or one per parameter (0 for norms and biases; the clipping norm stays global).
        max_norm: clip the gradients to this global 2-norm, by min(1, max_norm / (norm + 1e-6)); None for no clipping.
        norm: the norm to clip by and to skip the update by if it isn't finite, 0-dim, float32 (float64 for float64
            params), on the device; None to compute that of `grads`. Not-finite gradients under a finite norm aren't
            noticed.
        ema_decay: ema = ema_decay·ema + (1 - ema_decay)·param; needs emas; a tensor: float64.
        masters: float32 copies of float16 or bfloat16 params, updated in their place; params become the masters
            rounded, and emas average the masters. An update smaller than a half type's last place isn't lost.
        stochastic_rounding: round the new bfloat16 params up or down at random, unbiased: a master's effect without its
            memory. The same bits on every device for the same (seed, offset) and list.
        seed: in [0, 2^64), needed for stochastic_rounding or bfloat16 moments; a tensor: its 64 bits as int64.
        offset: in [0, 2^32), for example the step; a tensor: int64.

    Returns:
        The global norm before clipping (a copy of `norm` if it is given): 0-dim, in `norm`'s dtype, on the device; NaN
        or inf if the update was skipped.

    Raises:
        TypeError: an argument's type or dtype is wrong.
        ValueError: lists or `norm` differ in length, shape or device; a number is out of range; emas without
            ema_decay; masters or stochastic_rounding with each other or with params of another dtype;
            stochastic_rounding or bfloat16 moments without a seed.

    Source: Loshchilov and Hutter 2019 (AdamW); Karras et al. 2022 (EMA of the weights).
    """
    if (emas is None) != (ema_decay is None):
        raise ValueError("emas and ema_decay go together: pass both or neither")
    check_numbers(step, lr, betas, eps, max_norm, ema_decay)

    def decays() -> list[float]:
        lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
        if emas is not None:
            lists["emas"] = emas
        if masters is not None:
            lists["masters"] = masters
        check_lists(lists)
        return decays_of(weight_decay, len(params))

    lists = params, grads, exp_avgs, exp_avg_sqs, emas or (), masters or ()
    fixed = *betas, eps, max_norm
    varying = step, lr, ema_decay, 0 if seed is None else seed if isinstance(seed, Tensor) else signed(seed), offset
    plan = None
    if len(params) and isinstance(params[0], Tensor) and direct(params[0], norm) and _triton_serves():
        # An empty list isn't None: it is refused below.
        if all(x is None or len(x) == len(params) for x in (emas, masters)):
            plan = _plan(lists, weight_decay, stochastic_rounding, decays)
    if plan is None:
        each = decays()
    _check_tensors(varying, params[0].device)
    if norm is not None:
        check_norm(norm, params[0])
    moments = are_bfloat16(exp_avgs[0])
    check_rounding(params[0].dtype, masters, stochastic_rounding, moments, seed, offset)
    if plan is None:
        with torch.no_grad():
            return _run(lists, each, fixed, varying, stochastic_rounding, norm)
    result = plan.step(*varying[:2], *fixed, *varying[2:], norm)
    torch.autograd.graph.increment_version(_changed(lists, step))
    return result


def _plan(
    lists: Sequence[Sequence[Tensor]], weight_decay: float | Sequence[float], stochastic: bool, decays: Any
) -> Any:
    """Return the lists' plan if all tensors are plain and contiguous, so that kernels can be launched directly."""
    if not set(map(type, itertools.chain(*lists))) <= _PLAIN:
        return None
    from dbkernels.triton.adamw_ema_list import plan_for

    return plan_for(
        lists, weight_decay if isinstance(weight_decay, (int, float)) else tuple(weight_decay), stochastic, decays
    )


def _check_tensors(varying: tuple[Any, ...], device: torch.device) -> None:
    for name, value in zip(_NUMBERS, varying, strict=True):
        if isinstance(value, Tensor):
            check_scalar(name, value, torch.float64 if name in ("lr", "ema_decay") else torch.int64, device)


def _changed(lists: Sequence[Sequence[Tensor]], step: int | Tensor | None) -> list[Tensor]:
    params, _, *state = lists
    return [*itertools.chain(params, *state), *([step] if isinstance(step, Tensor) else [])]


def _run(
    lists: Sequence[Sequence[Tensor]], decays: list[float], fixed: tuple[Any, ...], varying: tuple[Any, ...],
    stochastic: bool, norm: Tensor | None,
) -> Tensor:  # fmt: skip
    """Call the op on contiguous tensors; strided ones go through copies."""
    dense = [[tensor.contiguous() for tensor in tensors] for tensors in lists]
    tensors = [value if isinstance(value, Tensor) else None for value in varying]
    # Not `count(None)`: a tensor that is compared with None takes some 60 us.
    captured = any(tensor is not None for tensor in tensors)
    if captured:
        stand_ins = zip(varying, (1, 0.0, 1.0, 0, 0), strict=True)
        varying = tuple(other if isinstance(value, Tensor) else value for value, other in stand_ins)
    step, lr, ema_decay, seed, offset = varying
    beta1, beta2, eps, max_norm = fixed
    arguments = (
        *dense[:5], step, lr, beta1, beta2, eps, decays, max_norm, ema_decay, dense[5], stochastic, seed, offset, norm,
    )  # fmt: skip
    if backend() == "reference":
        if captured:
            arguments = _with_tensors(*arguments, *tensors)
            if arguments[0][0].device.type == "cpu" and not torch.compiler.is_compiling():
                _read(arguments)  # for its checks
        result = adamw_ema_step_reference(*arguments)
    elif captured:
        result = torch.ops.dbkernels.adamw_ema_step.capturable(*arguments, *tensors)
    else:
        result = torch.ops.dbkernels.adamw_ema_step(*arguments)
    for i, given in enumerate(lists):
        for tensor, copy in zip(given, dense[i], strict=True):
            if copy is not tensor and i != 1:  # gradients stay
                tensor.copy_(copy)
    if not torch.compiler.is_compiling():
        # An op without an autograd kernel leaves versions as they are; backward must notice a stale saved tensor.
        torch.autograd.graph.increment_version(_changed(dense, tensors[0]))
    return result
