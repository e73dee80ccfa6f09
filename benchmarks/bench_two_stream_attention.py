"""two_stream_attention, forward and backward, against one sequence of 2N under a dense mask (SDPA) and, on a GPU, under
flex_attention's block mask, and for groups of one against two calls of causal flash attention, merged.

python benchmarks/bench_two_stream_attention.py [--device cuda] [--threads N] [--seconds S] [--out FOLDER]

TFLOP/s count the pairs that see each other: N² + N·group_size, forward 4·D each and backward 10·D. The dense mask is
left out where it alone takes 1 GiB.
"""

import time

import harness
import torch
import torch.nn.functional as functional

import dbkernels
from dbkernels.two_stream_attention import visible

LENGTHS = (256, 1024, 4096, 16384)
WIDTHS = (64, 128)
GROUPS = (1, 4, 32)


def dense_mask(N, group_size, device):
    clean, noisy, own = visible(N, group_size, device)
    return torch.cat([torch.cat([clean, torch.zeros_like(clean)], 1), torch.cat([noisy, own], 1)])


def joined(streams):
    return (torch.cat([streams[i], streams[i + 3]], 2) for i in range(3))


def dense(streams, mask):
    q, k, v = joined(streams)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).split(k.shape[2] // 2, 2)


def flex(N, group_size, device):
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
    return lambda streams: compiled(*joined(streams), block_mask=blocks).split(N, 2), took


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


def both_ways(op, streams, upstream):
    def call():
        outs = op(streams)
        return *outs, *torch.autograd.grad(outs, streams, upstream)

    return call


def ours(group_size):
    return lambda streams: dbkernels.two_stream_attention(*streams, group_size=group_size)


def check(streams, upstream, group_size, contenders):
    """Each contender against dense attention in float64, on the first tokens, which see no others."""
    N = min(256, streams[0].shape[2])
    short = [t.detach()[:, :, :N].double().requires_grad_() for t in streams]
    exact = dense(short, dense_mask(N, group_size, streams[0].device))
    unit = 2.0**-7 if streams[0].dtype == torch.bfloat16 else 2.0**-18
    for name, call in contenders.items():
        outs = call()
        for a, b in zip(outs[:2], exact, strict=True):
            assert ((a[:, :, :N].double() - b).abs() <= 2 * unit * (1 + b.abs())).all(), f"{name} is wrong: no timing"
    if streams[0].shape[2] == N:
        grads = torch.autograd.grad(exact, short, [u[:, :, :N].double() for u in upstream])
        for name, call in contenders.items():
            for a, b in zip(call()[2:], grads, strict=True):
                assert (a.double() - b).abs().max() <= 4 * unit * (1 + b.abs().max()), f"{name}: wrong gradient"


def case(N, D, group_size, dtype, options, notes):
    device = options.device
    on_gpu = device.type == "cuda"
    B, H = (max(1, 16384 // N), 8) if on_gpu else (1, max(1, 4096 // N))
    streams = [torch.randn(B, N, H, D, device=device).to(dtype).transpose(1, 2).requires_grad_() for _ in range(6)]
    upstream = [torch.randn(B, H, N, D, device=device).to(dtype) for _ in range(2)]
    name = f"{B}x{H}x{N}x{D}, groups of {group_size}"
    contenders = {"ours": both_ways(ours(group_size), streams, upstream)}
    if N <= 8192:
        mask = dense_mask(N, group_size, device)
        contenders["eager"] = both_ways(lambda s: dense(s, mask), streams, upstream)
    if on_gpu and (group_size == 4 or N == 4096):
        torch._dynamo.reset()
        op, took = flex(N, group_size, device)
        notes.append(f"{name}: flex_attention's block mask took {took:.2f} s")
        contenders["flex"] = both_ways(op, streams, upstream)
    if on_gpu and group_size == 1:
        contenders["composed"] = both_ways(lambda s: Composed.apply(*s), streams, upstream)
    check(streams, upstream, group_size, contenders)
    moved = sum(t.nbytes for t in streams) * 3
    flop = 14 * D * B * H * (N * N + N * group_size)
    return harness.measure(name, dtype, contenders, moved, device, options.seconds, flop)


def main():
    options = harness.options(__doc__)
    rows, notes = [], [options.note] if options.note else []
    for dtype in (torch.bfloat16,) if options.device.type == "cuda" else (torch.float32,):
        for D in WIDTHS:
            for N in LENGTHS:
                for group_size in GROUPS:
                    rows += case(N, D, group_size, dtype, options, notes)
    harness.save("two_stream_attention", rows, options.device, options.out, "; ".join(notes))


if __name__ == "__main__":
    main()
