"""Modulated LayerNorm and RMSNorm, alone or behind a gated residual, in Triton. Definitions: dbkernels/ada_norm.py,
dbkernels/gated_residual_norm.py; x is (O, I, D), the modulation of sample o is one row for its I rows.

Memory is the limit, so a row is read once, by accesses of 16 bytes, and the next rows are on their way while these are
reduced. A tile is ROWS rows in CHUNKS pieces of COLUMNS. It is loaded as (CHUNKS·ROWS, COLUMNS), piece by piece: then
every version of Triton lays warps over rows, and a row of up to 32 lanes is summed without a barrier. Pieces past DIM,
which is known when the kernel is compiled, cost nothing.
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(pointer, offset, column, mask, ROWS: tl.constexpr, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load (CHUNKS, ROWS, COLUMNS) from rows at `offset`."""
    tile = tl.load(pointer + offset[:, None] + column, mask=mask, other=0.0)
    return tile.reshape(CHUNKS, ROWS, COLUMNS)


@triton.jit
def store_tile(pointer, offset, column, mask, tile):
    """Write (CHUNKS, ROWS, COLUMNS) in the pointer's dtype."""
    flat = tile.to(pointer.dtype.element_ty).reshape(column.shape[0], column.shape[1])
    tl.store(pointer + offset[:, None] + column, flat, mask=mask)


@triton.jit
def row_sum(tile):
    """Sum each row: (1, ROWS, 1)."""
    return tl.sum(tl.sum(tile, axis=0), axis=1)[None, :, None]


@triton.jit
def row_sums(a, b):
    """Sum each row of two tiles, by one exchange between warps where a row has several."""
    a, b = tl.split(tl.sum(tl.join(tl.sum(a, axis=0), tl.sum(b, axis=0)), axis=1))
    return a[None, :, None], b[None, :, None]


