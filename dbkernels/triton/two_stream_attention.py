"""Attention of the clean and of the noisy stream, forward, in Triton. Definition: dbkernels/two_stream_attention.py.

A program takes a tile of queries of one stream and loops over its visible clean keys; a noisy one also over the keys of
its own groups. Two programs of one stream each read as many keys per query as one program of both would, with half of
the registers. Tiles of masked keys are never visited.
"""

import torch
import triton
import triton.language as tl

from dbkernels.triton.launch import Launch

LOG2E = 1.4426950408889634


@triton.jit
def place(tiles_ptr, tile, length, BLOCK: tl.constexpr, VARLEN: tl.constexpr):
    """Return the begin and length of the sequence of tile number `tile`, and the tile's first row in it."""
    begin = tl.full((), 0, tl.int64)
    first = tile * BLOCK
    if VARLEN:
        begin += tl.load(tiles_ptr + 3 * tile)
        length = tl.load(tiles_ptr + 3 * tile + 1)
        first = tl.load(tiles_ptr + 3 * tile + 2)
    return begin, length, first


@triton.jit
def load_rows(base, first, length, stride, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows from `first` on of a sequence that begins at `base`, zero from row `length` on: (ROWS, BLOCK_D)."""
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    start = base + (tl.full((), 0, tl.int64) + first) * stride
    inside = (row < length - first)[:, None]
    if D != BLOCK_D:
        inside = inside & (column < D)[None, :]
    return tl.load(start + row[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(base, values, first, length, stride, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    start = base + (tl.full((), 0, tl.int64) + first) * stride
    inside = (row < length - first)[:, None] & (column < D)[None, :]
    tl.store(start + row[:, None] * stride + column[None, :], values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def end_of_sight(row, group_size, NOISY: tl.constexpr):
    """Return the first clean key that is masked for query `row`."""
    if NOISY:
        return row // group_size * group_size
    return row + 1


@triton.jit
def own_groups(first, stop, length, group_size):
    """Return the bounds (from, to) of the keys of the groups that rows first .. stop - 1 belong to."""
    return first // group_size * group_size, tl.minimum(length, (stop - 1) // group_size * group_size + group_size)


@triton.jit
def absorb(q, k, v, m, l, total, scale, seen, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Add a tile of keys to the online softmax: m is the row's maximum in bits, l its sum, total the weighted sum."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if MASKED:
        s = tl.where(seen, s, float("-inf"))
    # Never NaN by m - m of two infinities: m starts finite, so a row without visible keys so far keeps weights of zero.
    above = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - above[:, None])
    fade = tl.exp2(m - above)
    total = tl.dot(p.to(v.dtype), v, total * fade[:, None], input_precision=PRECISION)
    return above, l * fade + tl.sum(p, 1), total


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, own_k_ptr, own_v_ptr, out_ptr, lse_ptr, tiles_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    own_k_batch, own_k_head, own_k_row, own_v_batch, own_v_head, own_v_row, out_batch, out_head, out_row,
    tiles, heads, ratio, length, group_size, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    NOISY: tl.constexpr, SINGLE: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute out and lse of a tile of queries of one head. tiles: per head. ratio: query heads per key head. scale: of
    the scores, in bits. SINGLE: groups of one token."""
    tile = tiles - 1 - tl.program_id(0) % tiles  # the longest loops first
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    head = tl.program_id(0) // tiles % heads
    total_length = length
    begin, length, first = place(tiles_ptr, tile, length, ROWS, VARLEN)
    key = head // ratio
    q_base = q_ptr + batch * q_batch + head.to(tl.int64) * q_head + begin * q_row
    k_base = k_ptr + batch * k_batch + key.to(tl.int64) * k_head + begin * k_row
    v_base = v_ptr + batch * v_batch + key.to(tl.int64) * v_head + begin * v_row
    stop = tl.minimum(first + ROWS, length)
    row = first + tl.arange(0, ROWS)
    q = load_rows(q_base, first, length, q_row, ROWS, D, BLOCK_D)
    m = tl.full((ROWS,), -1e30, tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    if NOISY:
        own_k = own_k_ptr + batch * own_k_batch + key.to(tl.int64) * own_k_head + begin * own_k_row
        own_v = own_v_ptr + batch * own_v_batch + key.to(tl.int64) * own_v_head + begin * own_v_row
        if SINGLE:
            itself = load_rows(own_k, first, length, own_k_row, ROWS, D, BLOCK_D)
            m = tl.sum(q.to(tl.float32) * itself.to(tl.float32), 1) * scale
            l = tl.full((ROWS,), 1.0, tl.float32)
            total = load_rows(own_v, first, length, own_v_row, ROWS, D, BLOCK_D).to(tl.float32)
        else:
            start, end = own_groups(first, stop, length, group_size)
            low = row // group_size * group_size
            high = tl.minimum(low + group_size, length)
            for at in range(start, end, COLUMNS):
                column = (at + tl.arange(0, COLUMNS))[None, :]
                k = load_rows(own_k, at, length, own_k_row, COLUMNS, D, BLOCK_D)
                v = load_rows(own_v, at, length, own_v_row, COLUMNS, D, BLOCK_D)
                seen = (column >= low[:, None]) & (column < high[:, None])
                m, l, total = absorb(q, k, v, m, l, total, scale, seen, True, PRECISION)
    whole = end_of_sight(first, group_size, NOISY) // COLUMNS * COLUMNS
    for at in range(0, whole, COLUMNS):
        k = load_rows(k_base, at, length, k_row, COLUMNS, D, BLOCK_D)
        v = load_rows(v_base, at, length, v_row, COLUMNS, D, BLOCK_D)
        m, l, total = absorb(q, k, v, m, l, total, scale, True, False, PRECISION)
    for at in range(whole, end_of_sight(stop - 1, group_size, NOISY), COLUMNS):
        column = at + tl.arange(0, COLUMNS)
        k = load_rows(k_base, at, length, k_row, COLUMNS, D, BLOCK_D)
        v = load_rows(v_base, at, length, v_row, COLUMNS, D, BLOCK_D)
        seen = column[None, :] < end_of_sight(row, group_size, NOISY)[:, None]
        m, l, total = absorb(q, k, v, m, l, total, scale, seen, True, PRECISION)
    out_base = out_ptr + batch * out_batch + head.to(tl.int64) * out_head + begin * out_row
    store_rows(out_base, total / l[:, None], first, length, out_row, ROWS, D, BLOCK_D)
    lse_base = lse_ptr + (batch * heads + head) * total_length + begin
    tl.store(lse_base + row, (m + tl.log2(l)) * 0.6931471805599453, mask=row < length)


def block_of(D):
    """Return the width of a tile of head dimension D: the next power of two."""
    return triton.next_power_of_2(D)


def forward_layout(D, dtype, arch):
    """Return (rows, columns, warps, stages) per program that fit registers without spills. arch: 80, 90, ..."""
    if dtype == torch.float32:
        return float32_layout(D)
    if block_of(D) == 256:
        return 64, 32, 8, 3
    return 128, 64 if arch >= 90 or block_of(D) <= 64 else 32, 8, 3


def float32_layout(D):
    """Return the layout of any of the kernels for float32. At D = 256 some 40 registers spill whatever the tile."""
    return {64: (32, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)}[max(64, block_of(D))]


def arch_of(tensor):
    """Return the GPU's compute capability as one number: 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (8, 0)
    return 10 * major + minor


def precision(dtype):
    """Return tl.dot's input precision: for float32 three products of TF32, which keep its bits; one would keep ten."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def strides(*tensors):
    """Return batch, head and row strides of (B, H, N, D) tensors, for the kernels."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def sequence_tiles(cu_seqlens, total, block):
    """Compute, on the device, a table of the tiles of sequences of any lengths, (tiles, 3) int32: the sequence's begin
    and length and the tile's first row. It has an upper bound of tiles; those left over have length 0."""
    lengths = cu_seqlens.diff()
    counts = (lengths + block - 1) // block
    ends = counts.cumsum(0)
    tile = torch.arange(total // block + len(lengths), device=cu_seqlens.device)
    sequence = torch.searchsorted(ends, tile, right=True)
    left_over = sequence >= len(lengths)
    sequence = sequence.clamp(max=len(lengths) - 1)
    first = (tile - (ends - counts)[sequence]) * block
    begin = cu_seqlens[sequence]
    length = torch.where(left_over, 0, lengths[sequence])
    return torch.stack([begin, length, torch.where(left_over, 0, first)], 1).to(torch.int32)


def count_tiles(length, sequences, block):
    """Return the tiles of `block` rows per head: with sequences, at least as many as `sequence_tiles` returns."""
    return triton.cdiv(length, block) if sequences is None else length // block + sequences


def prepare_forward(q, k, v, own_k, own_v, out, group_size, scale, sequences):
    """Return (launch, its rows per tile) that fills out and lse of one stream: the noisy one if own_k is given. Rows
    have adjacent elements, any other strides. Launch: q, k, v, own_k, own_v, out, lse, places of the tiles."""
    B, H, N, D = q.shape
    noisy = own_k is not None
    own_k, own_v = (own_k, own_v) if noisy else (k, v)
    rows, columns, warps, stages = forward_layout(D, q.dtype, arch_of(q))
    tiles = count_tiles(N, sequences, rows)
    numbers = *strides(q, k, v, own_k, own_v, out), tiles, H, H // k.shape[1], N, group_size, scale * LOG2E
    return Launch(
        forward_kernel, (B * H * tiles,), q.get_device(), numbers,
        D=D, BLOCK_D=block_of(D), ROWS=rows, COLUMNS=columns, NOISY=noisy, SINGLE=group_size == 1,
        VARLEN=sequences is not None, PRECISION=precision(q.dtype), num_warps=warps, num_stages=stages,
    ), rows  # fmt: skip
