"""Run by test_two_stream_attention_triton.py in a process with TRITON_INTERPRET=1: the paths that give cuDNN its part,
with a stand-in that computes in float64 what PyTorch's two operators promise, and refuses what cuDNN would.
"""

import math

import torch

from dbkernels.triton import two_stream_plans as plans
from dbkernels.two_stream_attention import two_stream_attention_reference
from numerics import EPSILON

torch.manual_seed(0)
layouts = {}  # PyTorch keeps a graph by the layouts of q, k, v and the probability, and out's and grad's are part of it


def check_taken(q, k, v, dropout, causal, *others):
    """What cuDNN takes, and PyTorch's cache of its graphs."""
    assert causal and dropout == 0.0 and math.copysign(1.0, dropout) == -1.0
    assert q.dtype == torch.float16 and q.shape[2] == k.shape[2] == v.shape[2] >= 2
    assert q.shape[1] % k.shape[1] == 0 and k.shape == v.shape
    for t in (q, k, v, *others):
        assert t.stride(-1) == 1 and not any(s % 8 for s in t.stride()[:3]) and not t.data_ptr() % 16
    key = tuple((t.shape, t.stride()) for t in (q, k, v))
    if others:
        layout = [t.stride() for t in others]
        assert layouts.setdefault(key, layout) == layout


def scores(q, k, scale):
    wide = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = (q.double() @ wide.transpose(-1, -2)) * scale
    return s.masked_fill(torch.ones(s.shape[-2:]).triu(1).bool(), -torch.inf)


def forward(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, debug=False, *,
            scale=None):  # fmt: skip
    assert attn_bias is None and compute_log_sumexp and not debug
    check_taken(query, key, value, dropout_p, is_causal)
    s = scores(query, key, scale)
    out = s.softmax(-1) @ value.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    number, N = torch.empty((), dtype=torch.int64), query.shape[2]
    lse = s.logsumexp(-1, keepdim=True).float().contiguous()
    return torch.empty_like(query).copy_(out), lse, torch.empty(0), torch.empty(0), N, N, number, number, torch.empty(0)


def backward(grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q, cum_seq_k,
             max_q, max_k, dropout_p, is_causal, *, scale=None):  # fmt: skip
    assert (max_q, max_k) == (query.shape[2], key.shape[2])
    assert logsumexp.shape == (*query.shape[:3], 1) and logsumexp.is_contiguous() and logsumexp.dtype == torch.float32
    check_taken(query, key, value, dropout_p, is_causal, out, grad_out)
    ratio = query.shape[1] // key.shape[1]
    wide_k, wide_v = (t.double().repeat_interleave(ratio, 1) for t in (key, value))
    p, grad = torch.exp(scores(query, key, scale) - logsumexp.double()), grad_out.double()
    delta = (grad * out.double()).sum(-1, keepdim=True)
    ds = p * (grad @ wide_v.transpose(-1, -2) - delta) * scale
    dk, dv = (
        t.unflatten(1, (-1, ratio)).sum(2) for t in (ds.transpose(-1, -2) @ query.double(), p.transpose(-1, -2) @ grad)
    )
    pairs = (query, ds @ wide_k), (key, dk), (value, dv)
    return tuple(torch.empty_like(like).copy_(t) for like, t in pairs)


standin = torch.library.Library("aten", "IMPL")
standin.impl("_scaled_dot_product_cudnn_attention", forward, "CPU")
standin.impl("_scaled_dot_product_cudnn_attention_backward", backward, "CPU")


def close(ours, exact, what):
    """Each part's result is rounded to the dtype before they are added: some units of the largest."""
    unit = 16 * EPSILON[torch.float16] * (1 + exact.abs().max())
    assert ours.shape == exact.shape and (ours.double() - exact).abs().max() <= unit, what


def check(path, B, H, heads, N, D, group_size, clean=True, packed=True):
    what = path, B, H, heads, N, D, group_size, clean, packed
    rows = torch.randn(2, B, N, H + 2 * heads, D).to(torch.float16)
    given = [part.transpose(1, 2) for one in rows for part in one.split([H, heads, heads], 2)]
    given = given if packed else [t.contiguous() for t in given]
    given[0] = given[0] if clean else None
    options = plans.Options(group_size, 0.3, None)
    exact = [None if t is None else t.double().requires_grad_() for t in given]
    expected = two_stream_attention_reference(*exact, group_size, 0.3)
    outs = plans.Forward(options, *given[:4]).run(path, *given)
    for a, b in zip(outs, expected, strict=True):
        close(a, b.detach(), ("forward", *what)) if b.numel() else None
    assert all(t.transpose(1, 2).is_contiguous() for t in outs[:2] if t.numel()) and outs[3].is_contiguous()
    grads = torch.randn(2, B, H, N, D).to(torch.float16)
    ups = [grads[0].double() if clean else None, grads[1].double()]
    wanted = torch.autograd.grad(
        [o for o in expected[:2] if o.numel()], [t for t in exact if t is not None], [u for u in ups if u is not None]
    )
    for grad in (grads, grads.transpose(2, 3).contiguous().transpose(2, 3)):
        both = grad[0] if clean else None, grad[1]
        found = plans.Backward(options, *given[:4]).run(path, *both, *given, *outs)
        mine = [t for t, like in zip(found, given, strict=True) if like is not None]
        for name, a, b in zip("qkvQKV"[6 - len(wanted) :], mine, wanted, strict=True):
            close(a, b, (f"gradient of {name}", *what))
            assert a.stride() == torch.empty_like(dict(zip("qkvQKV", given, strict=True))[name]).stride()


check(plans.BOTH, 2, 2, 2, 37, 32, 1)
check(plans.BOTH, 1, 4, 2, 64, 16, 1, packed=False)
check(plans.BOTH, 1, 4, 1, 40, 80, 1, clean=False)
check(plans.BOTH, 2, 2, 1, 3, 32, 1)
check(plans.CLEAN, 1, 4, 2, 37, 32, 1)
check(plans.CLEAN, 2, 2, 1, 50, 16, 4, packed=False)
check(plans.CLEAN, 1, 2, 2, 33, 32, 33)
print("interpreted: ok")
