"""The gradients of keys and values of both streams, in Triton. Definition: dbkernels/two_stream_attention.py.

One program per tile of keys sums the contributions of one stream's queries. Clean keys serve the queries of both
streams, in two launches: the second adds to the first's result. Noisy keys serve only their own groups.
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
    float32_layout,
    load_rows,
    own_groups,
    place,
    precision,
    store_rows,
    strides,
)
from dbkernels.triton.two_stream_queries import layout as query_layout
from dbkernels.triton.two_stream_queries import room


@triton.jit
def row_numbers(numbers, first, length, ROWS: tl.constexpr, VARLEN: tl.constexpr):
    """Load the log-sum-exp in bits, infinite beyond the sequence, and delta, of rows from `first` on.

    They are loaded as one vector of twice the rows: with fewer elements than threads, every thread would copy all that
    it needs by itself, 4 bytes at a time.
    """
    at = tl.arange(0, 2 * ROWS)
    if VARLEN:
        both = tl.load(numbers + 2 * first + at, mask=at < 2 * (length - first), other=0.0)
    else:
        both = tl.load(numbers + 2 * first + at)
    lse, delta = tl.split(tl.reshape(both, (ROWS, 2)))
    if VARLEN:
        lse = tl.where(tl.arange(0, ROWS) < length - first, lse, float("inf"))
    return lse, delta


@triton.jit
def key_kernel(
    k_ptr, v_ptr, dk_ptr, dv_ptr, q_ptr, grad_ptr, numbers_ptr, tiles_ptr,
    k_batch, k_head, k_row, v_batch, v_head, v_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    q_batch, q_head, q_row, grad_batch, grad_head, grad_row,
    tiles, heads, length, pitch, group_size, shift, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RATIO: tl.constexpr,
    OWN: tl.constexpr, ADD: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a tile of keys and values, from the queries of one stream that attend to them: those of
    the keys' own groups if OWN, otherwise those of the groups behind, `shift` rows earlier. heads: of keys. RATIO:
    query heads per key head. ADD: to the values of dk and dv."""
    tile = tl.program_id(0) % tiles  # the longest loops first
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    key = (tl.program_id(0) // tiles % heads).to(tl.int64)
    begin, length, first = place(tiles_ptr, tile, length, COLUMNS, VARLEN)
    k = load_rows(k_ptr + batch * k_batch + key * k_head + begin * k_row, first, length, k_row, COLUMNS, D, BLOCK_D)
    v = load_rows(v_ptr + batch * v_batch + key * v_head + begin * v_row, first, length, v_row, COLUMNS, D, BLOCK_D)
    dk = tl.zeros((COLUMNS, BLOCK_D), tl.float32)
    dv = tl.zeros((COLUMNS, BLOCK_D), tl.float32)
    # Visibility as bounds of the row: no division within the loop.
    column = first + tl.arange(0, COLUMNS)
    if OWN:
        start, stop = own_groups(first, tl.minimum(first + COLUMNS, length), length, group_size)
        low = column // group_size * group_size
    else:
        start, stop = (first // group_size + 1) * group_size - shift, length
        low = (column // group_size + 1) * group_size - shift
    start = start // ROWS * ROWS  # whole tiles of rows: their numbers are copied 16 bytes at a time
    for member in range(RATIO):
        head = key * RATIO + member
        q_base = q_ptr + batch * q_batch + head * q_head + begin * q_row
        grad_base = grad_ptr + batch * grad_batch + head * grad_head + begin * grad_row
        numbers = numbers_ptr + 2 * ((batch * heads * RATIO + head) * pitch + begin)
        for at in range(start, stop, ROWS):
            q = load_rows(q_base, at, length, q_row, ROWS, D, BLOCK_D)
            grad = load_rows(grad_base, at, length, grad_row, ROWS, D, BLOCK_D)
            lse, delta = row_numbers(numbers, at, length, ROWS, VARLEN)
            # Keys by queries: P and its gradient leave the products in the layout that the next products take them in.
            p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - lse[None, :])
            row = (at + tl.arange(0, ROWS))[None, :]
            seen = row >= low[:, None]
            if OWN:
                seen = seen & (row < low[:, None] + group_size)
            p = tl.where(seen, p, 0.0)
            dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
            ds = p * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    dk *= scale * 0.6931471805599453
    dk_base = dk_ptr + batch * dk_batch + key * dk_head + begin * dk_row
    if ADD:
        dk += load_rows(dk_base, first, length, dk_row, COLUMNS, D, BLOCK_D)
    store_rows(dk_base, dk, first, length, dk_row, COLUMNS, D, BLOCK_D)
    dv_base = dv_ptr + batch * dv_batch + key * dv_head + begin * dv_row
    if ADD:
        dv += load_rows(dv_base, first, length, dv_row, COLUMNS, D, BLOCK_D)
    store_rows(dv_base, dv, first, length, dv_row, COLUMNS, D, BLOCK_D)


@triton.jit
def itself_kernel(
    k_ptr, v_ptr, dk_ptr, dv_ptr, q_ptr, grad_ptr, numbers_ptr, tiles_ptr,
    k_batch, k_head, k_row, v_batch, v_head, v_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    q_batch, q_head, q_row, grad_batch, grad_head, grad_row,
    tiles, heads, length, pitch, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, RATIO: tl.constexpr,
):  # fmt: skip
    """Compute the same for groups of one: of a tile of noisy keys and values, from each token's attention to itself."""
    first = tl.program_id(0) % tiles * COLUMNS
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    key = (tl.program_id(0) // tiles % heads).to(tl.int64)
    k = load_rows(k_ptr + batch * k_batch + key * k_head, first, length, k_row, COLUMNS, D, BLOCK_D).to(tl.float32)
    v = load_rows(v_ptr + batch * v_batch + key * v_head, first, length, v_row, COLUMNS, D, BLOCK_D).to(tl.float32)
    dk = tl.zeros((COLUMNS, BLOCK_D), tl.float32)
    dv = tl.zeros((COLUMNS, BLOCK_D), tl.float32)
    row = first + tl.arange(0, COLUMNS)
    for member in range(RATIO):
        head = key * RATIO + member
        q_base, grad_base = q_ptr + batch * q_batch + head * q_head, grad_ptr + batch * grad_batch + head * grad_head
        q = load_rows(q_base, first, length, q_row, COLUMNS, D, BLOCK_D).to(tl.float32)
        grad = load_rows(grad_base, first, length, grad_row, COLUMNS, D, BLOCK_D).to(tl.float32)
        numbers = numbers_ptr + 2 * ((batch * heads * RATIO + head) * pitch + row)
        lse = tl.load(numbers, mask=row < length, other=float("inf"))
        delta = tl.load(numbers + 1, mask=row < length, other=0.0)
        p = tl.exp2(tl.sum(q * k, 1) * scale - lse)
        dv += p[:, None] * grad
        dk += (p * (tl.sum(grad * v, 1) - delta))[:, None] * q
    dk *= scale * 0.6931471805599453
    store_rows(dk_ptr + batch * dk_batch + key * dk_head, dk, first, length, dk_row, COLUMNS, D, BLOCK_D)
    store_rows(dv_ptr + batch * dv_batch + key * dv_head, dv, first, length, dv_row, COLUMNS, D, BLOCK_D)


def layout(D, dtype, arch):
    """Return (rows, columns, warps, stages) per program that fit registers without spills. Rows divide the rows of the
    queries' program, which writes the numbers. arch: 80, 90, ..."""
    if dtype == torch.float32:
        return float32_layout(D)
    if arch >= 90 and block_of(D) <= 128:
        # Two warp groups per SM, and a third stage that hides the loads behind a whole tile of products.
        return (64, 64, 4, 3) if block_of(D) <= 64 else (32, 128, 8, 3)
    if block_of(D) <= 64:
        return 32, 128, 8, 2
    return (32, 64, 8, 2) if block_of(D) == 128 else (16, 32, 4, 1)


ITSELF = 16, 4, 1  # columns, warps, stages: six operands of a small tile fit registers


def prepare_keys(k, v, dk, dv, q, grad, group_size, shift, scale, sequences, own=False, add=False):
    """Return (launch, its columns per tile) that fills dk and dv, or adds to them, from the queries of one stream.
    Launch: k, v, dk, dv, q, grad, numbers of `prepare_queries`, places of the tiles."""
    B, heads, N, D = k.shape
    ratio = q.shape[1] // heads
    if own and group_size == 1:
        return prepare_itself(k, v, dk, dv, q, grad, scale)
    rows, columns, warps, stages = layout(D, k.dtype, arch_of(k))
    assert query_layout(D, k.dtype, arch_of(k))[0] % rows == 0
    tiles = count_tiles(N, sequences, columns)
    numbers = *strides(k, v, dk, dv, q, grad), tiles, heads, N, room(N), group_size, shift, scale * LOG2E
    return Launch(
        key_kernel, (B * heads * tiles,), k.get_device(), numbers,
        D=D, BLOCK_D=block_of(D), ROWS=rows, COLUMNS=columns, RATIO=ratio, OWN=own, ADD=add,
        VARLEN=sequences is not None, PRECISION=precision(k.dtype), num_warps=warps, num_stages=stages,
    ), columns  # fmt: skip


def prepare_itself(k, v, dk, dv, q, grad, scale):
    """Return the same for groups of one and their own keys, whatever the sequences: a token attends to itself."""
    B, heads, N, D = k.shape
    columns, warps, stages = ITSELF
    tiles = triton.cdiv(N, columns)
    return Launch(
        itself_kernel, (B * heads * tiles,), k.get_device(),
        (*strides(k, v, dk, dv, q, grad), tiles, heads, N, room(N), scale * LOG2E),
        D=D, BLOCK_D=block_of(D), COLUMNS=columns, RATIO=q.shape[1] // heads, num_warps=warps, num_stages=stages,
    ), columns  # fmt: skip
