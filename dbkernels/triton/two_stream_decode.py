"""One group of noisy queries against a cache of clean keys, in Triton. Definition: dbkernels/two_stream_decode.py.

Query heads that share a key head form one tile of queries, so each cached key is read once. The cache is split over
programs, each with its own softmax; their outputs are merged by log-sum-exp.
"""

import torch
import triton
import triton.language as tl

from dbkernels._two_stream import kind_of
from dbkernels.triton.launch import Kinds, Launch
from dbkernels.triton.two_stream import with_rows
from dbkernels.triton.two_stream_attention import LOG2E, absorb, block_of, load_rows, precision, store_rows, strides

PROGRAMS = 256  # to fill a GPU with
LEAST = 256  # keys per split


@triton.jit
def decode_kernel(
    q_ptr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, lengths_ptr, out_ptr, lse_ptr,
    k_batch, k_head, k_row, v_batch, v_head, v_row,
    k_cache_batch, k_cache_head, k_cache_row, v_cache_batch, v_cache_head, v_cache_row,
    heads, rows, group, length, splits, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LENGTHS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend from a tile of the queries of one key head to one split of the cache; the first split also takes the
    group's own keys. q: (B, heads, rows, D); out: (B, heads, splits, rows, D), float32; lse: the same without D."""
    split = tl.program_id(0) % splits
    batch = (tl.program_id(0) // splits // heads).to(tl.int64)
    key = (tl.program_id(0) // splits % heads).to(tl.int64)
    first = tl.program_id(1) * ROWS
    if LENGTHS:
        length = tl.minimum(length, tl.load(lengths_ptr + batch)).to(tl.int32)
    q = load_rows(q_ptr + (batch * heads + key) * rows * D, first, rows, D, ROWS, D, BLOCK_D)
    m = tl.full((ROWS,), -1e30, tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    column = tl.arange(0, COLUMNS)
    if split == 0:
        own_k, own_v = k_ptr + batch * k_batch + key * k_head, v_ptr + batch * v_batch + key * v_head
        for at in range(0, group, COLUMNS):
            k = load_rows(own_k, at, group, k_row, COLUMNS, D, BLOCK_D)
            v = load_rows(own_v, at, group, v_row, COLUMNS, D, BLOCK_D)
            m, l, total = absorb(q, k, v, m, l, total, scale, (at + column < group)[None, :], True, PRECISION)
    k_base = k_cache_ptr + batch * k_cache_batch + key * k_cache_head
    v_base = v_cache_ptr + batch * v_cache_batch + key * v_cache_head
    each = (length + splits * COLUMNS - 1) // (splits * COLUMNS) * COLUMNS
    for at in range(split * each, tl.minimum(length, (split + 1) * each), COLUMNS):
        k = load_rows(k_base, at, length, k_cache_row, COLUMNS, D, BLOCK_D)
        v = load_rows(v_base, at, length, v_cache_row, COLUMNS, D, BLOCK_D)
        m, l, total = absorb(q, k, v, m, l, total, scale, (at + column < length)[None, :], True, PRECISION)
    place = ((batch * heads + key) * splits + split) * rows
    # A split without keys has weight 0 in the merge.
    empty = l == 0
    store_rows(out_ptr + place * D, total / tl.where(empty, 1.0, l)[:, None], first, rows, D, ROWS, D, BLOCK_D)
    row = first + tl.arange(0, ROWS)
    lse = tl.where(empty, float("-inf"), (m + tl.log2(l)) * 0.6931471805599453)
    tl.store(lse_ptr + place + row, lse, mask=row < rows)


def layout(rows, D, dtype):
    """Return (rows, columns, warps, stages) per program."""
    tall = min(64 if dtype != torch.float32 and block_of(D) <= 128 else 16, max(16, triton.next_power_of_2(rows)))
    return tall, 32 if dtype == torch.float32 or block_of(D) == 256 else 64, 4, 2


launches = Kinds()
accepted = Kinds()  # kinds of input that passed the checks, and their scale


def prepare(q, k, v, k_cache, v_cache, cache_lengths, scale):
    """Return (launch, splits of the cache). Launch: q, k, v, k_cache, v_cache, lengths or a stand-in, out, lse."""
    B, H, group, D = q.shape
    heads, length = k.shape[1], k_cache.shape[2]
    rows = H // heads * group
    tall, columns, warps, stages = layout(rows, D, q.dtype)
    tiles = triton.cdiv(rows, tall)
    splits = max(1, min(triton.cdiv(length, LEAST), PROGRAMS // (B * heads * tiles)))
    numbers = *strides(k, v, k_cache, v_cache), heads, rows, group, length, splits, scale * LOG2E
    return Launch(
        decode_kernel, (B * heads * splits, tiles), q.get_device(), numbers,
        D=D, BLOCK_D=block_of(D), ROWS=tall, COLUMNS=columns, LENGTHS=cache_lengths is not None,
        PRECISION=precision(q.dtype), num_warps=warps, num_stages=stages,
    ), splits  # fmt: skip


def decode(q, k, v, k_cache, v_cache, cache_lengths, scale):
    """Run the op under the CUDA key."""
    B, H, group, D = q.shape
    q = q.contiguous()
    k, v, k_cache, v_cache = with_rows((k, v, k_cache, v_cache))
    given = q, k, v, k_cache, v_cache, cache_lengths
    kind = kind_of(*given, scale)
    launch, splits = launches.get(kind) or launches.keep(kind, prepare(*given, scale))
    shape = B, k.shape[1], splits, H // k.shape[1] * group
    out = torch.empty(*shape, D, dtype=torch.float32, device=q.device)
    lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    launch(q, k, v, k_cache, v_cache, q if cache_lengths is None else cache_lengths, out, lse)
    merged = (out * lse.softmax(2).unsqueeze(-1)).sum(2) if splits > 1 else out
    return merged.view(B, H, group, D).transpose(1, 2).contiguous().to(q.dtype).transpose(1, 2)
