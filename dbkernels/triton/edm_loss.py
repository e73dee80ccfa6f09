"""weight·|D − y|² as |F − target|² in Triton, with its gradients in the same pass. Definition: dbkernels/edm_loss.py.

The elements are taken as rows that no program crosses: a sample's, or those of one noise level. Each program leaves one
partial sum, and a second, small sum adds a sample's partial sums in their order, so a loss repeats bit for bit.
"""

import torch
import triton
import triton.language as tl

from dbkernels.triton.philox import address_words, box_muller, in_element_order, philox4x32

BLOCK = 2048  # elements a program takes: 16 a thread with 4 warps
READ, BY_GROUP, BY_ELEMENT = range(3)  # where the noise comes from


@triton.jit
def coefficients(sigma, sigma_data, DRAWN: tl.constexpr):
    """of_y, of_noise of target = of_y·y − of_noise·n, where n is z − y, or eps where z is drawn again."""
    larger = tl.maximum(sigma, sigma_data, propagate_nan=tl.PropagateNan.ALL)
    ratio = tl.minimum(sigma, sigma_data) / larger
    root = larger * tl.sqrt(1.0 + ratio * ratio)
    of_noise = sigma_data / root
    if not DRAWN:
        of_noise = of_noise / sigma
    return sigma / root / sigma_data, of_noise


@triton.jit
def words_at(group, seed_low, seed_high, offset):
    """The four words of each group, numbered in int64."""
    low, high = (group & 0xFFFFFFFF).to(tl.uint32), (group >> 32).to(tl.uint32)
    return philox4x32(low, high, offset.to(tl.uint32), high * 0, seed_low.to(tl.uint32), seed_high.to(tl.uint32))


