"""Run by test_two_stream_attention_triton.py in a process with TRITON_INTERPRET=1: the kernels against the definition
in float64. No bfloat16, whose products the interpreter gets wrong.
"""

import torch

from dbkernels.two_stream_attention import _triton_backward, _triton_forward, two_stream_attention_reference
from numerics import EPSILON, thinned

torch.manual_seed(0)


def close(ours, exact, dtype, what):
    """Weights and the gradient of scores are rounded to the dtype between the products: some units of the largest."""
    unit = 16 * EPSILON[dtype] * (1 + exact.abs().max())
    error = (ours.double() - exact).abs().max()
    assert ours.shape == exact.shape and error <= unit, (what, float(error), float(unit))


def streams(B, H, heads, N, D, dtype):
    """Six tensors with strides of a packed projection: (B, N, H, 3, D) and the like."""
    wide = torch.randn(B, N, H, 3, D).to(dtype).permute(3, 0, 2, 1, 4)
    narrow = torch.randn(B, heads, 4, N, D + 3).to(dtype)[..., :D].permute(2, 0, 1, 3, 4)
    return wide[0], narrow[0], narrow[1], wide[2], narrow[2], narrow[3]


def check(B, H, heads, N, D, group_size, dtype=torch.float16, clean=True, cu_seqlens=None):
    what = (B, H, heads, N, D, group_size, dtype, clean, cu_seqlens)
    given = list(streams(B, H, heads, N, D, dtype))
    given[0] = given[0] if clean else None
    exact = [None if t is None else t.double().requires_grad_() for t in given]
    options = group_size, D**-0.5, cu_seqlens
    ours, expected = _triton_forward(*given, *options), two_stream_attention_reference(*exact, *options)
    for a, b in zip(ours, expected, strict=True):
        close(a, b.detach(), dtype, ("forward", *what)) if b.numel() else None
    grad, grad_noisy = torch.randn(2, *given[3].shape).to(dtype)
    # The gradient's own error: from outputs that are exact but for their rounding.
    saved = [t.detach().to(dtype) for t in expected[:2]] + [t.detach().float() for t in expected[2:]]
    grads = _triton_backward(grad if clean else None, grad_noisy, *given, *saved, *options)
    outs, ups = [expected[1]], [grad_noisy.double()]
    if clean:
        outs, ups = [*outs, expected[0]], [*ups, grad.double()]
    leaves = [t for t in exact if t is not None]
    mine = [g for g, t in zip(grads, exact, strict=True) if t is not None]
    for name, a, b in zip("qkvQKV"[6 - len(leaves) :], mine, torch.autograd.grad(outs, leaves, ups), strict=True):
        close(a, b, dtype, (f"gradient of {name}", *what))


# Tiles of queries have 128 rows: two, three where a tile is to be neither the first nor the last.
LENGTHS = torch.tensor([0, 70, 70, 75, 140], dtype=torch.int32)
CASES = [
    ((1, 2, 2, 140, 64, 1), {}),
    ((2, 1, 1, 140, 32, 1), dict(clean=False)),
    ((1, 2, 1, 50, 64, 4), {}),
    ((1, 1, 1, 161, 80, 48), {}),
    ((1, 1, 1, 40, 96, 40), {}),
    ((1, 1, 1, 260, 32, 16), {}),
    ((1, 1, 1, 20, 256, 2), {}),
    ((1, 1, 1, 1, 32, 1), {}),
    ((1, 2, 2, 40, 32, 1), dict(dtype=torch.float32)),
    ((1, 1, 1, 40, 128, 4), dict(dtype=torch.float32)),
    ((1, 2, 1, 140, 32, 1), dict(cu_seqlens=LENGTHS)),
    ((1, 1, 1, 140, 32, 4), dict(clean=False, cu_seqlens=LENGTHS)),
]
for sizes, settings in thinned(CASES):
    check(*sizes, **settings)


def check_huge():
    """Heads 2^31 elements apart, a tile's 128 rows too: only the pages that are touched exist."""
    N, D = 140, 32
    whole = torch.empty(2**31 + N * 2**24, dtype=torch.float16)
    far = whole.as_strided((1, 2, N, D), (0, 2**31, 2**24, 1))
    far.copy_(torch.randn(1, 2, N, D))
    near = far.contiguous()
    expected = _triton_forward(*[near] * 6, 4, 0.1, None)
    for a, b in zip(_triton_forward(*[far] * 6, 4, 0.1, None), expected, strict=True):
        assert torch.equal(a, b), "huge strides"
    ups = torch.randn(2, 1, 2, N, D).to(torch.float16).unbind()
    near_grads = _triton_backward(*ups, *[near] * 6, *expected, 4, 0.1, None)
    for a, b in zip(_triton_backward(*ups, *[far] * 6, *expected, 4, 0.1, None), near_grads, strict=True):
        assert torch.equal(a, b), "huge strides, backward"


check_huge()
print("interpreted: ok")
