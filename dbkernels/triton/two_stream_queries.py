"""The gradient of the queries of one stream, in Triton, and the row sums that all gradients want. Definition:
dbkernels/two_stream_attention.py.

With the merged output and log-sum-exp, P = exp(S - lse) and delta = rowsum(dO·O) hold for every part of the keys, so
each gradient is a sum in the registers of one program: no atomics, the same bits each time.
"""

import torch
import triton
import triton.language as tl

from dbkernels.triton.two_stream_attention import (
    LOG2E,
    block_of,
    end_of_sight,
    float32_layout,
    load_rows,
    own_groups,
    place,
    precision,
    store_rows,
    strides,
    tiling,
)


@triton.jit
def delta_kernel(
    grad_ptr, out_ptr, delta_ptr, grad_batch, grad_head, grad_row, out_batch, out_head, out_row, tiles, heads, length,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """rowsum(dO·O)."""
    first = tl.program_id(0) % tiles * ROWS
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    grad = load_rows(grad_ptr + batch * grad_batch + head * grad_head, first, length, grad_row, ROWS, D, BLOCK_D)
    out = load_rows(out_ptr + batch * out_batch + head * out_head, first, length, out_row, ROWS, D, BLOCK_D)
    row = first + tl.arange(0, ROWS)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + (batch * heads + head) * length + row, delta, mask=row < length)


@triton.jit
def weights(q, k, lse, scale, seen, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """P of a tile. lse: in bits; infinite beyond the sequence, where P is then 0."""
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None])
    if MASKED:
        p = tl.where(seen, p, 0.0)
    return p


@triton.jit
def slope(grad, v, p, delta, PRECISION: tl.constexpr):
    """The gradient of the scores of a tile: P·(dP - delta)."""
    return p * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])


@triton.jit
def row_numbers(lse_ptr, delta_ptr, first, length, ROWS: tl.constexpr):
    row = first + tl.arange(0, ROWS)
    lse = tl.load(lse_ptr + row, mask=row < length, other=float("inf")) * 1.4426950408889634
    return row, lse, tl.load(delta_ptr + row, mask=row < length, other=0.0)


