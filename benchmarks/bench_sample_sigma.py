"""sample_sigma: the truncated log-normal by inverse distribution function; eager PyTorch, torch.compile, ours, at a
batch's and a token grid's sizes. No backward: noise levels have no gradient.

python benchmarks/bench_sample_sigma.py [--device cuda] [--threads N] [--seconds S] [--out FOLDER]
"""

import harness
import torch

import dbkernels
from dbkernels.sample_sigma import plan

SHAPES = {"a level a sample, 64": (64,), "a level a sample, 512": (512,), "digits 128x17": (128, 17),
          "Llama 8x1024": (8, 1024), "ViT-S 64x197": (64, 197)}  # fmt: skip
RANGE, P_MEAN, P_STD = (0.2, 0.7), -1.2, 1.2


def eager(shape, device, below, inside):
    """As one would write it: quantiles of uniforms in float64, for the tails' digits, and the result in float32."""
    q = below + torch.rand(shape, device=device, dtype=torch.float64) * inside
    return (P_MEAN + P_STD * torch.special.ndtri(q)).exp().clamp(*RANGE).float()


def check(shape, device):
    """Ours against the definition, which the tests hold to scipy's."""
    ours = dbkernels.sample_sigma(RANGE, shape, seed=3, device=device)
    exact = dbkernels.sample_sigma_reference(RANGE, shape, P_MEAN, P_STD, 3, 0, device)
    assert ((ours - exact).abs() <= 2.0**-23 * exact).all(), "sample_sigma is wrong here: no timing"


def main():
    options = harness.options(__doc__)
    device = options.device
    p = plan(*RANGE, P_MEAN, P_STD)
    rows = []
    for case, shape in SHAPES.items():
        check(shape, device)
        torch._dynamo.reset()
        compiled = torch.compile(eager, dynamic=False)
        contenders = {
            "eager": lambda s=shape: eager(s, device, p.below, p.inside),
            "compile": lambda s=shape, run=compiled: run(s, device, p.below, p.inside),
            "ours": lambda s=shape: dbkernels.sample_sigma(RANGE, s, seed=3, device=device),
        }
        rows += harness.measure(case, torch.float32, contenders, 4 * torch.Size(shape).numel(), device, options.seconds)
    harness.save("sample_sigma", rows, device, options.out, options.note)


if __name__ == "__main__":
    main()
