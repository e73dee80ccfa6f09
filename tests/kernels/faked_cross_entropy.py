"""Run by test_cross_entropy_rows_triton.py on a fake GPU: how many kernels few rows launch."""

import sys

import torch

import dbkernels
import fake_gpu

gpu = fake_gpu.activate(*(sys.modules[f"dbkernels.{name}"] for name in ("_few_rows", "_edm_loss")))
torch.set_num_threads(1)
h, weight = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
target = torch.randint(16, (4,))


def ours():
    return dbkernels.denoising_cross_entropy(h, weight, target)


def without_graph(op):
    with torch.no_grad():
        return op()


def both_ways(op):
    return torch.autograd.grad(op(), (h, weight))


def launches(call):
    call()
    gpu.launches()
    call()
    return gpu.launches()


assert launches(lambda: without_graph(ours)) == 1, "one kernel beside the product and the sum"
assert launches(lambda: both_ways(ours)) == 3, "and one a gradient, which returns at once where upstream is 1"
print("faked: ok")
