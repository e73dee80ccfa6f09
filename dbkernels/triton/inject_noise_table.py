"""inject_noise with y as rows of a table, and the sums of its gradient, in Triton. Definition:
dbkernels/inject_noise_table.py.

A program takes some rows of z and loops over their columns in chunks, twice where rows are normalised (the second time
they come from the cache). Groups of four elements cut the flat index, not the rows, so a row may begin within a group.
"""

import torch
import triton
import triton.language as tl

from dbkernels.triton.launch import Kinds, Launch
from dbkernels.triton.philox import address, box_muller, key_and_offset, philox4x32

ELEMENTS = 2048  # at a time per program: 16 per thread with 4 warps, 4 of float64 (8 spill)
WIDEST = 512  # columns per chunk
SUM_ROWS, SUM_COLUMNS = 8, 256  # a tile of the gradient's sums
LAUNCHED = 1024  # programs that the sums are cut into, over rows of the table
_launches = Kinds()


@triton.jit(do_not_specialize=["rows", "count", "per_level", "seed_low", "seed_high", "offset"])
def inject_noise_table_kernel(
    indices_ptr, table_ptr, sigma_ptr, z_ptr, seed_ptr, offset_ptr, seed_low, seed_high, offset, level: tl.float64,
    rows, count, width, per_level, sigma_data: tl.float64,
    NORMALIZE: tl.constexpr, SCALED: tl.constexpr, ALIGNED: tl.constexpr, GIVEN: tl.constexpr,
    SEED_AT: tl.constexpr, OFFSET_AT: tl.constexpr, ROUNDS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Compute `rows` of z, from a table of `count` rows of `width`. per_level: rows per level. GIVEN: one level for
    all. ALIGNED: width is a multiple of four, so that rows begin with a group."""
    wide: tl.constexpr = tl.float64 if z_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    index = tl.load(indices_ptr + row, mask=inside, other=0).to(tl.int64)
    # Never read outside of the table: a bad index shows as NaN.
    held = inside & (index >= 0) & (index < count)
    source = table_ptr + index * width
    factor = tl.full((ROWS,), 1.0, wide)
    if NORMALIZE:
        squares = tl.zeros((ROWS, 4 * GROUPS), wide)
        for start in range(0, width, 4 * GROUPS):
            column = start + tl.arange(0, 4 * GROUPS)
            mask = held[:, None] & (column < width)[None, :]
            y = tl.load(source[:, None] + column[None, :], mask=mask, other=0.0).to(wide)
            squares += y * y
        factor = 1.0 / tl.maximum(tl.sqrt(tl.sum(squares, 1)), 1e-12)
    factor = tl.where(held, factor, float("nan"))
    if GIVEN:
        sigma = tl.full((ROWS,), level, wide)
    else:
        sigma = tl.load(sigma_ptr + row // per_level, mask=inside, other=1.0).to(wide)
    scale = tl.full((ROWS,), 1.0, wide)
    if SCALED:
        data = tl.full((), sigma_data, wide)
        scale = tl.rsqrt(sigma * sigma + data * data)

    first = row * width  # the flat index at which a row begins
    begin = first // 4
    lead = (first - begin * 4).to(tl.int32)  # elements of its first group that belong to the row before
    key0, key1, word = key_and_offset(seed_ptr, offset_ptr, seed_low, seed_high, offset, SEED_AT, OFFSET_AT)
    for start in range(0, width if ALIGNED else width + 3, 4 * GROUPS):
        group = begin[:, None] + (start // 4 + tl.arange(0, GROUPS))[None, :]
        high = (group >> 32).to(tl.uint32)
        low = (group & 0xFFFFFFFF).to(tl.uint32)
        x0, x1, x2, x3 = philox4x32(low, high, word, high * 0, key0, key1, ROUNDS)
        n0, n1 = box_muller(x0, x1)
        n2, n3 = box_muller(x2, x3)
        eps = tl.join(tl.join(n0, n2), tl.join(n1, n3)).reshape(ROWS, 4 * GROUPS)
        column = (start + tl.arange(0, 4 * GROUPS))[None, :] - lead[:, None]
        mask = inside[:, None] & (column >= 0) & (column < width)
        y = tl.load(source[:, None] + column, mask=mask & held[:, None], other=0.0).to(wide)
        z = y * factor[:, None] + sigma[:, None] * eps.to(wide)
        if SCALED:
            z = z * scale[:, None]
        tl.store(z_ptr + first[:, None] + column, z.to(z_ptr.dtype.element_ty), mask=mask)


def tile_of(width, dtype):
    """Return (rows, groups) per program: a chunk that the width fills well, and more rows for a narrow one."""
    chunk = WIDEST
    while chunk > 64 and triton.cdiv(width, chunk) * chunk > 1.15 * triton.cdiv(width, 16) * 16:
        chunk //= 2
    return (ELEMENTS // 4 if dtype == torch.float64 else ELEMENTS) // chunk, chunk // 4


def launch(indices, table, sigma, z, sigma_data, normalize, seed, offset, rounds=10):
    """Fill z. indices: int64 or int32. sigma: a float, or levels of any floating dtype, in the indices' order. seed,
    offset: ints, or 0-dim tensors. All contiguous, on one device."""
    if indices.numel() == 0:
        return
    levels, level = (0, sigma) if isinstance(sigma, float) else (sigma.numel(), 0.0)
    tensors, words, form = address(seed, offset, z)
    key = (indices.numel(), levels, table.shape, table.dtype, sigma_data, normalize, *form, rounds, z.get_device())
    # A kernel is compiled for its pointers' dtypes, and a prepared launch doesn't check them.
    kind = (indices.dtype, sigma.dtype if levels else None, *(t.dtype for t in tensors), *key)
    prepared = _launches.get(kind) or _launches.keep(kind, _prepare(*key))
    prepared(indices, table, sigma if levels else z, z, *tensors, varying=(*words, level))


def _prepare(rows, levels, shape, dtype, sigma_data, normalize, seed_at, offset_at, rounds, device):
    tall, groups = tile_of(shape[1], dtype)
    numbers = rows, *shape, max(1, rows // max(1, levels)), float(sigma_data or 0.0)
    return Launch(
        inject_noise_table_kernel, (triton.cdiv(rows, tall),), device, numbers,
        NORMALIZE=normalize, SCALED=sigma_data is not None, ALIGNED=shape[1] % 4 == 0, GIVEN=levels == 0,
        SEED_AT=seed_at, OFFSET_AT=offset_at, ROUNDS=rounds, ROWS=tall, GROUPS=groups,
    )  # fmt: skip


@triton.jit(do_not_specialize=["per_level", "parts"])
def row_sums_kernel(
    grad_ptr, order_ptr, first_ptr, sigma_ptr, out_ptr, width, per_level, parts, sigma_data: tl.float64,
    SCALED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum one part of the positions of one row of the table, in their order: no atomics, the same bits each time."""
    wide: tl.constexpr = sigma_ptr.dtype.element_ty
    k, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    begin, end = tl.load(first_ptr + k), tl.load(first_ptr + k + 1)
    each = (end - begin + parts - 1) // parts
    begin, end = begin + part * each, tl.minimum(begin + (part + 1) * each, end)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((COLUMNS,), wide)
    for at in range(begin, end, ROWS):
        j = at + tl.arange(0, ROWS)
        row = tl.load(order_ptr + j, mask=j < end, other=0)
        mask = (j < end)[:, None] & (column < width)[None, :]
        grad = tl.load(grad_ptr + row[:, None] * width + column[None, :], mask=mask, other=0.0).to(wide)
        if SCALED:
            sigma = tl.load(sigma_ptr + row // per_level)
            data = tl.full((), sigma_data, wide)
            grad = grad * tl.rsqrt(sigma * sigma + data * data)[:, None]
        sums += tl.sum(grad, 0)
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * width + column, sums, mask=column < width)


def launch_sums(grad, indices, count, sigma, sigma_data):
    """Sum c_in·grad over the positions of each index: (count, width), in sigma's dtype. No host sync."""
    width = grad.shape[-1]
    ordered, order = torch.sort(indices.flatten(), stable=True)
    first = torch.searchsorted(ordered, torch.arange(count + 1, device=grad.device))
    # Fixed by the shapes alone, so that the sums' order is.
    parts = max(1, min(LAUNCHED // count, triton.cdiv(len(order), SUM_ROWS)))
    sums = torch.empty(count, parts, width, dtype=sigma.dtype, device=grad.device)
    row_sums_kernel[(count * parts, triton.cdiv(width, SUM_COLUMNS))](
        grad, order, first, sigma, sums, width, max(1, len(order) // max(1, sigma.numel())), parts,
        float(sigma_data or 0.0), SCALED=sigma_data is not None, ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS,
    )  # fmt: skip
    return sums.sum(1) if parts > 1 else sums[:, 0]
