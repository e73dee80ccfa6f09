"""Add the partial sums of the modulated norms' backward pass, in their order, and write the resulting gradients."""

import triton
import triton.language as tl

ACROSS = 32  # columns per program that adds the sums of all samples
COLUMNS = 256  # columns per program that adds those of one
ROWS = 32  # partial sums added at a time by the former, a quarter by the latter


@triton.jit
def _over_samples(
    partial_ptr, scale_ptr, weight_grad_ptr, bias_grad_ptr, first, scale_row, samples, tiles, partial_apart,
    SCALE: tl.constexpr, WEIGHT_GRAD: tl.constexpr, BIAS_GRAD: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of weight and bias from column `first` on: sums weighted by their sample's 1 + scale."""
    wide: tl.constexpr = partial_ptr.dtype.element_ty
    column = first + tl.arange(0, COLUMNS)
    grad = tl.zeros((ROWS, COLUMNS), wide)
    normal = tl.zeros((ROWS, COLUMNS), wide)
    for start in range(0, samples * tiles, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < samples * tiles)[:, None] & (column < DIM)[None, :]
        at = (row.to(tl.int64) * DIM)[:, None] + column[None, :]
        factor = tl.full((ROWS, COLUMNS), 1.0, wide)
        if SCALE:
            from_scale = ((row // tiles).to(tl.int64) * scale_row)[:, None] + column[None, :]
            factor += tl.load(scale_ptr + from_scale, mask=mask, other=0.0).to(wide)
        if BIAS_GRAD:
            grad += tl.load(partial_ptr + at, mask=mask, other=0.0) * factor
        if WEIGHT_GRAD:
            normal += tl.load(partial_ptr + partial_apart + at, mask=mask, other=0.0) * factor
    if BIAS_GRAD:
        tl.store(bias_grad_ptr + column, tl.sum(grad, axis=0).to(bias_grad_ptr.dtype.element_ty), mask=column < DIM)
    if WEIGHT_GRAD:
        total = tl.sum(normal, axis=0).to(weight_grad_ptr.dtype.element_ty)
        tl.store(weight_grad_ptr + column, total, mask=column < DIM)


@triton.jit
def _sum_rows(pointer, first, count, column, DIM: tl.constexpr, ROWS: tl.constexpr):
    """Sum rows `first` to `first + count` of (·, DIM) at `column`: (COLUMNS,)."""
    total = tl.zeros((ROWS, column.shape[0]), pointer.dtype.element_ty)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & (column < DIM)[None, :]
        total += tl.load(pointer + ((first + row) * DIM)[:, None] + column[None, :], mask=mask, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _of_sample(
    partial_ptr, weight_ptr, bias_ptr, shift_grad_ptr, scale_grad_ptr, gate_grad_ptr, sample, first, tiles,
    partial_apart, sums_apart,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, SHIFT_GRAD: tl.constexpr, SCALE_GRAD: tl.constexpr,
    GATE_GRAD: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a sample's shift, scale and gate from column `first` on."""
    wide: tl.constexpr = partial_ptr.dtype.element_ty
    column = first + tl.arange(0, COLUMNS)
    mask = column < DIM
    to = sample * DIM + column
    if SHIFT_GRAD or (SCALE_GRAD and BIAS):
        grad = _sum_rows(partial_ptr, sample * tiles, tiles, column, DIM, ROWS)
        if SHIFT_GRAD:
            tl.store(shift_grad_ptr + to, grad.to(shift_grad_ptr.dtype.element_ty), mask=mask)
    if SCALE_GRAD:
        normal = _sum_rows(partial_ptr + partial_apart, sample * tiles, tiles, column, DIM, ROWS)
        if WEIGHT:
            normal = normal * tl.load(weight_ptr + column, mask=mask, other=0.0).to(wide)
        if BIAS:
            normal = normal + grad * tl.load(bias_ptr + column, mask=mask, other=0.0).to(wide)
        tl.store(scale_grad_ptr + sums_apart + to, normal.to(scale_grad_ptr.dtype.element_ty), mask=mask)
    if GATE_GRAD:
        branch = _sum_rows(partial_ptr + partial_apart + partial_apart, sample * tiles, tiles, column, DIM, ROWS)
        tl.store(gate_grad_ptr + sums_apart + sums_apart + to, branch.to(gate_grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_partial_kernel(
    partial_ptr, scale_ptr, weight_ptr, bias_ptr, shift_grad_ptr, scale_grad_ptr, gate_grad_ptr, weight_grad_ptr,
    bias_grad_ptr,
    scale_row, samples, tiles, partial_apart, sums_apart,
    SCALE: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, SHIFT_GRAD: tl.constexpr, SCALE_GRAD: tl.constexpr,
    GATE_GRAD: tl.constexpr, WEIGHT_GRAD: tl.constexpr, BIAS_GRAD: tl.constexpr, OVER_SAMPLES: tl.constexpr,
    DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Add the partial sums (2 or 3, samples·tiles, DIM): of grad, of grad times the normalised row, of the residual's
    gradient times the branch, each partial_apart long. The first OVER_SAMPLES programs write the gradients of weight
    and bias, the others those of shift, scale and gate, sums_apart from each other if one tensor holds them."""
    program = tl.program_id(0)
    if program < OVER_SAMPLES:
        _over_samples(
            partial_ptr, scale_ptr, weight_grad_ptr, bias_grad_ptr, program * ACROSS, scale_row, samples, tiles,
            partial_apart, SCALE, WEIGHT_GRAD, BIAS_GRAD, DIM, ROWS, ACROSS,
        )  # fmt: skip
    else:
        blocks: tl.constexpr = (DIM + COLUMNS - 1) // COLUMNS
        sample = (program - OVER_SAMPLES) // blocks
        first = (program - OVER_SAMPLES - sample * blocks) * COLUMNS
        _of_sample(
            partial_ptr, weight_ptr, bias_ptr, shift_grad_ptr, scale_grad_ptr, gate_grad_ptr, sample.to(tl.int64),
            first, tiles, partial_apart, sums_apart, WEIGHT, BIAS, SHIFT_GRAD, SCALE_GRAD, GATE_GRAD, DIM, ROWS // 4,
            COLUMNS,
        )  # fmt: skip
