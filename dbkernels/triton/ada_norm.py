"""Modulated LayerNorm and RMSNorm, alone or behind a gated residual, in Triton. Definitions: dbkernels/ada_norm.py,
dbkernels/gated_residual_norm.py; x is (O, I, D), the modulation of sample o is a row that its I rows share.

What limits them is memory, so a row is read once: a program holds whole rows. The sums over rows behind the gradients
of shift, scale, gate, weight and bias are partial sums of tiles of rows, added in their order: no atomics, the same
bits every time.
"""

import torch
import triton
import triton.language as tl

from dbkernels.triton.ada_norm_wide import launch_wide

FUSED = 4096  # up to this padded width a program's registers hold the running sums beside a row


@triton.jit
def _vector(pointer, row_stride, o, column, within, wide: tl.constexpr):
    """The shared row of each row's sample: (ROWS, BLOCK)."""
    return tl.load(pointer + (o * row_stride)[:, None] + column[None, :], mask=within, other=0.0).to(wide)


@triton.jit
def forward_kernel(
    x_ptr, branch_ptr, gate_ptr, shift_ptr, scale_ptr, weight_ptr, bias_ptr, h_ptr, out_ptr, mean_ptr, rstd_ptr,
    x_outer, x_inner, branch_outer, branch_inner, gate_row, shift_row, scale_row, rows, inner, dim, eps,
    RMS: tl.constexpr, GATED: tl.constexpr, SHIFT: tl.constexpr, SCALE: tl.constexpr, WEIGHT: tl.constexpr,
    BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows."""
    wide: tl.constexpr = rstd_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    within = (row < rows)[:, None] & (column < dim)[None, :]
    o = row // inner
    i = row - o * inner
    v = tl.load(x_ptr + (o * x_outer + i * x_inner)[:, None] + column[None, :], mask=within, other=0.0).to(wide)
    at = (row * dim)[:, None] + column[None, :]
    if GATED:
        from_branch = (o * branch_outer + i * branch_inner)[:, None] + column[None, :]
        branch = tl.load(branch_ptr + from_branch, mask=within, other=0.0).to(wide)
        h = (v + _vector(gate_ptr, gate_row, o, column, within, wide) * branch).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + at, h, mask=within)
        v = h.to(wide)  # as stored: the backward pass starts from it
    if not RMS:
        mean = tl.sum(v, axis=1) / dim
        tl.store(mean_ptr + row, mean, mask=row < rows)
        v = tl.where(within, v - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(v * v, axis=1) / dim + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    out = v * rstd[:, None]
    if WEIGHT:
        out = out * tl.load(weight_ptr + column, mask=column < dim, other=0.0).to(wide)[None, :]
    if BIAS:
        out = out + tl.load(bias_ptr + column, mask=column < dim, other=0.0).to(wide)[None, :]
    if SCALE:
        out = out * (1.0 + _vector(scale_ptr, scale_row, o, column, within, wide))
    if SHIFT:
        out = out + _vector(shift_ptr, shift_row, o, column, within, wide)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=within)


@triton.jit
def backward_kernel(
    grad_ptr, grad_h_ptr, x_ptr, branch_ptr, gate_ptr, scale_ptr, weight_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dbranch_ptr, partial_ptr,
    grad_outer, grad_inner, grad_h_outer, grad_h_inner, x_outer, x_inner, branch_outer, branch_inner,
    gate_row, scale_row, samples, inner, tiles, dim,
    RMS: tl.constexpr, GATED: tl.constexpr, GRAD_H: tl.constexpr, SCALE: tl.constexpr, WEIGHT: tl.constexpr,
    STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a tile of STEPS times ROWS rows of one sample, whose partial sums it writes."""
    wide: tl.constexpr = rstd_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    o = program // tiles
    tile = program - o * tiles
    column = tl.arange(0, BLOCK)
    k = tl.full((BLOCK,), 1.0, wide)
    if SCALE:
        k += tl.load(scale_ptr + o * scale_row + column, mask=column < dim, other=0.0).to(wide)
    if WEIGHT:
        k *= tl.load(weight_ptr + column, mask=column < dim, other=0.0).to(wide)
    sum_grad = tl.zeros((ROWS, BLOCK), wide)
    sum_normal = tl.zeros((ROWS, BLOCK), wide)
    sum_branch = tl.zeros((ROWS, BLOCK), wide)
    for step in range(STEPS):
        i = (tile * STEPS + step) * ROWS + tl.arange(0, ROWS)
        row = o * inner + i
        within = (i < inner)[:, None] & (column < dim)[None, :]
        grad = tl.load(grad_ptr + (o * grad_outer + i * grad_inner)[:, None] + column[None, :], mask=within, other=0.0)
        grad = grad.to(wide)
        v = tl.load(x_ptr + (o * x_outer + i * x_inner)[:, None] + column[None, :], mask=within, other=0.0).to(wide)
        rstd = tl.load(rstd_ptr + row, mask=i < inner, other=0.0)
        if not RMS:
            v = v - tl.load(mean_ptr + row, mask=i < inner, other=0.0)[:, None]
        normal = tl.where(within, v * rstd[:, None], 0.0)
        scaled = grad * k[None, :]
        sum_grad += grad
        sum_normal += grad * normal
        d = scaled - normal * (tl.sum(scaled * normal, axis=1) / dim)[:, None]
        if not RMS:
            d = d - (tl.sum(scaled, axis=1) / dim)[:, None]
        d = d * rstd[:, None]
        at = (row * dim)[:, None] + column[None, :]
        if GATED:
            if GRAD_H:
                from_h = (o * grad_h_outer + i * grad_h_inner)[:, None] + column[None, :]
                d += tl.load(grad_h_ptr + from_h, mask=within, other=0.0).to(wide)
            gate = tl.load(gate_ptr + o * gate_row + column, mask=column < dim, other=0.0).to(wide)
            tl.store(dbranch_ptr + at, (d * gate[None, :]).to(dbranch_ptr.dtype.element_ty), mask=within)
            from_branch = (o * branch_outer + i * branch_inner)[:, None] + column[None, :]
            sum_branch += d * tl.load(branch_ptr + from_branch, mask=within, other=0.0).to(wide)
        tl.store(dx_ptr + at, d.to(dx_ptr.dtype.element_ty), mask=within)
    kind = samples * tiles * dim
    to = partial_ptr + program * dim + column
    tl.store(to, tl.sum(sum_grad, axis=0), mask=column < dim)
    tl.store(to + kind, tl.sum(sum_normal, axis=0), mask=column < dim)
    if GATED:
        tl.store(to + 2 * kind, tl.sum(sum_branch, axis=0), mask=column < dim)


def layout(dim, inner, each):
    """(ROWS, BLOCK, warps): rows of a program, their padded width, and threads for some `each` elements."""
    block = triton.next_power_of_2(dim)
    rows = min(triton.next_power_of_2(inner), max(1, 1024 // block))
    return rows, block, min(32, max(4, rows * block // (32 * each)))


def tiling(samples, inner, rows):
    """(STEPS, tiles): how many times ROWS rows a tile has, and tiles a sample. Some 1024 programs if there is the work;
    by the shape alone, so that sums don't depend on the device."""
    steps = 1
    while steps < 32 and steps * rows < inner and samples * triton.cdiv(inner, 2 * steps * rows) >= 1024:
        steps *= 2
    return steps, triton.cdiv(inner, steps * rows)


def _rows(tensor):
    """A tensor whose rows have adjacent elements, without a copy where they have."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _stride(tensor):
    return 0 if tensor is None else tensor.stride(0)


def _launch_forward(x, branch, gate, shift, scale, weight, bias, eps, rms):
    x, gate, shift, scale, weight, bias = (t if t is None else _rows(t) for t in (x, gate, shift, scale, weight, bias))
    branch = x if branch is None else _rows(branch)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    O, I, D = x.shape
    out = torch.empty((O, I, D), dtype=x.dtype, device=x.device)
    h = out if gate is None else torch.empty_like(out)
    rstd = torch.empty((O, I), dtype=wide, device=x.device)
    mean = torch.empty(0 if rms else (O, I), dtype=wide, device=x.device)
    if out.numel() == 0:
        return h, out, mean, rstd
    rows, block, warps = layout(D, I, 8)
    some = x  # stands for what isn't there: never read
    forward_kernel[(triton.cdiv(O * I, rows),)](
        x, branch, *(some if t is None else t for t in (gate, shift, scale, weight, bias)), h, out, mean, rstd,
        *x.stride()[:2], *branch.stride()[:2], _stride(gate), _stride(shift), _stride(scale), O * I, I, D, eps,
        RMS=rms, GATED=gate is not None, SHIFT=shift is not None, SCALE=scale is not None, WEIGHT=weight is not None,
        BIAS=bias is not None, ROWS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return h, out, mean, rstd


def _launch_backward(grad, grad_h, x, branch, gate, scale, weight, mean, rstd):
    grad, x, gate, scale, weight = (t if t is None else _rows(t) for t in (grad, x, gate, scale, weight))
    grad_h, branch = grad if grad_h is None else _rows(grad_h), x if branch is None else _rows(branch)
    has_h, gated, rms = grad_h is not grad, gate is not None, mean.numel() == 0
    O, I, D = x.shape
    dx = torch.empty((O, I, D), dtype=x.dtype, device=x.device)
    dbranch = torch.empty_like(dx) if gated else dx
    rows, block, warps = layout(D, I, 4)
    steps, tiles = tiling(O, I, rows)
    partial = torch.empty((3 if gated else 2, O, max(1, tiles), D), dtype=rstd.dtype, device=x.device)
    if dx.numel() == 0:
        return dx, dbranch, partial.zero_().sum(2, keepdim=True)
    tensors = grad, grad_h, x, branch, *(x if t is None else t for t in (gate, scale, weight)), mean, rstd, dx, dbranch
    strides = *grad.stride()[:2], *grad_h.stride()[:2], *x.stride()[:2], *branch.stride()[:2]
    shared = dict(RMS=rms, GATED=gated, GRAD_H=has_h, SCALE=scale is not None, WEIGHT=weight is not None)
    if block <= FUSED:
        backward_kernel[(O * tiles,)](
            *tensors, partial, *strides, _stride(gate), _stride(scale), O, I, tiles, D,
            **shared, STEPS=steps, ROWS=rows, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    else:
        launch_wide(tensors, partial, strides, (_stride(gate), _stride(scale)), (O, I, tiles, D), shared, steps)
    return dx, dbranch, partial if tiles == 1 else partial.sum(2, keepdim=True)


def forward(x, shift, scale, weight, bias, eps, rms):
    """ada_norm: -> out, mean, rstd."""
    return _launch_forward(x, None, None, shift, scale, weight, bias, eps, rms)[1:]


def backward(grad, x, scale, weight, mean, rstd):
    """ada_norm_backward: -> dx, sums."""
    dx, _, sums = _launch_backward(grad, None, x, None, None, scale, weight, mean, rstd)
    return dx, sums


def gated_forward(x, branch, gate, shift, scale, weight, bias, eps, rms):
    """gated_residual_norm: -> h, out, mean, rstd."""
    return _launch_forward(x, branch, gate, shift, scale, weight, bias, eps, rms)


def gated_backward(grad, grad_h, h, branch, gate, scale, weight, mean, rstd):
    """gated_residual_norm_backward: -> dx, dbranch, sums."""
    return _launch_backward(grad, grad_h, h, branch, gate, scale, weight, mean, rstd)
