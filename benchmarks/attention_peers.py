"""Peers of two_stream_attention: a dense mask, flex_attention's block mask, and two calls of causal flash, merged."""

import time

import torch
import torch.nn.functional as functional

from dbkernels.two_stream_attention import visible


def dense_mask(N, group_size, device):
    """Who sees whom in one sequence of 2N, (2N, 2N) bool."""
    clean, noisy, own = visible(N, group_size, device)
    return torch.cat([torch.cat([clean, torch.zeros_like(clean)], 1), torch.cat([noisy, own], 1)])


def joined(streams):
    """One sequence of 2N of the clean and the noisy queries, keys and values."""
    return (torch.cat([streams[i], streams[i + 3]], 2) for i in range(3))


def dense(streams, mask):
    """PyTorch's attention under the mask."""
    q, k, v = joined(streams)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).split(k.shape[2] // 2, 2)


def flex(N, group_size, device, kernel_options=None):
    """flex_attention over 2N tokens, compiled, and the seconds that its block mask took."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(b, h, query, key):
        row, column = query % N, key % N
        to_clean = torch.where(query < N, column <= row, column // group_size < row // group_size)
        to_noisy = (query >= N) & (column // group_size == row // group_size)
        return torch.where(key < N, to_clean, to_noisy)

    start = time.perf_counter()
    blocks = torch.compile(create_block_mask)(seen, None, None, 2 * N, 2 * N, device=device)
    torch.cuda.synchronize()
    took = time.perf_counter() - start
    compiled = torch.compile(flex_attention, dynamic=False)

    def op(streams):
        return compiled(*joined(streams), block_mask=blocks, kernel_options=kernel_options).split(N, 2)

    return op, took


class Composed(torch.autograd.Function):
    """Groups of one by PyTorch's flash attention on the GPU: causal, causal one place apart, and a merge."""

    @staticmethod
    def forward(ctx, q, k, v, q_noisy, k_noisy, v_noisy):
        flash = torch.ops.aten._scaled_dot_product_flash_attention.default
        out, lse, *rest = flash(q, k, v, 0.0, True, False)
        far, far_lse, *far_rest = flash(q_noisy[:, :, 1:], k[:, :, :-1], v[:, :, :-1], 0.0, True, False)
        near = (q_noisy.float() * k_noisy.float()).sum(-1) * q.shape[-1] ** -0.5
        lse_noisy = near.clone()
        lse_noisy[:, :, 1:] = torch.logaddexp(near[:, :, 1:], far_lse)
        share = torch.exp(near - lse_noisy).unsqueeze(-1)
        out_noisy = share * v_noisy
        out_noisy[:, :, 1:] += torch.exp(far_lse - lse_noisy[:, :, 1:]).unsqueeze(-1) * far
        out_noisy = out_noisy.to(q.dtype)
        ctx.save_for_backward(q, k, v, q_noisy, k_noisy, v_noisy, out, lse, out_noisy, lse_noisy, share)
        ctx.rests = rest[:6], far_rest[:6]
        return out, out_noisy

    @staticmethod
    def backward(ctx, grad, grad_noisy):
        q, k, v, q_noisy, k_noisy, v_noisy, out, lse, out_noisy, lse_noisy, share = ctx.saved_tensors
        back = torch.ops.aten._scaled_dot_product_flash_attention_backward.default

        def part(grad, q, k, v, out, lse, rest):
            cum_q, cum_k, max_q, max_k, seed, offset = rest
            return back(grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, 0.0, True, seed, offset)

        dq, dk, dv = part(grad, q, k, v, out, lse, ctx.rests[0])
        behind, before = slice(1, None), slice(0, -1)
        far = part(grad_noisy[:, :, behind], q_noisy[:, :, behind], k[:, :, before], v[:, :, before],
                   out_noisy[:, :, behind], lse_noisy[:, :, behind].contiguous(), ctx.rests[1])  # fmt: skip
        slope = share * (grad_noisy.float() * (v_noisy - out_noisy).float()).sum(-1, keepdim=True) * q.shape[-1] ** -0.5
        dq_noisy = (slope * k_noisy).to(q.dtype)
        dq_noisy[:, :, behind] += far[0]
        dk[:, :, before] += far[1]
        dv[:, :, before] += far[2]
        return dq, dk, dv, dq_noisy, (slope * q_noisy).to(q.dtype), (share * grad_noisy).to(q.dtype)
