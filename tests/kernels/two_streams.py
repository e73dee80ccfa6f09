"""Examples of two streams, and dense attention under the explicit mask, shared by the op's tests."""

import torch
import torch.nn.functional as functional

from dbkernels.two_stream_attention import visible

NAMES = ("q", "k", "v", "q_noisy", "k_noisy", "v_noisy")


def example(B=2, H=4, heads=2, N=37, D=16, dtype=torch.float32, device="cpu", clean=True):
    """Return (q, k, v, q_noisy, k_noisy, v_noisy) that require gradients, with a packed projection's strides."""
    packed = torch.randn(2, B, N, H + 2 * heads, D, device=device).to(dtype)
    streams = []
    for one in packed:
        streams += [part.transpose(1, 2).detach().requires_grad_() for part in one.split([H, heads, heads], 2)]
    return [None, *streams[1:]] if not clean else streams


def dense_mask(N, group_size, device="cpu"):
    """Return the mask of the sequence of 2N, clean tokens first: (2N, 2N) bool, one row per query."""
    clean, noisy, own = visible(N, group_size, device)
    return torch.cat([torch.cat([clean, torch.zeros_like(clean)], 1), torch.cat([noisy, own], 1)])


def dense(streams, group_size, scale=None):
    """Attend within one sequence of 2N under the mask. Return (out, out_noisy)."""
    q, k, v, q_noisy, k_noisy, v_noisy = streams
    N = k.shape[2]
    queries = q_noisy if q is None else torch.cat([q, q_noisy], 2)
    keys, values = torch.cat([k, k_noisy], 2), torch.cat([v, v_noisy], 2)
    mask = dense_mask(N, group_size, k.device)[-queries.shape[2] :]
    out = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
    return (None, out) if q is None else out.split(N, 2)


def double(streams):
    return [None if t is None else t.detach().double().requires_grad_() for t in streams]


def both_ways(outs, streams, upstream):
    """Return the outputs, then all gradients."""
    kept = [out for out in outs[:2] if out is not None]
    leaves = [t for t in streams if t is not None]
    ups = [up.to(out.dtype) for up, out in zip(upstream[-len(kept) :], kept, strict=True)]
    return [*kept, *torch.autograd.grad(kept, leaves, ups)]
