"""Losses of rows of logits and their gradient, in Triton. Definition: dbkernels/cross_entropy_rows.py."""

import torch
import triton
import triton.language as tl

BLOCK = 4096  # columns at once: 16 a thread with 8 warps


@triton.jit
def rows_kernel(
    logits_ptr, target_ptr, factor_ptr, loss_ptr, out_ptr, logits_row, out_row, width,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program, read twice: the second time mostly from the cache."""
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * logits_row
    target = tl.load(target_ptr + row)
    column = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    rest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        l = tl.load(logits + start + column, mask=start + column < width, other=float("-inf")).to(tl.float32)
        above = tl.maximum(top, l)
        # Lanes that have seen nothing yet, or only -inf, keep a sum of zero.
        still = above == float("-inf")
        kept = tl.where(still, 0.0, tl.exp(top - above))
        added = tl.where(still | (start + column == target), 0.0, tl.exp(l - above))
        rest = rest * kept + added
        top = above
    highest = tl.max(top, 0)
    rest = tl.sum(tl.where(top == float("-inf"), 0.0, rest * tl.exp(top - highest)), 0)
    at = tl.load(logits + tl.maximum(target, 0)).to(tl.float32) - highest
    own = tl.exp(at)
    # log1p(rest + expm1(at)) without cancellation: where the target is the highest, own is 1 and rest is what counts.
    small = rest + (own - 1.0)
    big = 1.0 + small
    exact = tl.where(big == 1.0, small, tl.log(big) * (small / (big - 1.0)))
    loss = exact - at
    tl.store(loss_ptr + row, tl.where(target >= 0, loss, 0.0))
    if GRADIENT:
        share = tl.where(target >= 0, tl.load(factor_ptr + row), 0.0) / (rest + own)
        for start in range(0, width, BLOCK):
            mask = start + column < width
            l = tl.load(logits + start + column, mask=mask, other=float("-inf")).to(tl.float32)
            grad = tl.where(start + column == target, -share * rest, share * tl.exp(l - highest))
            tl.store(out_ptr + row * out_row + start + column, grad.to(out_ptr.dtype.element_ty), mask=mask)


def launch(logits, target, factor, out):
    """Losses (R,); the gradient to `out` if there is a factor. Rows of adjacent elements."""
    rows, width = logits.shape
    loss = torch.empty(rows, dtype=logits.dtype, device=logits.device)
    if rows:
        rows_kernel[(rows,)](
            logits, target, loss if factor is None else factor, loss, out, logits.stride(0), out.stride(0), width,
            GRADIENT=factor is not None, BLOCK=min(BLOCK, max(256, triton.next_power_of_2(width))), num_warps=8,
        )  # fmt: skip
    return loss
