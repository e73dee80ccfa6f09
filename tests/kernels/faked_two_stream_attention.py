"""Run by test_two_stream_attention_triton.py on a fake GPU: launches of a call, and its host time beside eager's."""

import sys
import time

import torch
import torch.nn.functional as functional

import fake_gpu

gpu = fake_gpu.activate()

from dbkernels import two_stream_attention  # noqa: E402

module = sys.modules["dbkernels.two_stream_attention"]
module.direct = lambda *tensors: True


def streams(N=16, heads=2):
    packed = torch.randn(2, 1, N, 2 + 2 * heads, 64, dtype=torch.bfloat16)
    given = [t for one in packed for t in (p.transpose(1, 2) for p in one.split([2, heads, heads], 2))]
    return [t.detach().requires_grad_() for t in given]


for group_size in (1, 4):
    given = streams()
    grads = [torch.randn_like(given[0]) for _ in range(2)]
    for _ in range(2):  # the first call prepares
        outs = two_stream_attention(*given, group_size=group_size)
        assert gpu.launches() == 2
        results = torch.autograd.grad(outs, given, grads)
        assert gpu.launches() == 5  # queries and keys of each stream, own keys
    assert [t.stride() for t in results] == [torch.empty_like(t).stride() for t in given]
    with torch.no_grad():
        two_stream_attention(*given, group_size=group_size)
    assert gpu.launches() == 2
    two_stream_attention(None, *given[1:], group_size=group_size)
    assert gpu.launches() == 1


def refused(message, *arguments, **options):
    for _ in range(2):
        try:
            two_stream_attention(*arguments, **options)
        except (TypeError, ValueError) as error:
            assert message in str(error), error
        else:
            raise AssertionError(message)


refused("v has shape", *given[:2], given[2][:, :, :5], *given[3:])
refused("scale=0.0", *given, scale=0.0)
refused("group_size", *given, group_size=17)
refused("group_size", *given, group_size=True)


def fastest(call):
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(100):
            call()
        times.append(time.perf_counter() - start)
    return 1e4 * min(times)


def eager(given):
    """Attend with the fewest calls: causal attention of each stream, and no merge."""
    q, k, v, q_noisy, k_noisy, v_noisy = given
    return tuple(
        functional.scaled_dot_product_attention(*t, is_causal=True) for t in ((q, k, v), (q_noisy, k_noisy, v_noisy))
    )


with torch.no_grad():
    ours, theirs = fastest(lambda: two_stream_attention(*given)), fastest(lambda: eager(given))
both = [
    fastest(lambda f=f: torch.autograd.grad(f(given), given, grads))
    for f in (lambda s: two_stream_attention(*s), eager)
]
print(f"host time, us: forward {ours:.0f} (two calls of SDPA {theirs:.0f}), both ways {both[0]:.0f} ({both[1]:.0f})")
print("faked: ok")