@triton.jit
def forward_kernel(
    x_ptr, branch_ptr, gate_ptr, shift_ptr, scale_ptr, weight_ptr, bias_ptr, h_ptr, out_ptr, mean_ptr, rstd_ptr,
    x_outer, x_inner, branch_outer, branch_inner, gate_row, shift_row, scale_row, inner, tiles, steps, rstd_at,
    EPS: tl.constexpr, RMS: tl.constexpr, GATED: tl.constexpr, SHIFT: tl.constexpr, SCALE: tl.constexpr,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, DIM: tl.constexpr, AHEAD: tl.constexpr, ROWS: tl.constexpr,
    CHUNKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Process `steps` times ROWS rows of one sample per program. The modulation is loaded where it is used, from the L1
    cache after the first step: registers hold the next rows instead, if AHEAD. rstd begins at rstd_at."""
    wide: tl.constexpr = rstd_ptr.dtype.element_ty
    program = tl.program_id(0)
    o = program // tiles
    first = (program - o * tiles).to(tl.int64) * (steps * ROWS)
    o = o.to(tl.int64)
    n = tl.arange(0, CHUNKS * ROWS)
    column = (n // ROWS * COLUMNS)[:, None] + tl.arange(0, COLUMNS)[None, :]
    inside = column < DIM
    shared = n * 0  # the same row for all
    x_ptr += o * x_outer
    branch_ptr += o * branch_outer
    i = first + n % ROWS
    mask = (i < inner)[:, None] & inside
    next_v = load_tile(x_ptr, i * x_inner, column, mask, ROWS, CHUNKS, COLUMNS)
    next_branch = next_v
    if GATED:
        next_branch = load_tile(branch_ptr, i * branch_inner, column, mask, ROWS, CHUNKS, COLUMNS)
    for step in range(steps):
        v = next_v.to(wide)
        branch = next_branch.to(x_ptr.dtype.element_ty).to(wide)  # another dtype is cast, as in the definition
        i = first + step * ROWS + n % ROWS
        mask = (i < inner)[:, None] & inside
        if AHEAD:
            ahead = i + ROWS
            soon = ((ahead < inner) & (step + 1 < steps))[:, None] & inside
            next_v = load_tile(x_ptr, ahead * x_inner, column, soon, ROWS, CHUNKS, COLUMNS)
            if GATED:
                next_branch = load_tile(branch_ptr, ahead * branch_inner, column, soon, ROWS, CHUNKS, COLUMNS)
        to = (o * inner + i) * DIM
        row = first + step * ROWS + tl.arange(0, ROWS)
        if GATED:
            gate = load_tile(gate_ptr + o * gate_row, shared, column, inside, ROWS, CHUNKS, COLUMNS).to(wide)
            h = (v + gate * branch).to(h_ptr.dtype.element_ty)
            store_tile(h_ptr, to, column, mask, h)
            v = h.to(wide)  # as stored: the backward pass starts from it
        if not RMS:
            mean = row_sum(v) / DIM
            tl.store(mean_ptr + o * inner + row, mean.reshape(ROWS), mask=row < inner)
            v = tl.where(inside.reshape(CHUNKS, ROWS, COLUMNS), v - mean, 0.0)
        rstd = tl.rsqrt(row_sum(v * v) / DIM + EPS)
        tl.store(rstd_ptr + rstd_at + o * inner + row, rstd.reshape(ROWS), mask=row < inner)
        out = v * rstd
        if WEIGHT:
            out = out * load_tile(weight_ptr, shared, column, inside, ROWS, CHUNKS, COLUMNS).to(wide)
        if BIAS:
            out = out + load_tile(bias_ptr, shared, column, inside, ROWS, CHUNKS, COLUMNS).to(wide)
        if SCALE:
            scale = load_tile(scale_ptr + o * scale_row, shared, column, inside, ROWS, CHUNKS, COLUMNS).to(wide)
            out = out * (1.0 + scale)
        if SHIFT:
            out = out + load_tile(shift_ptr + o * shift_row, shared, column, inside, ROWS, CHUNKS, COLUMNS).to(wide)
        store_tile(out_ptr, to, column, mask, out)


@triton.jit
def load_step(
    grad_ptr, grad_h_ptr, x_ptr, branch_ptr, mean_ptr, rstd_ptr, grad_inner, grad_h_inner, x_inner, branch_inner,
    start, inner, n, column, inside,
    RMS: tl.constexpr, GATED: tl.constexpr, GRAD_H: tl.constexpr,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Load grad, x, branch, grad_h as stored, mean and rstd of ROWS rows from `start`; rows from `inner` on are 0."""
    i = start + n % ROWS
    mask = (i < inner)[:, None] & inside
    grad = load_tile(grad_ptr, i * grad_inner, column, mask, ROWS, CHUNKS, COLUMNS)
    v = load_tile(x_ptr, i * x_inner, column, mask, ROWS, CHUNKS, COLUMNS)
    branch = v
    grad_h = v
    if GATED:
        branch = load_tile(branch_ptr, i * branch_inner, column, mask, ROWS, CHUNKS, COLUMNS)
        if GRAD_H:
            grad_h = load_tile(grad_h_ptr, i * grad_h_inner, column, mask, ROWS, CHUNKS, COLUMNS)
    row = start + tl.arange(0, ROWS)
    rstd = tl.load(rstd_ptr + row, mask=row < inner, other=0.0)
    mean = rstd
    if not RMS:
        mean = tl.load(mean_ptr + row, mask=row < inner, other=0.0)
    return grad, v, branch, grad_h, mean, rstd


@triton.jit
def backward_kernel(
    grad_ptr, grad_h_ptr, x_ptr, branch_ptr, gate_ptr, scale_ptr, weight_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dbranch_ptr, sum_grad_ptr, sum_normal_ptr, sum_branch_ptr,
    grad_outer, grad_inner, grad_h_outer, grad_h_inner, x_outer, x_inner, branch_outer, branch_inner,
    gate_row, scale_row, inner, tiles, steps, rstd_at, sums_apart,
    RMS: tl.constexpr, GATED: tl.constexpr, GRAD_H: tl.constexpr, SCALE: tl.constexpr, WEIGHT: tl.constexpr,
    SUM_GRAD: tl.constexpr, SUM_NORMAL: tl.constexpr, SUM_BRANCH: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    CHUNKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Process `steps` times ROWS rows of one sample per program. Its sums over rows (of grad, of grad times the
    normalised row, of the residual's gradient times the branch) go to separate rows, sums_apart from each other."""
    wide: tl.constexpr = rstd_ptr.dtype.element_ty
    program = tl.program_id(0)
    o = program // tiles
    first = (program - o * tiles).to(tl.int64) * (steps * ROWS)
    o = o.to(tl.int64)
    n = tl.arange(0, CHUNKS * ROWS)
    column = (n // ROWS * COLUMNS)[:, None] + tl.arange(0, COLUMNS)[None, :]
    inside = column < DIM
    shared = n * 0  # the same row for all
    grad_ptr += o * grad_outer
    grad_h_ptr += o * grad_h_outer
    x_ptr += o * x_outer
    branch_ptr += o * branch_outer
    mean_ptr += o * inner
    rstd_ptr += o * inner + rstd_at
    k = tl.full((CHUNKS, ROWS, COLUMNS), 1.0, wide)
    if SCALE:
        k += load_tile(scale_ptr + o * scale_row, shared, column, inside, ROWS, CHUNKS, COLUMNS).to(wide)
    if WEIGHT:
        k *= load_tile(weight_ptr, shared, column, inside, ROWS, CHUNKS, COLUMNS).to(wide)
    gate = k
    if GATED:
        gate = load_tile(gate_ptr + o * gate_row, shared, column, inside, ROWS, CHUNKS, COLUMNS)
    sum_grad = tl.zeros((CHUNKS, ROWS, COLUMNS), wide)
    sum_normal = tl.zeros((CHUNKS, ROWS, COLUMNS), wide)
    sum_branch = tl.zeros((CHUNKS, ROWS, COLUMNS), wide)
    grad, v, branch, grad_h, mean, rstd = load_step(
        grad_ptr, grad_h_ptr, x_ptr, branch_ptr, mean_ptr, rstd_ptr, grad_inner, grad_h_inner, x_inner, branch_inner,
        first, inner, n, column, inside, RMS, GATED, GRAD_H, ROWS, CHUNKS, COLUMNS,
    )  # fmt: skip
    end = tl.minimum(first + steps * ROWS, inner)
    for step in range(steps):
        start = first + step * ROWS
        next_grad, next_v, next_branch, next_grad_h, next_mean, next_rstd = load_step(
            grad_ptr, grad_h_ptr, x_ptr, branch_ptr, mean_ptr, rstd_ptr, grad_inner, grad_h_inner, x_inner,
            branch_inner, start + ROWS, end, n, column, inside, RMS, GATED, GRAD_H, ROWS, CHUNKS, COLUMNS,
        )  # fmt: skip
        i = start + n % ROWS
        mask = (i < inner)[:, None] & inside
        to = (o * inner + i) * DIM
        g = grad.to(wide)
        normal = v.to(wide)
        if not RMS:
            normal = tl.where(inside.reshape(CHUNKS, ROWS, COLUMNS), normal - mean[None, :, None], 0.0)
        normal = normal * rstd[None, :, None]
        scaled = g * k
        if SUM_GRAD:
            sum_grad += g
        if SUM_NORMAL:
            sum_normal += g * normal
        if RMS:
            d = scaled - normal * (row_sum(scaled * normal) / DIM)
        else:
            along, level = row_sums(scaled * normal, scaled)
            d = scaled - normal * (along / DIM) - level / DIM
        d = d * rstd[None, :, None]
        if GATED:
            if GRAD_H:
                d += grad_h.to(wide)
            store_tile(dbranch_ptr, to, column, mask, d * gate.to(wide))
            if SUM_BRANCH:
                sum_branch += d * branch.to(x_ptr.dtype.element_ty).to(wide)
        store_tile(dx_ptr, to, column, mask, d)
        grad, v, branch, grad_h, mean, rstd = next_grad, next_v, next_branch, next_grad_h, next_mean, next_rstd
    across = tl.arange(0, CHUNKS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    at = program.to(tl.int64) * DIM + across
    if SUM_GRAD:
        tl.store(sum_grad_ptr + at, tl.sum(sum_grad, axis=1).to(sum_grad_ptr.dtype.element_ty), mask=across < DIM)
    if SUM_NORMAL:
        total = tl.sum(sum_normal, axis=1).to(sum_normal_ptr.dtype.element_ty)
        tl.store(sum_normal_ptr + sums_apart + at, total, mask=across < DIM)
    if SUM_BRANCH:
        total = tl.sum(sum_branch, axis=1).to(sum_branch_ptr.dtype.element_ty)
        tl.store(sum_branch_ptr + sums_apart + sums_apart + at, total, mask=across < DIM)
