"""Compute weight·|D − y|² as |F − target|² and its gradients in one pass. Definition: dbkernels/edm_loss.py.

The elements are taken as rows that no program crosses: a sample's, or those of one noise level. Each program leaves one
partial sum, and a second, small sum adds a sample's partial sums in their order, so a loss repeats bit for bit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dbkernels._edm_loss import mean_over, room
from dbkernels.triton.launch import Kinds, Launch
from dbkernels.triton.philox import address, box_muller, in_element_order, key_and_offset, philox4x32

BLOCK = 2048  # elements a program takes: 16 a thread with 4 warps
PARTIAL = 1024  # partial sums that are added at once
STEPS = 16  # blocks that a program scales: mostly it has only to find that it needn't
MOST_ROWS = 65535  # of a grid: its second dimension
READ, BY_GROUP, BY_ELEMENT, SCALED = range(4)  # DRAW: z is read, drawn again (by fours or singly), or read times c_in
accepted, _plans, _scales = Kinds(), Kinds(), Kinds()  # kinds of input that passed the checks; what was prepared


@triton.jit
def coefficients(sigma, sigma_data, DRAW: tl.constexpr):
    """Return of_y, of_noise, clean of target = of_y·y − of_noise·n, where n is z − clean·y, or eps where z is drawn
    again: clean is 1, c_in, or 0."""
    larger = tl.maximum(sigma, sigma_data, propagate_nan=tl.PropagateNan.ALL)
    ratio = tl.minimum(sigma, sigma_data) / larger
    root = larger * tl.sqrt(1.0 + ratio * ratio)
    of_noise = sigma_data / root
    clean = tl.zeros_like(sigma)
    if DRAW == 0:
        of_noise = of_noise / sigma
        clean += 1.0
    if DRAW == 3:
        of_noise = sigma_data / sigma
        clean = tl.rsqrt(sigma * sigma + sigma_data * sigma_data)  # inject_noise's bits, or clean·y wouldn't cancel
    return sigma / root / sigma_data, of_noise, clean


@triton.jit
def words_at(group, key0, key1, offset, ROUNDS: tl.constexpr):
    """Return the four words of each group, numbered in int64."""
    low, high = (group & 0xFFFFFFFF).to(tl.uint32), (group >> 32).to(tl.uint32)
    return philox4x32(low, high, offset, high * 0, key0, key1, ROUNDS)


@triton.jit
def normals_from(first, key0, key1, offset, DRAW: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the normals of BLOCK elements from `first` (int64) on, four per cipher call where `first` allows it."""
    if DRAW == 1:
        x0, x1, x2, x3 = words_at(first // 4 + tl.arange(0, BLOCK // 4), key0, key1, offset, ROUNDS)
        n0, n1 = box_muller(x0, x1)
        n2, n3 = box_muller(x2, x3)
        eps = in_element_order(n0, n1, n2, n3, BLOCK // 4)
    else:
        element = first + tl.arange(0, BLOCK)
        x0, x1, x2, x3 = words_at(element // 4, key0, key1, offset, ROUNDS)
        upper = (element & 2) == 2
        n0, n1 = box_muller(tl.where(upper, x2, x0), tl.where(upper, x3, x1))
        eps = tl.where((element & 1) == 1, n1, n0)
    return eps


@triton.jit(do_not_specialize=["seed_low", "seed_high", "offset", "level_step", "per_level"])
def edm_loss_kernel(
    F_ptr, z_ptr, y_ptr, sigma_ptr, loss_ptr, grad_F_ptr, grad_z_ptr, grad_y_ptr, seed_ptr, offset_ptr,
    seed_low, seed_high, offset, level: tl.float64,
    per_row, level_step, per_level, sigma_data: tl.float64, share: tl.float64, steep: tl.float64,
    ROW_AXIS: tl.constexpr, GIVEN: tl.constexpr, DRAW: tl.constexpr, UNIT: tl.constexpr, ELEMENTWISE: tl.constexpr,
    WANT_F: tl.constexpr, WANT_Z: tl.constexpr, WANT_Y: tl.constexpr,
    SEED_AT: tl.constexpr, OFFSET_AT: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK elements of a row of per_row, in one program. share: factor of a squared residual in the loss;
    steep: factor of a residual in the gradient of F. UNIT: elements that are known to share a noise level; BLOCK means
    that the row has one, level_step apart, or GIVEN as a number."""
    row = tl.program_id(ROW_AXIS).to(tl.int64)
    chunk = tl.program_id(1 - ROW_AXIS)
    start = chunk.to(tl.int64) * BLOCK
    first = row * per_row + start
    at = tl.arange(0, BLOCK)
    inside = at < per_row - start
    wide: tl.constexpr = loss_ptr.dtype.element_ty
    data = tl.full((), sigma_data, wide)

    if GIVEN:
        sigma = tl.full((), level, wide)
    elif UNIT == BLOCK:
        sigma = tl.load(sigma_ptr + row * level_step).to(wide)
    else:
        # 64-bit division once a program, 32-bit within it.
        level = first // per_level
        unit = tl.arange(0, BLOCK // UNIT) * UNIT
        within = (first - level * per_level).to(tl.int32) + unit
        sigma = tl.load(sigma_ptr + level + within // per_level, mask=unit < per_row - start, other=1.0).to(wide)
    of_y, of_noise, clean = coefficients(sigma, data, DRAW)
    if UNIT != BLOCK:
        of_y = tl.broadcast_to(of_y[:, None], (BLOCK // UNIT, UNIT)).reshape(BLOCK)
        of_noise = tl.broadcast_to(of_noise[:, None], (BLOCK // UNIT, UNIT)).reshape(BLOCK)
        clean = tl.broadcast_to(clean[:, None], (BLOCK // UNIT, UNIT)).reshape(BLOCK)

    F = tl.load(F_ptr + first + at, mask=inside, other=0.0).to(wide)
    y = tl.load(y_ptr + first + at, mask=inside, other=0.0).to(wide)
    if DRAW == 0 or DRAW == 3:
        noise = tl.fma(-clean, y, tl.load(z_ptr + first + at, mask=inside, other=0.0).to(wide))
    else:
        key0, key1, word = key_and_offset(seed_ptr, offset_ptr, seed_low, seed_high, offset, SEED_AT, OFFSET_AT)
        noise = normals_from(first, key0, key1, word, DRAW, ROUNDS, BLOCK).to(wide)
    residual = tl.where(inside, F - of_y * y + of_noise * noise, 0.0)

    slope = tl.full((), steep, wide) * residual
    if WANT_F:
        tl.store(grad_F_ptr + first + at, slope.to(grad_F_ptr.dtype.element_ty), mask=inside)
    if WANT_Z:
        tl.store(grad_z_ptr + first + at, (slope * of_noise).to(grad_z_ptr.dtype.element_ty), mask=inside)
    if WANT_Y:
        at_y = -(of_y + of_noise * clean)
        tl.store(grad_y_ptr + first + at, (slope * at_y).to(grad_y_ptr.dtype.element_ty), mask=inside)
    if ELEMENTWISE:
        tl.store(loss_ptr + first + at, residual * residual * tl.full((), share, wide), mask=inside)
    else:
        total = tl.sum(residual * residual) * tl.full((), share, wide)
        tl.store(loss_ptr + row * tl.num_programs(1 - ROW_AXIS) + chunk, total)


@triton.jit
def total_kernel(partial_ptr, loss_ptr, count, BLOCK: tl.constexpr):
    """Add a sample's `count` partial sums in their order, in one program."""
    first = tl.program_id(0).to(tl.int64) * count
    sums = tl.zeros((BLOCK,), loss_ptr.dtype.element_ty)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sums += tl.load(partial_ptr + first + at, mask=at < count, other=0.0)
    tl.store(loss_ptr + tl.program_id(0), tl.sum(sums))


def layout(shape, sigma_shape, reduction):
    """Return rows, level_step, per_level, UNIT. A row is what shares a noise level if that is long enough, else a
    sample, or all elements where the reduction knows no samples."""
    numel, levels = shape.numel(), sigma_shape.numel()
    samples = shape[0] if reduction == "sample" else 1
    per_level = numel // levels
    if levels == 1:
        return samples, 0, per_level, BLOCK
    if len(sigma_shape) == 1 or per_level >= BLOCK:
        return levels, 1, per_level, BLOCK
    return samples, 0, per_level, 4 if per_level % 4 == 0 else 1


def grid_of(rows, chunks):
    """Return the grid of `chunks` programs in each of `rows`, and which of its dimensions counts the rows."""
    return ((chunks, rows), 1) if rows <= MOST_ROWS else ((rows, chunks), 0)


class Plan(NamedTuple):
    """Hold what was prepared for a kind of input: launches, number of partial sums, the loss's shape and dtype."""

    launch: Launch
    total: Launch | None
    partial: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def shape_of_levels(sigma):
    """Return the shape of sigma's levels: (), (B,) or (B, N)."""
    shape = sigma.shape
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return torch.Size(()) if sigma.numel() == 1 else shape


def _prepare(shape, levels, dtype, sigma_data, reduction, source, form, rounds, weight, expected, wants, device):
    """Return the plan for a kind of input. levels: shape of sigma's, None for a float; source: READ, SCALED, or None
    to draw z again."""
    given = levels is None
    rows, level_step, per_level, unit = layout(shape, torch.Size(()) if given else levels, reduction)
    per_row, whole = shape.numel() // rows, reduction == "none"
    chunks = triton.cdiv(per_row, BLOCK)
    grid, row_axis = grid_of(rows, chunks)
    draw = (BY_GROUP if per_row % 4 == 0 else BY_ELEMENT) if source is None else source
    share = weight / mean_over(shape, reduction)
    launch = Launch(
        edm_loss_kernel, grid, device, (per_row, level_step, per_level, sigma_data, share, 2.0 * share * expected),
        ROW_AXIS=row_axis, GIVEN=given, DRAW=draw, UNIT=unit, ELEMENTWISE=whole,
        WANT_F=wants[0], WANT_Z=wants[1], WANT_Y=wants[2],
        SEED_AT=form[0], OFFSET_AT=form[1], ROUNDS=rounds, BLOCK=BLOCK,
    )  # fmt: skip
    if whole:
        return Plan(launch, None, 0, shape, dtype)
    samples = shape[:1] if reduction == "sample" else ()
    count = rows * chunks // (samples[0] if samples else 1)
    total = Launch(total_kernel, (rows * chunks // count,), device, (count,), BLOCK=PARTIAL) if count > 1 else None
    return Plan(launch, total, rows * chunks, samples, dtype)


def forward(
    F, z, y, sigma, sigma_data, reduction, z_scaled, seed, offset, rounds, weight, expected, want_F, want_z, want_y
):  # fmt: skip
    """Return the loss and the gradients of F, z and y, None where one isn't wanted. F: at least one element; sigma: a
    float, or levels of any floating dtype; seed, offset: ints, or 0-dim tensors."""
    levels, level = (None, sigma) if isinstance(sigma, float) else (shape_of_levels(sigma), 0.0)
    dtypes = F.dtype, None if z is None else z.dtype, y.dtype
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    source, wants = None if z is None else SCALED if z_scaled else READ, (want_F, want_z, want_y)
    tensors, words, form = address(seed, offset, F)
    key = (F.shape, levels, wide, sigma_data, reduction, source, form, rounds, weight, expected, wants, F.get_device())
    # A kernel is compiled for its pointers' dtypes, and a prepared launch doesn't look at them.
    kind = (dtypes, None if levels is None else sigma.dtype, *(t.dtype for t in tensors), *key)
    plan = _plans.get(kind) or _plans.keep(kind, _prepare(*key))

    F, y, z = contiguous(F), contiguous(y), y if z is None else z
    z, sigma = contiguous(z), F if levels is None else contiguous(sigma)
    pairs = zip((F, z, y), wants, strict=True)
    grads = [room(x, True) if want else None for x, want in pairs]
    loss = torch.empty(plan.shape, dtype=plan.dtype, device=F.device)
    partial = loss if plan.total is None else torch.empty(plan.partial, dtype=plan.dtype, device=F.device)
    places = [F if grad is None else grad for grad in grads]
    plan.launch(F, z, y, sigma, partial, *places, *tensors, varying=(*words, level))
    if plan.total is not None:
        plan.total(partial, loss)
    return loss, *grads


def contiguous(x):
    """Return x if it is contiguous, without a call into torch's dispatcher; else a copy that is."""
    return x if x.is_contiguous() else x.contiguous()


@triton.jit
def ratio(by, expected, inverse):
    """Return by/expected, where 1/expected is `inverse`; exactly 1 where they are equal."""
    return tl.where(by == tl.full((), expected, by.dtype), 1.0, by * tl.full((), inverse, by.dtype))


@triton.jit
def scale_kernel(
    x_ptr, by_ptr, per_row, expected: tl.float64, inverse: tl.float64,
    ROW_AXIS: tl.constexpr, ELEMENTWISE: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Multiply x by by/expected, a factor per row of per_row, or per element; a row or a block of elements whose
    factors are 1 is neither read nor written. A program takes STEPS blocks of a row: reading a factor costs little."""
    row = tl.program_id(ROW_AXIS).to(tl.int64)
    start = tl.program_id(1 - ROW_AXIS).to(tl.int64) * (STEPS * BLOCK)
    first = row * per_row
    end = tl.minimum(start + STEPS * BLOCK, per_row)
    if ELEMENTWISE:
        for at in range(start, end, BLOCK):
            inside = at + tl.arange(0, BLOCK)
            by = ratio(tl.load(by_ptr + first + inside, mask=inside < per_row, other=expected), expected, inverse)
            if tl.sum((by != 1.0).to(tl.int32)) != 0:
                x = tl.load(x_ptr + first + inside, mask=inside < per_row).to(by.dtype)
                tl.store(x_ptr + first + inside, (x * by).to(x_ptr.dtype.element_ty), mask=inside < per_row)
    else:
        by = ratio(tl.load(by_ptr + row), expected, inverse)
        if by != 1.0:
            for at in range(start, end, BLOCK):
                inside = at + tl.arange(0, BLOCK)
                x = tl.load(x_ptr + first + inside, mask=inside < per_row).to(by.dtype)
                tl.store(x_ptr + first + inside, (x * by).to(x_ptr.dtype.element_ty), mask=inside < per_row)


def scale(x, by, expected=1.0):
    """Multiply x by by/expected in place. x: contiguous; by: one factor, also one expanded, one per row of x, or one
    per element."""
    numel, factors = x.numel(), by.numel()
    if numel == 0:
        return
    if factors > 1 and not any(by.stride()):
        factors = 1  # its memory holds one
    key = numel, factors, expected, x.dtype, by.dtype, x.get_device()
    launch = _scales.get(key) or _scales.keep(key, _prepare_scale(numel, factors, expected, x.get_device()))
    launch(x, by if factors == 1 else contiguous(by))


def _prepare_scale(numel, factors, expected, device):
    elementwise = factors == numel and numel > 1
    rows = 1 if elementwise else factors
    per_row = numel // rows
    grid, row_axis = grid_of(rows, triton.cdiv(per_row, STEPS * BLOCK))
    return Launch(
        scale_kernel, grid, device, (per_row, expected, 1.0 / expected),
        ROW_AXIS=row_axis, ELEMENTWISE=elementwise, STEPS=STEPS, BLOCK=BLOCK,
    )  # fmt: skip
