"""The gradient of the queries of one stream, in Triton, and the two numbers per row that the keys' gradients need.
Definition: dbkernels/two_stream_attention.py.

With the merged output and log-sum-exp, P = exp(S - lse) and delta = rowsum(dO·O) hold for every part of the keys, so
each gradient is a sum in the registers of one program: no atomics, the same bits each time.
"""

import torch
import triton
import triton.language as tl

from dbkernels.triton.launch import Launch
from dbkernels.triton.two_stream_attention import (
    LOG2E,
    arch_of,
    block_of,
    count_tiles,
    end_of_sight,
    float32_layout,
    load_rows,
    own_groups,
    place,
    precision,
    store_rows,
    strides,
)

PAD = 128  # rows: the numbers per head fill whole tiles of the kernels that read them


@triton.jit
def weights(q, k, lse, scale, seen, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Return P of a tile. lse: in bits; infinite beyond the sequence, where P is then 0."""
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None])
    if MASKED:
        p = tl.where(seen, p, 0.0)
    return p


@triton.jit
def slope(grad, v, p, delta, PRECISION: tl.constexpr):
    """Return the gradient of the scores of a tile: P·(dP - delta)."""
    return p * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])


@triton.jit
def query_kernel(
    q_ptr, k_ptr, v_ptr, own_k_ptr, own_v_ptr, grad_ptr, out_ptr, lse_ptr, dq_ptr, numbers_ptr, tiles_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    own_k_batch, own_k_head, own_k_row, own_v_batch, own_v_head, own_v_row,
    grad_batch, grad_head, grad_row, out_batch, out_head, out_row, dq_batch, dq_head, dq_row,
    tiles, heads, ratio, length, pitch, group_size, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    NOISY: tl.constexpr, SINGLE: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of a tile of queries, by the forward pass's loops. numbers: (B, heads, pitch, 2), each row's
    log-sum-exp in bits and delta side by side, so that the keys' kernels copy both of a tile at once."""
    tile = tiles - 1 - tl.program_id(0) % tiles
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    lse_base = lse_ptr + (batch * heads + head) * length
    begin, length, first = place(tiles_ptr, tile, length, ROWS, VARLEN)
    key = head // ratio
    q_base = q_ptr + batch * q_batch + head * q_head + begin * q_row
    k_base = k_ptr + batch * k_batch + key * k_head + begin * k_row
    v_base = v_ptr + batch * v_batch + key * v_head + begin * v_row
    grad_base = grad_ptr + batch * grad_batch + head * grad_head + begin * grad_row
    out_base = out_ptr + batch * out_batch + head * out_head + begin * out_row
    stop = tl.minimum(first + ROWS, length)
    row = first + tl.arange(0, ROWS)
    grad = load_rows(grad_base, first, length, grad_row, ROWS, D, BLOCK_D)
    out = load_rows(out_base, first, length, out_row, ROWS, D, BLOCK_D)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    lse = tl.load(lse_base + begin + row, mask=row < length, other=float("inf")) * 1.4426950408889634
    numbers = numbers_ptr + 2 * ((batch * heads + head) * pitch + begin + row)
    if VARLEN:  # sequences lie next to each other: the last tile of one mustn't write into the next
        tl.store(numbers, lse, mask=row < length)
        tl.store(numbers + 1, delta, mask=row < length)
    else:
        tl.store(numbers, lse)
        tl.store(numbers + 1, delta)
    q = load_rows(q_base, first, length, q_row, ROWS, D, BLOCK_D)
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
            low = row // group_size * group_size
            high = tl.minimum(low + group_size, length)
            for at in range(start, end, COLUMNS):
                column = (at + tl.arange(0, COLUMNS))[None, :]
                k = load_rows(own_k, at, length, own_k_row, COLUMNS, D, BLOCK_D)
                v = load_rows(own_v, at, length, own_v_row, COLUMNS, D, BLOCK_D)
                seen = (column >= low[:, None]) & (column < high[:, None])
                ds = slope(grad, v, weights(q, k, lse, scale, seen, True, PRECISION), delta, PRECISION)
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


def layout(D, dtype, arch):
    """Return (rows, columns, warps, stages) per program that fit registers without spills. arch: 80, 90, ..."""
    if dtype == torch.float32:
        return float32_layout(D)
    return (64, 64, 4, 3) if block_of(D) <= 64 else (64, 32, 4, 3) if block_of(D) == 128 else (32, 32, 4, 2)


def room(length):
    """Return the rows of `numbers` for sequences of `length`."""
    return -(-length // PAD) * PAD


def prepare_queries(q, k, v, own_k, own_v, grad, out, dq, group_size, scale, sequences):
    """Return (launch, its rows per tile) that fills dq, of the noisy stream if own_k is given, and numbers. Launch: q,
    k, v, own_k, own_v, grad, out, lse, dq, numbers (B, H, room(N), 2) float32, places of the tiles."""
    B, H, N, D = q.shape
    noisy = own_k is not None
    own_k, own_v = (own_k, own_v) if noisy else (k, v)
    rows, columns, warps, stages = layout(D, q.dtype, arch_of(q))
    tiles = count_tiles(N, sequences, rows)
    given = strides(q, k, v, own_k, own_v, grad, out, dq)
    numbers = *given, tiles, H, H // k.shape[1], N, room(N), group_size, scale * LOG2E
    return Launch(
        query_kernel, (B * H * tiles,), q.get_device(), numbers,
        D=D, BLOCK_D=block_of(D), ROWS=rows, COLUMNS=columns, NOISY=noisy, SINGLE=group_size == 1,
        VARLEN=sequences is not None, PRECISION=precision(q.dtype), num_warps=warps, num_stages=stages,
    ), rows  # fmt: skip
