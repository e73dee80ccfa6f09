"""The gradients of keys and values of both streams, in Triton. Definition: dbkernels/two_stream_attention.py.

One program a tile of keys gathers what all queries add to it. Clean keys serve the queries of both streams; noisy ones
only their own groups.
"""

import torch
import triton
import triton.language as tl

from dbkernels.triton.two_stream_attention import (
    LOG2E,
    arch_of,
    block_of,
    float32_layout,
    load_rows,
    own_groups,
    place,
    precision,
    store_rows,
    strides,
    tiling,
)
from dbkernels.triton.two_stream_queries import row_numbers


@triton.jit
def gather(
    dk, dv, k, v, q_base, grad_base, lse_ptr, delta_ptr, q_row, grad_row, start, stop, length, column, group_size,
    shift, scale, OWN: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What the queries start .. stop - 1 of one head add to the gradients of a tile of keys and values. OWN: they see
    the keys of their group; otherwise the keys before their group's first, `shift` further."""
    for at in range(start, stop, ROWS):
        q = load_rows(q_base, at, length, q_row, ROWS, D, BLOCK_D)
        grad = load_rows(grad_base, at, length, grad_row, ROWS, D, BLOCK_D)
        row, lse, delta = row_numbers(lse_ptr, delta_ptr, at, length, ROWS)
        # Keys by queries: P and its gradient leave the products in the layout that the next products take them in.
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - lse[None, :])
        if MASKED:
            if OWN:
                seen = (column // group_size)[:, None] == (row // group_size)[None, :]
            else:
                seen = column[:, None] < (row // group_size * group_size + shift)[None, :]
            p = tl.where(seen, p, 0.0)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def clean_key_kernel(
    k_ptr, v_ptr, dk_ptr, dv_ptr, q_ptr, grad_ptr, lse_ptr, delta_ptr,
    noisy_q_ptr, noisy_grad_ptr, noisy_lse_ptr, noisy_delta_ptr, tiles_ptr,
    k_batch, k_head, k_row, v_batch, v_head, v_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    q_batch, q_head, q_row, grad_batch, grad_head, grad_row,
    noisy_q_batch, noisy_q_head, noisy_q_row, noisy_grad_batch, noisy_grad_head, noisy_grad_row,
    tiles, heads, ratio, length, group_size, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STREAMS: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of clean keys and values, from the queries of both streams that see them. heads: of keys.
    STREAMS: 2, or 1 where there are no clean queries."""
    tile = tl.program_id(0) % tiles
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    key = (tl.program_id(0) // tiles % heads).to(tl.int64)
    total_length = length
    begin, length, first = place(tiles_ptr, tile, length, COLUMNS, VARLEN)
    column = first + tl.arange(0, COLUMNS)
    k = load_rows(k_ptr + batch * k_batch + key * k_head + begin * k_row, first, length, k_row, COLUMNS, D, BLOCK_D)
    v = load_rows(v_ptr + batch * v_batch + key * v_head + begin * v_row, first, length, v_row, COLUMNS, D, BLOCK_D)
    dk = tl.zeros((COLUMNS, BLOCK_D), tl.float32)
    dv = tl.zeros((COLUMNS, BLOCK_D), tl.float32)
    last = tl.minimum(first + COLUMNS, length) - 1
    for part in range(STREAMS * ratio):
        head = key * ratio + part // STREAMS
        numbers = (batch * heads * ratio + head) * total_length + begin
        # Noisy queries see the keys before their group, clean ones those before them and their own.
        q_base = noisy_q_ptr + batch * noisy_q_batch + head * noisy_q_head + begin * noisy_q_row
        grad_base = noisy_grad_ptr + batch * noisy_grad_batch + head * noisy_grad_head + begin * noisy_grad_row
        lses, deltas, q_step, grad_step = noisy_lse_ptr, noisy_delta_ptr, noisy_q_row, noisy_grad_row
        group, shift = group_size, 0
        if STREAMS == 2:
            if part % 2 == 1:
                q_base = q_ptr + batch * q_batch + head * q_head + begin * q_row
                grad_base = grad_ptr + batch * grad_batch + head * grad_head + begin * grad_row
                lses, deltas, q_step, grad_step = lse_ptr, delta_ptr, q_row, grad_row
                group, shift = 1, 1
        # The first query that sees the tile's first key, and the first that sees all of it.
        start = (first // group + 1) * group - shift
        full = tl.maximum(start, (last // group + 1) * group - shift)
        mixed = tl.minimum(length, start + (full - start + ROWS - 1) // ROWS * ROWS)
        dk, dv = gather(dk, dv, k, v, q_base, grad_base, lses + numbers, deltas + numbers, q_step, grad_step, start,
                        mixed, length, column, group, shift, scale, False, True, ROWS, D, BLOCK_D,
                        PRECISION)  # fmt: skip
        dk, dv = gather(dk, dv, k, v, q_base, grad_base, lses + numbers, deltas + numbers, q_step, grad_step, mixed,
                        length, length, column, group, shift, scale, False, False, ROWS, D, BLOCK_D,
                        PRECISION)  # fmt: skip
    store_rows(dk_ptr + batch * dk_batch + key * dk_head + begin * dk_row, dk * (scale * 0.6931471805599453), first,
               length, dk_row, COLUMNS, D, BLOCK_D)  # fmt: skip
    store_rows(dv_ptr + batch * dv_batch + key * dv_head + begin * dv_row, dv, first, length, dv_row, COLUMNS, D,
               BLOCK_D)  # fmt: skip


@triton.jit
def noisy_key_kernel(
    k_ptr, v_ptr, dk_ptr, dv_ptr, q_ptr, grad_ptr, lse_ptr, delta_ptr, tiles_ptr,
    k_batch, k_head, k_row, v_batch, v_head, v_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    q_batch, q_head, q_row, grad_batch, grad_head, grad_row,
    tiles, heads, ratio, length, group_size, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SINGLE: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of noisy keys and values, from the queries of their own groups. heads: of keys."""
    tile = tl.program_id(0) % tiles
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    key = (tl.program_id(0) // tiles % heads).to(tl.int64)
    total_length = length
    begin, length, first = place(tiles_ptr, tile, length, COLUMNS, VARLEN)
    column = first + tl.arange(0, COLUMNS)
    k = load_rows(k_ptr + batch * k_batch + key * k_head + begin * k_row, first, length, k_row, COLUMNS, D, BLOCK_D)
    v = load_rows(v_ptr + batch * v_batch + key * v_head + begin * v_row, first, length, v_row, COLUMNS, D, BLOCK_D)
    dk = tl.zeros((COLUMNS, BLOCK_D), tl.float32)
    dv = tl.zeros((COLUMNS, BLOCK_D), tl.float32)
    for member in range(ratio):
        head = key * ratio + member
        numbers = (batch * heads * ratio + head) * total_length + begin
        q_base = q_ptr + batch * q_batch + head * q_head + begin * q_row
        grad_base = grad_ptr + batch * grad_batch + head * grad_head + begin * grad_row
        if SINGLE:
            q = load_rows(q_base, first, length, q_row, COLUMNS, D, BLOCK_D).to(tl.float32)
            grad = load_rows(grad_base, first, length, grad_row, COLUMNS, D, BLOCK_D).to(tl.float32)
            _, lse, delta = row_numbers(lse_ptr + numbers, delta_ptr + numbers, first, length, COLUMNS)
            p = tl.exp2(tl.sum(q * k.to(tl.float32), 1) * scale - lse)
            dv += p[:, None] * grad
            dk += (p * (tl.sum(grad * v.to(tl.float32), 1) - delta))[:, None] * q
        else:
            start, stop = own_groups(first, tl.minimum(first + COLUMNS, length), length, group_size)
            dk, dv = gather(dk, dv, k, v, q_base, grad_base, lse_ptr + numbers, delta_ptr + numbers, q_row, grad_row,
                            start, stop, length, column, group_size, 0, scale, True, True, ROWS, D, BLOCK_D,
                            PRECISION)  # fmt: skip
    store_rows(dk_ptr + batch * dk_batch + key * dk_head + begin * dk_row, dk * (scale * 0.6931471805599453), first,
               length, dk_row, COLUMNS, D, BLOCK_D)  # fmt: skip
    store_rows(dv_ptr + batch * dv_batch + key * dv_head + begin * dv_row, dv, first, length, dv_row, COLUMNS, D,
               BLOCK_D)  # fmt: skip


def layout(D, dtype, arch):
    """(rows, columns, warps, stages) of a program: what fits registers without spills. arch: 80, 90, ..."""
    if dtype == torch.float32:
        return float32_layout(D)
    if block_of(D) <= 64:
        return 64 if arch >= 90 else 32, 128, 8, 2
    return (32, 64, 8, 2) if block_of(D) == 128 else (16, 32, 4, 1)


def own_layout(D, dtype, group_size):
    """The same for the noisy stream's own keys. A token's look at itself is no product of matrices: a small tile holds
    its six operands in registers."""
    return (16, 16, 4, 1) if group_size == 1 else layout(D, dtype, 80)


def clean_key_gradients(dk, dv, k, v, clean, noisy, group_size, scale, cu_seqlens):
    """Fill dk and dv. clean, noisy: (q, grad, lse, delta) of each stream; clean may be None."""
    B, heads, N, D = k.shape
    q = noisy[0]
    rows, columns, warps, stages = layout(D, k.dtype, arch_of(k))
    tiles, places = tiling(k, cu_seqlens, columns)
    first = noisy if clean is None else clean
    clean_key_kernel[(B * heads * tiles,)](
        k, v, dk, dv, *first, *noisy, places, *strides(k, v, dk, dv, *first[:2], *noisy[:2]),
        tiles, heads, q.shape[1] // heads, N, group_size, scale * LOG2E,
        D=D, BLOCK_D=block_of(D), ROWS=rows, COLUMNS=columns, STREAMS=1 if clean is None else 2,
        VARLEN=cu_seqlens is not None, PRECISION=precision(k.dtype), num_warps=warps, num_stages=stages,
    )  # fmt: skip


def noisy_key_gradients(dk, dv, k, v, noisy, group_size, scale, cu_seqlens):
    """Fill dk and dv of the noisy stream's own keys. noisy: (q, grad, lse, delta)."""
    B, heads, N, D = k.shape
    rows, columns, warps, stages = own_layout(D, k.dtype, group_size)
    tiles, places = tiling(k, cu_seqlens, columns)
    noisy_key_kernel[(B * heads * tiles,)](
        k, v, dk, dv, *noisy, places, *strides(k, v, dk, dv, *noisy[:2]),
        tiles, heads, noisy[0].shape[1] // heads, N, group_size, scale * LOG2E,
        D=D, BLOCK_D=block_of(D), ROWS=rows, COLUMNS=columns, SINGLE=group_size == 1,
        VARLEN=cu_seqlens is not None, PRECISION=precision(k.dtype), num_warps=warps, num_stages=stages,
    )  # fmt: skip