@triton.jit
def query_kernel(
    q_ptr, k_ptr, v_ptr, own_k_ptr, own_v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, tiles_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    own_k_batch, own_k_head, own_k_row, own_v_batch, own_v_head, own_v_row,
    grad_batch, grad_head, grad_row, dq_batch, dq_head, dq_row,
    tiles, heads, ratio, length, group_size, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    NOISY: tl.constexpr, SINGLE: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of queries: the walk of the forward pass again."""
    tile = tiles - 1 - tl.program_id(0) % tiles
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    numbers = (batch * heads + head) * length
    begin, length, first = place(tiles_ptr, tile, length, ROWS, VARLEN)
    key = head // ratio
    q_base = q_ptr + batch * q_batch + head * q_head + begin * q_row
    k_base = k_ptr + batch * k_batch + key * k_head + begin * k_row
    v_base = v_ptr + batch * v_batch + key * v_head + begin * v_row
    grad_base = grad_ptr + batch * grad_batch + head * grad_head + begin * grad_row
    stop = tl.minimum(first + ROWS, length)
    q = load_rows(q_base, first, length, q_row, ROWS, D, BLOCK_D)
    grad = load_rows(grad_base, first, length, grad_row, ROWS, D, BLOCK_D)
    row, lse, delta = row_numbers(lse_ptr + numbers + begin, delta_ptr + numbers + begin, first, length, ROWS)
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    if NOISY:
        own_k = own_k_ptr + batch * own_k_batch + key * own_k_head + begin * own_k_row
        own_v = own_v_ptr + batch * own_v_batch + key * own_v_head + begin * own_v_row
        if SINGLE:
            itself = load_rows(own_k, first, length, own_k_row, ROWS, D, BLOCK_D).to(tl.float32)
            value = load_rows(own_v, first, length, own_v_row, ROWS, D, BLOCK_D).to(tl.float32)
            weight = tl.exp2(tl.sum(q.to(tl.float32) * itself, 1) * scale - lse)
            total = (weight * (tl.sum(grad.to(tl.float32) * value, 1) - delta))[:, None] * itself
        else:
            start, end = own_groups(first, stop, length, group_size)
            for at in range(start, end, COLUMNS):
                column = at + tl.arange(0, COLUMNS)
                k = load_rows(own_k, at, length, own_k_row, COLUMNS, D, BLOCK_D)
                v = load_rows(own_v, at, length, own_v_row, COLUMNS, D, BLOCK_D)
                seen = (row // group_size)[:, None] == (column // group_size)[None, :]
                p = weights(q, k, lse, scale, seen & (column < length)[None, :], True, PRECISION)
                ds = slope(grad, v, p, delta, PRECISION)
                total = tl.dot(ds.to(k.dtype), k, total, input_precision=PRECISION)
    whole = end_of_sight(first, group_size, NOISY) // COLUMNS * COLUMNS
    for at in range(0, whole, COLUMNS):
        k = load_rows(k_base, at, length, k_row, COLUMNS, D, BLOCK_D)
        v = load_rows(v_base, at, length, v_row, COLUMNS, D, BLOCK_D)
        ds = slope(grad, v, weights(q, k, lse, scale, True, False, PRECISION), delta, PRECISION)
        total = tl.dot(ds.to(k.dtype), k, total, input_precision=PRECISION)
    for at in range(whole, end_of_sight(stop - 1, group_size, NOISY), COLUMNS):
        column = at + tl.arange(0, COLUMNS)
        k = load_rows(k_base, at, length, k_row, COLUMNS, D, BLOCK_D)
        v = load_rows(v_base, at, length, v_row, COLUMNS, D, BLOCK_D)
        seen = column[None, :] < end_of_sight(row, group_size, NOISY)[:, None]
        ds = slope(grad, v, weights(q, k, lse, scale, seen, True, PRECISION), delta, PRECISION)
        total = tl.dot(ds.to(k.dtype), k, total, input_precision=PRECISION)
    dq_base = dq_ptr + batch * dq_batch + head * dq_head + begin * dq_row
    store_rows(dq_base, total * (scale * 0.6931471805599453), first, length, dq_row, ROWS, D, BLOCK_D)


def layout(D, dtype):
    """(rows, columns, warps, stages) of a program: what fits registers without spills."""
    if dtype == torch.float32:
        return float32_layout(D)
    return (64, 64, 4, 3) if block_of(D) <= 64 else (64, 32, 4, 3) if block_of(D) == 128 else (32, 32, 4, 2)


def row_products(grad, out):
    """delta, float32 (B, H, N)."""
    B, H, N, D = grad.shape
    delta = torch.empty(B, H, N, dtype=torch.float32, device=grad.device)
    tiles = triton.cdiv(N, 64)
    delta_kernel[(B * H * tiles,)](
        grad, out, delta, *strides(grad, out), tiles, H, N, D=D, BLOCK_D=block_of(D), ROWS=64
    )  # fmt: skip
    return delta


def query_gradient(dq, grad, q, k, v, own_k, own_v, lse, delta, group_size, scale, cu_seqlens):
    """Fill dq: of the noisy stream if own_k is given."""
    B, H, N, D = q.shape
    noisy = own_k is not None
    own_k, own_v = (own_k, own_v) if noisy else (k, v)
    rows, columns, warps, stages = layout(D, q.dtype)
    tiles, places = tiling(q, cu_seqlens, rows)
    query_kernel[(B * H * tiles,)](
        q, k, v, own_k, own_v, grad, lse, delta, dq, places, *strides(q, k, v, own_k, own_v, grad, dq),
        tiles, H, H // k.shape[1], N, group_size, scale * LOG2E,
        D=D, BLOCK_D=block_of(D), ROWS=rows, COLUMNS=columns, NOISY=noisy, SINGLE=group_size == 1,
        VARLEN=cu_seqlens is not None, PRECISION=precision(q.dtype), num_warps=warps, num_stages=stages,
    )  # fmt: skip
