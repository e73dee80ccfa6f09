"""inject_noise, forward: eager PyTorch, torch.compile, ours, on the targets of four models.

python benchmarks/bench_inject_noise.py [--device cuda] [--threads N] [--seconds S] [--out FOLDER]
"""

import harness
import torch

import dbkernels

SHAPES = {"ViT-S 64x197x384": (64, 197, 384), "DiT-L/2 32x256x1024": (32, 256, 1024),
          "Llama-768 8x1024x768": (8, 1024, 768), "4096-wide 2x1024x4096": (2, 1024, 4096),
          "digits 128x17x64": (128, 17, 64)}  # fmt: skip
SIGMA_DATA = 0.5


def eager(y, sigma):
    """As one would write it: arithmetic in float32, result in y's dtype."""
    level = sigma.view(-1, 1, 1)
    z = y.float() + level * torch.randn(y.shape, device=y.device)
    return (z * torch.rsqrt(level * level + SIGMA_DATA**2)).to(y.dtype)


def check(y, sigma):
    """Ours against the definition, which the tests hold to float64."""
    ours = dbkernels.inject_noise(y, sigma, sigma_data=SIGMA_DATA, seed=3)
    exact = dbkernels.inject_noise_reference(y.double(), sigma.double(), SIGMA_DATA, 3, 0)
    unit = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7}[y.dtype]
    assert ((ours.double() - exact).abs() <= unit * (1 + exact.abs())).all(), "inject_noise is wrong here: no timing"


def main():
    options = harness.options(__doc__)
    device = options.device
    rows = []
    for case, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            y = torch.randn(shape, device=device).to(dtype)
            sigma = torch.rand(shape[0], device=device) + 0.1
            check(y, sigma)
            torch._dynamo.reset()
            compiled = torch.compile(eager, dynamic=False)
            contenders = {
                "eager": lambda y=y, s=sigma: eager(y, s),
                "compile": lambda y=y, s=sigma, run=compiled: run(y, s),
                "ours": lambda y=y, s=sigma: dbkernels.inject_noise(y, s, sigma_data=SIGMA_DATA, seed=3),
            }
            rows += harness.measure(case, dtype, contenders, 2 * y.nbytes, device, options.seconds)
    harness.save("inject_noise", rows, device, options.out, options.note)


if __name__ == "__main__":
    main()