@triton.jit
def normals_from(first, seed_low, seed_high, offset, DRAW: tl.constexpr, BLOCK: tl.constexpr):
    """The normals of BLOCK elements from `first` (int64) on, four for each cipher where `first` allows it."""
    if DRAW == 1:
        x0, x1, x2, x3 = words_at(first // 4 + tl.arange(0, BLOCK // 4), seed_low, seed_high, offset)
        n0, n1 = box_muller(x0, x1)
        n2, n3 = box_muller(x2, x3)
        eps = in_element_order(n0, n1, n2, n3, BLOCK // 4)
    else:
        element = first + tl.arange(0, BLOCK)
        x0, x1, x2, x3 = words_at(element // 4, seed_low, seed_high, offset)
        upper = (element & 2) == 2
        n0, n1 = box_muller(tl.where(upper, x2, x0), tl.where(upper, x3, x1))
        eps = tl.where((element & 1) == 1, n1, n0)
    return eps


@triton.jit(do_not_specialize=["chunks", "level_step", "per_level", "seed_low", "seed_high", "offset"])
def edm_loss_kernel(
    F_ptr, z_ptr, y_ptr, sigma_ptr, loss_ptr, grad_F_ptr, grad_z_ptr, grad_y_ptr,
    per_row, chunks, level_step, per_level, sigma_data: tl.float64, share: tl.float64, seed_low, seed_high, offset,
    DRAW: tl.constexpr, UNIT: tl.constexpr, ELEMENTWISE: tl.constexpr,
    WANT_F: tl.constexpr, WANT_Z: tl.constexpr, WANT_Y: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK elements of a row of per_row, which has `chunks` of them. share: of a squared residual in the
    loss. UNIT: elements that are known to share a noise level; BLOCK means that the row has one, level_step apart."""
    program = tl.program_id(0)
    row = program // chunks
    start = (program - row * chunks).to(tl.int64) * BLOCK
    first = row.to(tl.int64) * per_row + start
    at = tl.arange(0, BLOCK)
    inside = at < per_row - start
    wide: tl.constexpr = sigma_ptr.dtype.element_ty
    data = tl.full((), sigma_data, wide)

    if UNIT == BLOCK:
        sigma = tl.load(sigma_ptr + row * level_step)
    else:
        # 64-bit division once a program, 32-bit within it.
        level = first // per_level
        unit = tl.arange(0, BLOCK // UNIT) * UNIT
        within = (first - level * per_level).to(tl.int32) + unit
        sigma = tl.load(sigma_ptr + level + within // per_level, mask=unit < per_row - start, other=1.0)
    of_y, of_noise = coefficients(sigma, data, DRAW != 0)
    if UNIT != BLOCK:
        of_y = tl.broadcast_to(of_y[:, None], (BLOCK // UNIT, UNIT)).reshape(BLOCK)
        of_noise = tl.broadcast_to(of_noise[:, None], (BLOCK // UNIT, UNIT)).reshape(BLOCK)

    F = tl.load(F_ptr + first + at, mask=inside, other=0.0).to(wide)
    y = tl.load(y_ptr + first + at, mask=inside, other=0.0).to(wide)
    if DRAW == 0:
        noise = tl.load(z_ptr + first + at, mask=inside, other=0.0).to(wide) - y
        at_y = -(of_y + of_noise)
    else:
        noise = normals_from(first, seed_low, seed_high, offset, DRAW, BLOCK).to(wide)
        at_y = -of_y
    residual = tl.where(inside, F - of_y * y + of_noise * noise, 0.0)

    weight = tl.full((), share, wide)
    slope = 2.0 * weight * residual
    if WANT_F:
        tl.store(grad_F_ptr + first + at, slope.to(grad_F_ptr.dtype.element_ty), mask=inside)
    if WANT_Z:
        tl.store(grad_z_ptr + first + at, (slope * of_noise).to(grad_z_ptr.dtype.element_ty), mask=inside)
    if WANT_Y:
        tl.store(grad_y_ptr + first + at, (slope * at_y).to(grad_y_ptr.dtype.element_ty), mask=inside)
    if ELEMENTWISE:
        tl.store(loss_ptr + first + at, residual * residual, mask=inside)
    else:
        tl.store(loss_ptr + program, tl.sum(residual * residual) * weight)


def layout(shape, sigma_shape, reduction):
    """rows, level_step, per_level, UNIT. A row is what shares a noise level if that is long enough, else a sample, or
    all elements where the reduction knows no samples."""
    numel, levels = shape.numel(), sigma_shape.numel()
    samples = shape[0] if reduction == "sample" else 1
    per_level = numel // levels
    if levels == 1:
        return samples, 0, per_level, BLOCK
    if len(sigma_shape) == 1 or per_level >= BLOCK:
        return levels, 1, per_level, BLOCK
    return samples, 0, per_level, 4 if per_level % 4 == 0 else 1


def forward(F, z, y, sigma, sigma_data, reduction, seed, offset, want_F, want_z, want_y):
    """Loss and gradients as the op returns them. At least one element."""
    from dbkernels.edm_loss import empty_gradients, mean_over

    F, y, sigma = F.contiguous(), y.contiguous(), sigma.contiguous()
    z = None if z is None else z.contiguous()
    grads = empty_gradients(F, z, y, want_F, want_z, want_y)
    rows, level_step, per_level, unit = layout(F.shape, sigma.shape, reduction)
    per_row = F.numel() // rows
    chunks = triton.cdiv(per_row, BLOCK)
    whole = reduction == "none"
    loss = torch.empty(F.shape if whole else (rows * chunks,), dtype=sigma.dtype, device=F.device)
    draw = READ if z is not None else BY_GROUP if per_row % 4 == 0 else BY_ELEMENT
    edm_loss_kernel[(rows * chunks,)](
        F, y if z is None else z, y, sigma, loss, *grads,
        per_row, chunks, level_step, per_level, sigma_data, 1.0 / mean_over(F.shape, reduction),
        *address_words(seed, offset),
        DRAW=draw, UNIT=unit, ELEMENTWISE=whole, WANT_F=want_F, WANT_Z=want_z, WANT_Y=want_y, BLOCK=BLOCK,
    )  # fmt: skip
    if reduction == "sample":
        loss = loss.view(len(F), -1).sum(1)
    return loss if whole or reduction == "sample" else loss.sum(), *grads


@triton.jit(do_not_specialize=["chunks"])
def scale_kernel(x_ptr, by_ptr, per_row, chunks, ELEMENTWISE: tl.constexpr, BLOCK: tl.constexpr):
    """x *= by, a factor for each row of per_row; a row whose factor is 1 is neither read nor written."""
    program = tl.program_id(0)
    row = program // chunks
    start = (program - row * chunks).to(tl.int64) * BLOCK
    first = row.to(tl.int64) * per_row + start
    at = tl.arange(0, BLOCK)
    inside = at < per_row - start
    if ELEMENTWISE:
        by = tl.load(by_ptr + first + at, mask=inside)
        x = tl.load(x_ptr + first + at, mask=inside).to(by.dtype)
        tl.store(x_ptr + first + at, (x * by).to(x_ptr.dtype.element_ty), mask=inside)
    else:
        by = tl.load(by_ptr + row)
        if by != 1.0:
            x = tl.load(x_ptr + first + at, mask=inside).to(by.dtype)
            tl.store(x_ptr + first + at, (x * by).to(x_ptr.dtype.element_ty), mask=inside)


def scale(x, by):
    """x *= by in place; x: contiguous; by: one factor, one for each of x's rows, or one an element."""
    if x.numel() == 0:
        return
    elementwise = by.numel() == x.numel() and x.numel() > 1
    rows = 1 if elementwise else by.numel()
    per_row = x.numel() // rows
    chunks = triton.cdiv(per_row, BLOCK)
    scale_kernel[(rows * chunks,)](x, by.contiguous(), per_row, chunks, ELEMENTWISE=elementwise, BLOCK=BLOCK)
