"""Run by test_total_norm.py on a fake GPU: launches of a norm, and plans in a CUDA graph's capture."""

import sys

import torch

import fake_gpu

gpu = fake_gpu.activate()
import dbkernels  # noqa: E402
from dbkernels.triton import total_norm as kernels  # noqa: E402

sys.modules["dbkernels.total_norm"].direct = lambda *tensors: True  # the package's attribute is the function
tensors = [torch.zeros(20_000), torch.zeros(3, 3), torch.zeros(5).bfloat16()]
norm = dbkernels.total_norm(tensors)
assert norm.dim() == 0 and norm.dtype == torch.float32
assert gpu.launches() == 3  # one for each dtype, and the sum

dbkernels.total_norm(tensors[:2])
assert gpu.launches() == 2 and len(kernels._plans) == 2
assert dbkernels.total_norm([]) == 0 and gpu.launches() == 0

kernels.capturing = lambda device: True
dbkernels.total_norm(tensors)
assert gpu.launches() == 3 and len(kernels._plans) == 2
print("faked: ok")
