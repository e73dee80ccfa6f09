"""Losses of rows of logits and their gradient, in Triton. Definition: dbkernels/cross_entropy_rows.py."""

import torch
import triton
import triton.language as tl

from dbkernels.triton.launch import Kinds, Launch

BLOCK = 4096  # columns at a time of a whole row: 16 per thread with 8 warps
COLUMNS = 2048  # the same of a chunk of words: 16 per thread with 4 warps
TARGETS = 1024


@triton.jit
def write_gradient(
    logits, out, width, target, own, share, shift, loss, OVERLAP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write share·exp((l - shift) - loss), and `own` at the target. OVERLAP: out is the first part of the logits' row,
    so a block's reads must end before its writes begin; those never reach into a block that is still to be read."""
    column = tl.arange(0, BLOCK)
    for start in range(0, width, BLOCK):
        mask = start + column < width
        l = tl.load(logits + start + column, mask=mask, other=float("-inf"))
        grad = tl.where(start + column == target, own, share * tl.exp((l - shift) - loss))
        if OVERLAP:
            tl.debug_barrier()
        tl.store(out + start + column, grad.to(out.dtype.element_ty), mask=mask)


@triton.jit
def rows_kernel(
    logits_ptr, target_ptr, factor_ptr, loss_ptr, out_ptr, logits_row, out_row, width, ignore_index, rows,
    GRADIENT: tl.constexpr, OVERLAP: tl.constexpr, FEW: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute one row per program, read twice: the second time mostly from the cache. FEW: 0, or at least the number of
    rows: there are no factors, so for a mean each program counts the rows, and losses are terms of the result."""
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * logits_row
    target = tl.load(target_ptr + row)
    column = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), dtype)
    rest = tl.zeros((BLOCK,), dtype)
    for start in range(0, width, BLOCK):
        l = tl.load(logits + start + column, mask=start + column < width, other=float("-inf"))
        above = tl.maximum(top, l)
        # Lanes that have read no logit so far, or only -inf, keep a sum of zero.
        still = above == float("-inf")
        kept = tl.where(still, 0.0, tl.exp(top - above))
        added = tl.where(still | (start + column == target), 0.0, tl.exp(l - above))
        rest = rest * kept + added
        top = above
    highest = tl.max(top, 0)
    rest = tl.sum(tl.where(top == float("-inf"), 0.0, rest * tl.exp(top - highest)), 0)
    ignored = target == ignore_index
    wrong = (target != ignore_index) & ((target < 0) | (target >= width))
    at = tl.load(logits + tl.where(wrong | ignored, 0, target)) - highest
    own = tl.exp(at)
    # log1p(rest + expm1(at)) without cancellation: where the target is the highest, own is 1 and rest decides.
    small = rest + (own - 1.0)
    big = 1.0 + small
    exact = tl.where(big == 1.0, small, tl.log(big) * (small / (big - 1.0)))
    loss = tl.where(ignored, 0.0, tl.where(wrong, float("nan"), exact - at))
    factor = tl.full((), 1.0, dtype)
    if FEW:
        if MEAN:
            other = tl.arange(0, FEW)
            counted = tl.load(target_ptr + other, mask=other < rows, other=ignore_index) != ignore_index
            factor /= tl.sum(counted.to(tl.int32), 0).to(dtype)
        loss *= factor
    elif GRADIENT:
        factor = tl.load(factor_ptr + row)
    tl.store(loss_ptr + row, loss)
    if GRADIENT:
        share = tl.where(ignored, 0.0, tl.where(wrong, float("nan"), factor)) / (rest + own)
        # All threads have read the target's logit, so its place may be overwritten.
        write_gradient(
            logits, out_ptr + row * out_row, width, target, -share * rest, share, highest, 0.0, OVERLAP, BLOCK
        )


@triton.jit(do_not_specialize=["first"])
def columns_kernel(
    logits_ptr, target_ptr, at_ptr, loss_ptr, factor_ptr, out_ptr, first, logits_row, out_row, width,
    OVERLAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute one row per program, read once."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    ignored = target == -1
    loss = tl.load(loss_ptr + row)
    share = tl.where(ignored, 0.0, tl.load(factor_ptr + row))
    shift = tl.where(ignored, float("inf"), tl.load(at_ptr + row))
    # expm1(-loss) without cancellation, as W. Kahan's log1p above.
    p = tl.exp(-loss)
    near = tl.where(p == 1.0, -loss, (p - 1.0) * (-loss / tl.log(tl.where(p == 1.0, 0.5, p))))
    own = share * tl.where(p == 0.0, -1.0, near)
    write_gradient(
        logits_ptr + row * logits_row, out_ptr + row * out_row, width, target - first, own, share, shift, loss,
        OVERLAP, BLOCK,
    )  # fmt: skip


@triton.jit
def mark_kernel(
    target_ptr, weight_ptr, marked_ptr, factor_ptr, ignore_index, width, rows,
    WEIGHTED: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mark the targets. Each program counts all rows: reading the targets again is cheaper than a second launch."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(target_ptr + at, mask=at < rows, other=0)
    counted = target != ignore_index
    inside = (target >= 0) & (target < width)
    tl.store(marked_ptr + at, tl.where(counted, tl.where(inside, target, -2), -1), mask=at < rows)
    factor = tl.where(counted, 1.0, 0.0).to(factor_ptr.dtype.element_ty)
    if WEIGHTED:
        # Not a product: an ignored row's weight may be infinite.
        factor = tl.where(counted, tl.load(weight_ptr + at, mask=at < rows, other=0.0), 0.0)
    if MEAN:
        count = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, rows, BLOCK):
            other = start + tl.arange(0, BLOCK)
            t = tl.load(target_ptr + other, mask=other < rows, other=ignore_index)
            count += (t != ignore_index).to(tl.int32)
        factor = factor / tl.sum(count, 0).to(factor.dtype)
    tl.store(factor_ptr + at, factor, mask=at < rows)


launches = Kinds()


def overlapping(logits, out):
    """Return whether halves go to the first part of each row of the logits."""
    return out.dtype != logits.dtype and out.data_ptr() == logits.data_ptr()


def prepare_rows(shape, step, out_step, device, gradient, overlap, ignore_index=-1, few=False, mean=False):
    """Return a launch of the rows' kernel: (logits, target, factor, loss, out)."""
    count, width = shape
    return Launch(
        rows_kernel, (count,), device, (step, out_step, width, ignore_index, count),
        GRADIENT=gradient, OVERLAP=overlap, FEW=triton.next_power_of_2(count) if few else 0, MEAN=mean,
        BLOCK=min(BLOCK, max(256, triton.next_power_of_2(width))), num_warps=8,
    )  # fmt: skip


def rows(logits, target, factor, out):
    """Return the losses (R,); with a factor, write the gradient to `out`. Rows have adjacent elements."""
    shape, device, step, out_step = logits.shape, logits.get_device(), logits.stride(0), out.stride(0)
    loss = torch.empty(shape[:1], dtype=logits.dtype, device=logits.device)
    if not shape[0]:
        return loss
    gradient, overlap = factor is not None, overlapping(logits, out)
    kind = shape, step, logits.dtype, out_step, out.dtype, gradient, overlap, device
    launch = launches.get(kind) or launches.keep(
        kind, prepare_rows(shape, step, out_step, device, gradient, overlap)
    )  # fmt: skip
    launch(logits, target, factor if gradient else loss, loss, out)
    return loss


def columns(logits, target, at, loss, factor, first, out):
    """Write the gradient of some columns to `out`. Rows have adjacent elements."""
    (count, width), device, step = logits.shape, logits.get_device(), logits.stride(0)
    overlap = overlapping(logits, out)
    kind = "columns", count, width, step, logits.dtype, out.stride(0), out.dtype, overlap, device
    launch = launches.get(kind) or launches.keep(kind, Launch(
        columns_kernel, (count,), device, (step, out.stride(0), width),
        OVERLAP=overlap, BLOCK=min(COLUMNS, max(256, triton.next_power_of_2(width))), num_warps=4,
    ))  # fmt: skip
    launch(logits, target, at, loss, factor, out, varying=(first,))


def mark(target, width, ignore_index, row_weight, mean, dtype):
    """Return the targets as the other kernels take them, and the factors of the rows' losses: see `mark_targets`."""
    marked = torch.empty_like(target)
    factor = torch.empty(target.shape, dtype=dtype, device=target.device)
    rows, weighted = len(target), row_weight is not None
    kind = "mark", rows, width, ignore_index, weighted, mean, dtype, target.get_device()
    launch = launches.get(kind) or launches.keep(kind, Launch(
        mark_kernel, (triton.cdiv(rows, TARGETS),), target.get_device(), (ignore_index, width, rows),
        WEIGHTED=weighted, MEAN=mean, BLOCK=TARGETS, num_warps=4,
    ))  # fmt: skip
    # One number expanded, or a column of a tensor, isn't laid out as the kernel reads it.
    launch(target, row_weight.contiguous() if weighted else factor, marked, factor)
    return marked, factor
