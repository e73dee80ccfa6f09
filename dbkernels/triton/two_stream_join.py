"""Groups of one where cuDNN attends to the clean keys: add each token's attention to itself, in Triton. Definition:
dbkernels/two_stream_attention.py.

Noisy token i attends to itself and to the clean tokens before it: causal attention of queries from 1 on to keys up to
the last but one. That is cuDNN's part; a pass over the rows joins the two parts, forward and backward. Each is one
kernel, since every pass over six tensors costs a tenth of the attention itself.
"""

import triton
import triton.language as tl

from dbkernels.triton.launch import Launch
from dbkernels.triton.two_stream_attention import block_of, load_rows, store_rows, strides


@triton.jit
def rows_behind(base, first, length, stride, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows from first - 1 on, as float32, zero before row 0: cuDNN's results, whose queries begin at row 1."""
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    inside = ((row + first > 0) & (row < length - first))[:, None] & (column < D)[None, :]
    start = base + (tl.full((), 0, tl.int64) + first - 1) * stride
    return tl.load(start + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def join_kernel(
    q_ptr, k_ptr, v_ptr, far_ptr, far_lse_ptr, out_ptr, lse_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, far_batch, far_head, far_row,
    out_batch, out_head, out_row, tiles, heads, ratio, length, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute out and lse of a tile of noisy rows. far, far_lse: cuDNN's, from row 1 on. k, v: the noisy stream's."""
    first = tl.program_id(0) % tiles * ROWS
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    key = head // ratio
    q = load_rows(q_ptr + batch * q_batch + head * q_head, first, length, q_row, ROWS, D, BLOCK_D).to(tl.float32)
    k = load_rows(k_ptr + batch * k_batch + key * k_head, first, length, k_row, ROWS, D, BLOCK_D).to(tl.float32)
    v = load_rows(v_ptr + batch * v_batch + key * v_head, first, length, v_row, ROWS, D, BLOCK_D).to(tl.float32)
    far = rows_behind(far_ptr + batch * far_batch + head * far_head, first, length, far_row, ROWS, D, BLOCK_D)
    row = first + tl.arange(0, ROWS)
    inside = (row > 0) & (row < length)
    far_lse = tl.load(far_lse_ptr + (batch * heads + head) * (length - 1) + row - 1, mask=inside, other=float("-inf"))
    score = tl.sum(q * k, 1) * scale
    most = tl.maximum(score, far_lse, propagate_nan=tl.PropagateNan.ALL)
    near, distant = tl.exp(score - most), tl.exp(far_lse - most)
    both = near + distant
    out = (near / both)[:, None] * v + (distant / both)[:, None] * far
    store_rows(out_ptr + batch * out_batch + head * out_head, out, first, length, out_row, ROWS, D, BLOCK_D)
    tl.store(lse_ptr + (batch * heads + head) * length + row, most + tl.log(both), mask=row < length)


@triton.jit
def add_rows(base, values, first, length, stride, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    kept = load_rows(base, first, length, stride, ROWS, D, BLOCK_D).to(tl.float32)
    store_rows(base, kept + values, first, length, stride, ROWS, D, BLOCK_D)


@triton.jit
def separate_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, out_ptr, lse_ptr, far_dq_ptr, far_dk_ptr, far_dv_ptr,
    dq_ptr, own_dk_ptr, own_dv_ptr, dk_ptr, dv_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
    out_batch, out_head, out_row, far_dq_batch, far_dq_head, far_dq_row, far_dk_batch, far_dk_head, far_dk_row,
    far_dv_batch, far_dv_head, far_dv_row, dq_batch, dq_head, dq_row, own_dk_batch, own_dk_head, own_dk_row,
    own_dv_batch, own_dv_head, own_dv_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    tiles, heads, length, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, RATIO: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Compute all gradients of a tile of rows of one key head: dq, own_dk, own_dv of the noisy stream, dk, dv of the
    clean one. far_*: cuDNN's, of queries from 1 on and keys up to the last but one. ADD: to the clean queries' part,
    which dk and dv hold; otherwise there is none."""
    first = tl.program_id(0) % tiles * ROWS
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    key = (tl.program_id(0) // tiles % heads).to(tl.int64)
    k = load_rows(k_ptr + batch * k_batch + key * k_head, first, length, k_row, ROWS, D, BLOCK_D).to(tl.float32)
    v = load_rows(v_ptr + batch * v_batch + key * v_head, first, length, v_row, ROWS, D, BLOCK_D).to(tl.float32)
    own_dk = tl.zeros((ROWS, BLOCK_D), tl.float32)
    own_dv = tl.zeros((ROWS, BLOCK_D), tl.float32)
    row = first + tl.arange(0, ROWS)
    for member in range(RATIO):
        head = key * RATIO + member
        grad_base, out_base = grad_ptr + batch * grad_batch + head * grad_head, out_ptr + batch * out_batch
        q = load_rows(q_ptr + batch * q_batch + head * q_head, first, length, q_row, ROWS, D, BLOCK_D).to(tl.float32)
        grad = load_rows(grad_base, first, length, grad_row, ROWS, D, BLOCK_D).to(tl.float32)
        out = load_rows(out_base + head * out_head, first, length, out_row, ROWS, D, BLOCK_D).to(tl.float32)
        lse = tl.load(lse_ptr + (batch * heads * RATIO + head) * length + row, mask=row < length, other=float("inf"))
        p = tl.exp(tl.sum(q * k, 1) * scale - lse)
        slope = p * tl.sum(grad * (v - out), 1) * scale
        own_dv += p[:, None] * grad
        own_dk += slope[:, None] * q
        far_base = far_dq_ptr + batch * far_dq_batch + head * far_dq_head
        dq = slope[:, None] * k + rows_behind(far_base, first, length, far_dq_row, ROWS, D, BLOCK_D)
        store_rows(dq_ptr + batch * dq_batch + head * dq_head, dq, first, length, dq_row, ROWS, D, BLOCK_D)
    own_dk_base, own_dv_base = own_dk_ptr + batch * own_dk_batch, own_dv_ptr + batch * own_dv_batch
    store_rows(own_dk_base + key * own_dk_head, own_dk, first, length, own_dk_row, ROWS, D, BLOCK_D)
    store_rows(own_dv_base + key * own_dv_head, own_dv, first, length, own_dv_row, ROWS, D, BLOCK_D)
    far_dk_base, far_dv_base = far_dk_ptr + batch * far_dk_batch, far_dv_ptr + batch * far_dv_batch
    dk_base, dv_base = dk_ptr + batch * dk_batch + key * dk_head, dv_ptr + batch * dv_batch + key * dv_head
    far_dk = load_rows(far_dk_base + key * far_dk_head, first, length - 1, far_dk_row, ROWS, D, BLOCK_D).to(tl.float32)
    far_dv = load_rows(far_dv_base + key * far_dv_head, first, length - 1, far_dv_row, ROWS, D, BLOCK_D).to(tl.float32)
    if ADD:
        add_rows(dk_base, far_dk, first, length, dk_row, ROWS, D, BLOCK_D)
        add_rows(dv_base, far_dv, first, length, dv_row, ROWS, D, BLOCK_D)
    else:
        store_rows(dk_base, far_dk, first, length, dk_row, ROWS, D, BLOCK_D)
        store_rows(dv_base, far_dv, first, length, dv_row, ROWS, D, BLOCK_D)


def layout(D):
    """Return (rows, warps) per program: a thread holds 16 elements of each operand, two loads of 16 bytes."""
    return max(16, 2048 // block_of(D)), 4


def prepare_join(q, k, v, far, out, scale):
    """Return the launch that joins a noisy stream's parts. Launch: q, own k, own v, far, far_lse, out, lse."""
    B, H, N, D = q.shape
    rows, warps = layout(D)
    tiles = triton.cdiv(N, rows)
    return Launch(
        join_kernel, (B * H * tiles,), q.get_device(),
        (*strides(q, k, v, far, out), tiles, H, H // k.shape[1], N, scale),
        D=D, BLOCK_D=block_of(D), ROWS=rows, num_warps=warps, num_stages=1,
    )  # fmt: skip


def prepare_separate(q, k, v, grad, out, far, noisy, clean, scale, add):
    """Return the launch for the gradients. far: cuDNN's (dq, dk, dv); noisy: the noisy stream's to fill; clean: (dk,
    dv) to fill or to add to. Launch: q, own k, own v, grad, out, lse, *far, *noisy, *clean."""
    B, H, N, D = q.shape
    heads = k.shape[1]
    rows, warps = layout(D)
    tiles = triton.cdiv(N, rows)
    return Launch(
        separate_kernel, (B * heads * tiles,), q.get_device(),
        (*strides(q, k, v, grad, out, *far, *noisy, *clean), tiles, heads, N, scale),
        D=D, BLOCK_D=block_of(D), ROWS=rows, RATIO=H // heads, ADD=add, num_warps=warps, num_stages=1,
    )  # fmt: skip
