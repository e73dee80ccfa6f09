"""sample_sigma: the truncated log-normal by inverse distribution function; eager PyTorch, torch.compile, ours, at a
batch's and a token grid's sizes. No backward: noise levels have no gradient.

python benchmarks/bench_sample_sigma.py [--device cuda] [--quick] [--out FOLDER]; --help names the rest
"""

import harness
import torch
from timing import Call

import dbkernels
from dbkernels.sample_sigma import plan

CPU_SHAPES = {"a level a sample, 64": (64,), "a level a sample, 512": (512,), "digits 128x17": (128, 17),
              "Llama 8x1024": (8, 1024), "ViT-S 64x197": (64, 197)}  # fmt: skip
GPU_SHAPES = {"Llama 8x1024": (8, 1024), "2^24": (2**24,)}
TINY = (64,)
RANGE, P_MEAN, P_STD = (0.2, 0.7), -1.2, 1.2
UNIT = 2.0**-23  # rounded once


def eager(shape, device, below, inside):
    """As one would write it: quantiles of uniforms in float64, for the tails' digits, and the result in float32."""
    q = below + torch.rand(shape, device=device, dtype=torch.float64) * inside
    return (P_MEAN + P_STD * torch.special.ndtri(q)).exp().clamp(*RANGE).float()


def case(shape, bench):
    device, p = bench.device, plan(*RANGE, P_MEAN, P_STD)
    ops = {"eager": eager} | bench.compiled(eager)
    contenders = {name: lambda op=op: Call(lambda: op(shape, device, p.below, p.inside)) for name, op in ops.items()}
    contenders["ours"] = lambda: Call(lambda: dbkernels.sample_sigma(RANGE, shape, seed=3, device=device))

    def exact():
        return [dbkernels.sample_sigma_reference(RANGE, shape, P_MEAN, P_STD, 3, 0, device).double()]

    moved = {"both": 4 * torch.Size(shape).numel()}
    # others draw other levels
    return harness.Case(contenders, moved, exact, UNIT, checked={"ours": contenders["ours"]})


def main(arguments=None):
    bench = harness.Bench("sample_sigma", harness.options(__doc__, arguments))
    for name, shape in bench.pick(cpu=CPU_SHAPES, gpu=GPU_SHAPES, quick={"tiny": TINY}).items():
        bench.kernels(name, torch.float32, lambda shape=shape: case(shape, bench))
    bench.host("tiny 64", torch.float32, lambda: case(TINY, bench))
    bench.finish()


if __name__ == "__main__":
    main()
