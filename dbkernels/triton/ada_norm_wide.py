"""The backward pass of the modulated norms for rows too wide for a program's registers: a row is read twice, the second
time from the cache, and the sums over rows are taken column by column."""

import triton
import triton.language as tl

CHUNK = 2048  # columns of a row processed together
WIDE_COLUMNS = 256  # columns per program that sums a tile


@triton.jit
def wide_backward_kernel(
    grad_ptr, grad_h_ptr, x_ptr, branch_ptr, gate_ptr, scale_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dbranch_ptr,
    grad_outer, grad_inner, grad_h_outer, grad_h_inner, x_outer, x_inner, branch_outer, branch_inner,
    gate_row, scale_row, inner, rstd_at,
    RMS: tl.constexpr, GATED: tl.constexpr, GRAD_H: tl.constexpr, SCALE: tl.constexpr, WEIGHT: tl.constexpr,
    DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Process one row per program."""
    wide: tl.constexpr = rstd_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    o = row // inner
    i = row - o * inner
    grad_ptr += o * grad_outer + i * grad_inner
    x_ptr += o * x_outer + i * x_inner
    rstd = tl.load(rstd_ptr + rstd_at + row)
    mean = rstd * 0.0
    if not RMS:
        mean = tl.load(mean_ptr + row)
    total = tl.zeros((CHUNK,), wide)
    along = tl.zeros((CHUNK,), wide)
    for turn in tl.static_range(2):
        level = tl.sum(total, axis=0) / DIM
        slope = tl.sum(along, axis=0) / DIM
        for start in range(0, DIM, CHUNK):
            column = start + tl.arange(0, CHUNK)
            within = column < DIM
            scaled = tl.load(grad_ptr + column, mask=within, other=0.0).to(wide)
            if SCALE:
                scaled *= 1.0 + tl.load(scale_ptr + o * scale_row + column, mask=within, other=0.0).to(wide)
            if WEIGHT:
                scaled *= tl.load(weight_ptr + column, mask=within, other=0.0).to(wide)
            v = tl.load(x_ptr + column, mask=within, other=0.0).to(wide)
            normal = tl.where(within, (v - mean) * rstd, 0.0)
            if turn == 0:
                total += scaled
                along += scaled * normal
            else:
                d = scaled - normal * slope
                if not RMS:
                    d = d - level
                d = d * rstd
                if GATED:
                    if GRAD_H:
                        from_h = grad_h_ptr + o * grad_h_outer + i * grad_h_inner + column
                        d += tl.load(from_h, mask=within, other=0.0).to(wide)
                    gate = tl.load(gate_ptr + o * gate_row + column, mask=within, other=0.0).to(wide)
                    to = dbranch_ptr + row * DIM + column
                    tl.store(to, (d * gate).to(dbranch_ptr.dtype.element_ty), mask=within)
                tl.store(dx_ptr + row * DIM + column, d.to(dx_ptr.dtype.element_ty), mask=within)


@triton.jit
def sums_kernel(
    grad_ptr, x_ptr, branch_ptr, dx_ptr, mean_ptr, rstd_ptr, sum_grad_ptr, sum_normal_ptr, sum_branch_ptr,
    grad_outer, grad_inner, x_outer, x_inner, branch_outer, branch_inner, inner, tiles, steps, rstd_at, sums_apart,
    RMS: tl.constexpr, SUM_GRAD: tl.constexpr, SUM_NORMAL: tl.constexpr, SUM_BRANCH: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the partial sums of BLOCK columns of a tile per program."""
    wide: tl.constexpr = rstd_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    o = program // tiles
    tile = program - o * tiles
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sum_grad = tl.zeros((BLOCK,), wide)
    sum_normal = tl.zeros((BLOCK,), wide)
    sum_branch = tl.zeros((BLOCK,), wide)
    for step in range(steps):
        i = tile * steps + step
        row = o * inner + i
        within = (column < DIM) & (i < inner)
        grad = tl.load(grad_ptr + o * grad_outer + i * grad_inner + column, mask=within, other=0.0).to(wide)
        v = tl.load(x_ptr + o * x_outer + i * x_inner + column, mask=within, other=0.0).to(wide)
        if not RMS:
            v = v - tl.load(mean_ptr + row, mask=i < inner, other=0.0)
        sum_grad += grad
        sum_normal += grad * v * tl.load(rstd_ptr + rstd_at + row, mask=i < inner, other=0.0)
        if SUM_BRANCH:
            branch = tl.load(branch_ptr + o * branch_outer + i * branch_inner + column, mask=within, other=0.0)
            d = tl.load(dx_ptr + row * DIM + column, mask=within, other=0.0).to(wide)
            sum_branch += d * branch.to(x_ptr.dtype.element_ty).to(wide)
    at = program * DIM + column
    if SUM_GRAD:
        tl.store(sum_grad_ptr + at, sum_grad.to(sum_grad_ptr.dtype.element_ty), mask=column < DIM)
    if SUM_NORMAL:
        tl.store(sum_normal_ptr + sums_apart + at, sum_normal.to(sum_normal_ptr.dtype.element_ty), mask=column < DIM)
    if SUM_BRANCH:
        total = sum_branch.to(sum_branch_ptr.dtype.element_ty)
        tl.store(sum_branch_ptr + sums_apart + sums_apart + at, total, mask=column < DIM)
