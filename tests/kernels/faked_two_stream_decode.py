"""Run by test_two_stream_decode_triton.py on a fake GPU: launches of a call, and what is refused each time."""

import sys

import torch

import fake_gpu

gpu = fake_gpu.activate()

from dbkernels import two_stream_decode  # noqa: E402

sys.modules["dbkernels.two_stream_decode"].direct = lambda *tensors: True

own = torch.randn(3, 2, 4, 8, 64, dtype=torch.bfloat16).unbind()
caches = torch.randn(2, 2, 4, 600, 64, dtype=torch.bfloat16).unbind()
for lengths in (None, torch.tensor([5, 600]), torch.tensor([5, 600], dtype=torch.int32)):
    for _ in range(2):
        out = two_stream_decode(*own, *caches, cache_lengths=lengths)
        assert gpu.launches() == 1 and out.shape == own[0].shape and out.transpose(1, 2).is_contiguous()


def refused(message, *arguments, **options):
    for _ in range(2):
        try:
            two_stream_decode(*arguments, **options)
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(message)


refused("scale=-1.0", *own, *caches, scale=-1.0)
refused("v_cache must be", *own, caches[0], caches[1][:, :, :5])
refused("isn't differentiable", own[0].clone().requires_grad_(), *own[1:], *caches)
with torch.no_grad():
    two_stream_decode(own[0].clone().requires_grad_(), *own[1:], *caches)
print("faked: ok")
