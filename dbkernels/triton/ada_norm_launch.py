"""Launch the modulated norms' kernels, by a plan that is prepared once per kind of input.

The kernels' form of x is (O, I, D) with strides, but they read only its memory: a plan is prepared from that form and
called with the tensors as they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dbkernels._direct import kind
from dbkernels._dtypes import compute_dtype
from dbkernels.triton.ada_norm import backward_kernel, forward_kernel
from dbkernels.triton.ada_norm_sums import ACROSS, COLUMNS, ROWS, add_partial_kernel
from dbkernels.triton.ada_norm_tiles import (
    WIDEST,
    backward_programs,
    backward_tile,
    forward_programs,
    forward_tile,
    wide_programs,
)
from dbkernels.triton.ada_norm_wide import CHUNK, WIDE_COLUMNS, sums_kernel, wide_backward_kernel
from dbkernels.triton.launch import Kinds, Launch

Like = tuple[torch.Size, torch.dtype]


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:2])


class Inputs(NamedTuple):
    """The tensors of a forward pass in the kernels' form: x, branch (O, I, D), gate, shift, scale (O, 1, D), weight,
    bias (D,), a row's elements adjacent. Behind a gate, the backward pass has h for x."""

    x: Tensor
    branch: Tensor | None
    gate: Tensor | None
    shift: Tensor | None
    scale: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Wanted(NamedTuple):
    """The requested gradients: shape and dtype of each, or None. apart: elements between those of shift, scale and gate
    if one tensor holds them as plain sums, without the factors of weight and bias."""

    gate: Like | None
    shift: Like | None
    scale: Like | None
    weight: Like | None
    bias: Like | None
    apart: int = 0


