"""Run by test_two_stream_attention_triton.py on a fake GPU: launches of a call, and what is refused."""

import sys

import torch

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
print("faked: ok")
