"""Run by test_two_stream_decode_triton.py in a process with TRITON_INTERPRET=1: the kernel against the definition."""

import torch

from dbkernels.triton import two_stream_decode as triton_decode
from dbkernels.two_stream_decode import two_stream_decode_reference
from numerics import EPSILON

torch.manual_seed(0)
triton_decode.LEAST = 64  # so that short caches are split too


def check(B, H, heads, group, L, D, dtype=torch.float16, lengths=None):
    q = torch.randn(B, group, H, D).to(dtype).transpose(1, 2)
    k, v = torch.randn(2, B, heads, group, D).to(dtype).unbind()
    k_cache, v_cache = torch.randn(2, B, heads, L + 5, D + 3).to(dtype)[..., :L, :D].unbind()
    lengths = None if lengths is None else torch.tensor(lengths)
    arguments = q, k, v, k_cache, v_cache, lengths, D**-0.5
    ours = triton_decode.decode(*arguments)
    exact = two_stream_decode_reference(*(t.double() for t in arguments[:5]), *arguments[5:])
    assert ours.shape == q.shape and ours.transpose(1, 2).is_contiguous() and ours.dtype == dtype
    assert (ours.double() - exact).abs().max() <= 4 * EPSILON[dtype] * (1 + exact.abs().max()), (
        B,
        H,
        heads,
        group,
        L,
        D,
    )


check(1, 1, 1, 1, 1, 32)
check(2, 4, 2, 1, 300, 64)
check(1, 4, 1, 40, 130, 80)
check(2, 2, 2, 3, 0, 64)
check(3, 4, 2, 4, 200, 32, torch.float32, lengths=[0, 77, 200])
check(1, 2, 1, 70, 90, 256)

# Rows of the cache 2^26 elements apart: only the pages that are touched exist
own = torch.randn(3, 1, 1, 3, 32).half().unbind()
far = torch.empty(40 * 2**26, dtype=torch.float16).as_strided((1, 1, 40, 32), (0, 0, 2**26, 1))
far.copy_(torch.randn(1, 1, 40, 32))
near = far.contiguous()
assert torch.equal(
    triton_decode.decode(*own, far, far, None, 0.2), triton_decode.decode(*own, near, near, None, 0.2)
), "huge strides"
print("interpreted: ok")