class Forward:
    """The forward pass for one kind of input with at least one element.

    Args:
        inputs: an example.
        shape: of the results.
        joint: store mean and rstd in one tensor, the means first; RMS has no means.
    """

    def __init__(self, inputs: Inputs, eps: float, rms: bool, shape: torch.Size, joint: bool):
        x = inputs.x
        O, I, D = x.shape
        self.rms, self.gated, self.shape = rms, inputs.gate is not None, shape
        self.dtype, self.device, self.wide = x.dtype, x.device, compute_dtype(x.dtype)
        self.rstd_at = O * I if joint and not rms else 0
        self.numbers = O * I + self.rstd_at
        self.backwards = Kinds()
        tile = forward_tile(D, I, x.dtype)
        steps, tiles = forward_programs(O, I, tile)
        strides = _strides(x, x if inputs.branch is None else inputs.branch)
        shared = _stride(inputs.gate), _stride(inputs.shift), _stride(inputs.scale)
        self.launch = Launch(
            forward_kernel, (O * tiles,), x.get_device(), (*strides, *shared, I, tiles, steps, self.rstd_at),
            EPS=eps, RMS=rms, GATED=self.gated, SHIFT=inputs.shift is not None, SCALE=inputs.scale is not None,
            WEIGHT=inputs.weight is not None, BIAS=inputs.bias is not None, DIM=D, AHEAD=steps > 1,
            **tile.constants(),
        )  # fmt: skip

    def __call__(
        self, x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
        weight: Tensor | None, bias: Tensor | None, mean: Tensor | None = None, rstd: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Return h (out where there is no gate), out, and the statistics, in `mean` and `rstd` if they are given."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        h = torch.empty(self.shape, dtype=self.dtype, device=self.device) if self.gated else out
        if rstd is None:
            rstd = torch.empty(self.numbers, dtype=self.wide, device=self.device)
        self.launch(  # x is a placeholder for absent tensors: never read
            x, x if branch is None else branch, x if gate is None else gate, x if shift is None else shift,
            x if scale is None else scale, x if weight is None else weight, x if bias is None else bias,
            h, out, rstd if mean is None else mean, rstd,
        )  # fmt: skip
        return h, out, rstd


class Backward:
    """The backward pass for one kind of input: one launch if a program has all rows of a sample and nothing is summed
    over samples, else two.

    Args:
        grad, grad_h: examples of the upstream gradients, in the kernels' form.
        inputs: an example; behind a gate, x is h.
        rstd_at: offset of rstd in its tensor.
        shape: of the gradient of x.
        wanted: the other gradients.
    """

    def __init__(
        self, grad: Tensor, grad_h: Tensor | None, inputs: Inputs, rms: bool, rstd_at: int, shape: torch.Size,
        wanted: Wanted,
    ):  # fmt: skip
        x = inputs.x
        O, I, D = x.shape
        self.gated, self.wanted, self.shape = inputs.gate is not None, wanted, shape
        self.dtype, self.device, self.wide = x.dtype, x.device, compute_dtype(x.dtype)
        tile, registers = backward_tile(D, I, x.dtype, self.gated)
        fused = tile.lanes <= WIDEST
        steps, tiles = backward_programs(O, I, tile, registers) if fused else wide_programs(O, I)
        affine = not wanted.apart and (inputs.weight is not None or inputs.bias is not None)
        bias_counts = wanted.bias is not None or (inputs.bias is not None and wanted.scale is not None)
        sums = dict(
            SUM_GRAD=wanted.shift is not None or bias_counts,
            SUM_NORMAL=wanted.scale is not None or wanted.weight is not None,
            SUM_BRANCH=wanted.gate is not None,
        )
        self.two = any(sums.values()) and (tiles > 1 or affine)
        self.partial_shape = (3 if self.gated else 2, O * tiles, D)
        apart = O * tiles * D if self.two else wanted.apart
        flags = dict(RMS=rms, DIM=D)
        given = dict(
            GATED=self.gated,
            GRAD_H=grad_h is not None,
            SCALE=inputs.scale is not None,
            WEIGHT=inputs.weight is not None,
        )
        strides = _strides(grad, grad if grad_h is None else grad_h, x, x if inputs.branch is None else inputs.branch)
        shared, device = (_stride(inputs.gate), _stride(inputs.scale), I), x.get_device()
        self.fused, self.sums = fused, None
        if fused:
            limit = {"maxnreg": registers} if registers == 128 else {}  # twice as many programs run then
            self.main = Launch(
                backward_kernel, (O * tiles,), device, (*strides, *shared, tiles, steps, rstd_at, apart),
                **flags, **given, **sums, **tile.constants(), **limit,
            )  # fmt: skip
        else:
            self.main = Launch(
                wide_backward_kernel, (O * I,), device, (*strides, *shared, rstd_at), **flags, **given, CHUNK=CHUNK,
                num_warps=8,
            )  # fmt: skip
            self.sums = None if not any(sums.values()) else Launch(
                sums_kernel, (O * tiles, triton.cdiv(D, WIDE_COLUMNS)), device,
                (*strides[:2], *strides[4:], I, tiles, steps, rstd_at, apart), **flags, **sums, BLOCK=WIDE_COLUMNS,
                num_warps=4,
            )  # fmt: skip
        self.add = self._add(inputs, tiles, apart)

    def _add(self, inputs: Inputs, tiles: int, apart: int) -> Launch:
        wanted, (O, _, D) = self.wanted, inputs.x.shape
        over_samples = wanted.weight is not None or wanted.bias is not None
        per_sample = wanted.shift is not None or wanted.scale is not None or wanted.gate is not None
        first = triton.cdiv(D, ACROSS) if over_samples else 0
        flags = dict(
            SCALE=inputs.scale is not None, WEIGHT=inputs.weight is not None and not wanted.apart,
            BIAS=inputs.bias is not None and not wanted.apart,
            SHIFT_GRAD=wanted.shift is not None, SCALE_GRAD=wanted.scale is not None,
            GATE_GRAD=wanted.gate is not None, WEIGHT_GRAD=wanted.weight is not None,
            BIAS_GRAD=wanted.bias is not None,
        )  # fmt: skip
        return Launch(
            add_partial_kernel, (first + (O * triton.cdiv(D, COLUMNS) if per_sample else 0),), inputs.x.get_device(),
            (_stride(inputs.scale), O, tiles, apart, wanted.apart), **flags, OVER_SAMPLES=first, DIM=D, ROWS=ROWS,
            COLUMNS=COLUMNS, ACROSS=ACROSS, num_warps=4,
        )  # fmt: skip

    def __call__(
        self, grad: Tensor, grad_h: Tensor | None, x: Tensor, branch: Tensor | None, gate: Tensor | None,
        scale: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor,
        results: tuple[Tensor | None, ...] | None = None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """Return the gradients of x and branch (that of x where there is no gate), then those of gate, shift, scale,
        weight and bias, in `results` if given, None if not wanted."""
        dx = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        dbranch = torch.empty(self.shape, dtype=self.dtype, device=self.device) if self.gated else dx
        if results is None:
            results = tuple([None if like is None else self._empty(like) for like in self.wanted[:5]])
        d_gate, d_shift, d_scale, d_weight, d_bias = [dx if result is None else result for result in results]
        at_hand = (
            grad, grad if grad_h is None else grad_h, x, x if branch is None else branch, x if gate is None else gate,
            x if scale is None else scale, x if weight is None else weight, mean, rstd, dx, dbranch,
        )  # fmt: skip
        if self.two:
            partial = torch.empty(self.partial_shape, dtype=self.wide, device=self.device)
            sums = partial, partial, partial
        else:
            sums = d_shift, d_scale, d_gate
        self.main(*at_hand, *(sums if self.fused else ()))
        if self.sums is not None:
            self.sums(grad, x, at_hand[3], dx, mean, rstd, *sums)
        if self.two:
            bias = x if bias is None else bias
            self.add(sums[0], at_hand[5], at_hand[6], bias, d_shift, d_scale, d_gate, d_weight, d_bias)
        return dx, dbranch, *results

    def _empty(self, like: Like) -> Tensor:
        return torch.empty(like[0], dtype=like[1], device=self.device)


# The ops' kernels, called by the dispatcher: for torch.compile, and where tensors can't be used as they are.
_plans = Kinds()


def _rows(tensor: Tensor | None) -> Tensor | None:
    """Return the tensor with rows of adjacent elements, copied only if they aren't."""
    if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    return tensor.contiguous()


def _forward(inputs: Inputs, eps: float, rms: bool) -> tuple[Tensor, ...]:
    tensors = Inputs(*map(_rows, inputs))
    x = tensors.x
    rstd = torch.empty(x.shape[:2], dtype=compute_dtype(x.dtype), device=x.device)
    mean = torch.empty(0, dtype=rstd.dtype, device=x.device) if rms else torch.empty_like(rstd)
    if x.numel() == 0:
        return torch.empty_like(x), torch.empty_like(x), mean, rstd
    key = eps, rms, *map(kind, tensors)
    plan = _plans.get(key) or _plans.keep(key, Forward(tensors, eps, rms, x.shape, joint=False))
    return *plan(*tensors, rstd if rms else mean, rstd)[:2], mean, rstd


def _backward(grad: Tensor, grad_h: Tensor | None, inputs: Inputs, mean: Tensor, rstd: Tensor) -> tuple[Any, ...]:
    grad, grad_h, tensors = _rows(grad), _rows(grad_h), Inputs(*map(_rows, inputs))
    x, gated, rms = tensors.x, tensors.gate is not None, mean.numel() == 0 and rstd.numel() > 0
    O, _, D = x.shape
    sums = torch.empty((3 if gated else 2, O, 1, D), dtype=rstd.dtype, device=x.device)
    if x.numel() == 0:
        return torch.empty_like(x), torch.empty_like(x), sums.zero_()
    key = rms, kind(grad), kind(grad_h), *map(kind, tensors)
    plan = _plans.get(key)
    if plan is None:
        like = sums.shape, sums.dtype
        wanted = Wanted(like if gated else None, like, like, None, None, apart=O * D)
        plan = _plans.keep(key, Backward(grad, grad_h, tensors, rms, 0, x.shape, wanted))
    _, branch, gate, _, scale, weight, bias = tensors
    results = sums if gated else None, sums, sums, None, None
    dx, dbranch, *_ = plan(grad, grad_h, x, branch, gate, scale, weight, bias, rstd if rms else mean, rstd, results)
    return dx, dbranch, sums


def forward(x, shift, scale, weight, bias, eps, rms):
    """Run ada_norm. Return out, mean, rstd."""
    return _forward(Inputs(x, None, None, shift, scale, weight, bias), eps, rms)[1:]


def backward(grad, x, scale, weight, mean, rstd):
    """Run ada_norm_backward. Return dx, sums."""
    dx, _, sums = _backward(grad, None, Inputs(x, None, None, None, scale, weight, None), mean, rstd)
    return dx, sums


def gated_forward(x, branch, gate, shift, scale, weight, bias, eps, rms):
    """Run gated_residual_norm. Return h, out, mean, rstd."""
    return _forward(Inputs(x, branch, gate, shift, scale, weight, bias), eps, rms)


def gated_backward(grad, grad_h, h, branch, gate, scale, weight, mean, rstd):
    """Run gated_residual_norm_backward. Return dx, dbranch, sums."""
    return _backward(grad, grad_h, Inputs(h, branch, gate, None, scale, weight, None), mean, rstd)
