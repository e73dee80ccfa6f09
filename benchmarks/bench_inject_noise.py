"""inject_noise, forward and backward: eager PyTorch, torch.compile, ours, on the targets of five models, then on rows
of normalised tables (a label's embedding, a token's).

python benchmarks/bench_inject_noise.py [--device cuda] [--threads N] [--seconds S] [--out FOLDER]
"""

import harness
import torch

import dbkernels

SHAPES = {"ViT-S 64x197x384": (64, 197, 384), "DiT-L/2 32x256x1024": (32, 256, 1024),
          "Llama-768 8x1024x768": (8, 1024, 768), "4096-wide 2x1024x4096": (2, 1024, 4096),
          "digits 128x17x64": (128, 17, 64)}  # fmt: skip
TABLES = {"digits, 128 of 10x64": ((128,), (10, 64)), "ViT-S, 64 of 1000x384": ((64,), (1000, 384)),
          "Llama-768, 8x1024 of 8192x768": ((8, 1024), (8192, 768))}  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)
SIGMA_DATA = 0.5


def eager(y, sigma):
    """As one would write it: arithmetic in float32, result in y's dtype."""
    level = sigma.view(-1, *[1] * (y.dim() - 1))
    z = y.float() + level * torch.randn(y.shape, device=y.device)
    return (z * torch.rsqrt(level * level + SIGMA_DATA**2)).to(y.dtype)


def eager_rows(indices, table, sigma):
    return eager(torch.nn.functional.normalize(table, dim=-1)[indices], sigma)


def ours(y, sigma, **options):
    return dbkernels.inject_noise(y, sigma, sigma_data=SIGMA_DATA, seed=3, **options)


def check(z, exact):
    """Ours against the definition in float64, which the tests hold to it."""
    unit = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7}[z.dtype]
    assert ((z.double() - exact).abs() <= unit * (1 + exact.abs())).all(), "inject_noise is wrong here: no timing"


def with_backward(forward, leaf, upstream):
    def call():
        z = forward()
        return z, *torch.autograd.grad(z, leaf, upstream)

    return call


def dense_rows(case, shape, dtype, device, seconds):
    y, upstream = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    sigma = torch.rand(shape[0], device=device) + 0.1
    check(ours(y, sigma), dbkernels.inject_noise_reference(y.double(), sigma.double(), SIGMA_DATA, 3, 0))
    y.requires_grad_()
    compiled = torch.compile(eager, dynamic=False)
    contenders = {
        "eager": with_backward(lambda: eager(y, sigma), y, upstream),
        "compile": with_backward(lambda: compiled(y, sigma), y, upstream),
        "ours": with_backward(lambda: ours(y, sigma), y, upstream),
    }
    # y and the upstream gradient read, z and y's gradient written.
    return harness.measure(case, dtype, contenders, 4 * y.nbytes, device, seconds)


def table_rows(case, shape, size, dtype, device, seconds):
    table = torch.randn(size, device=device).to(dtype)
    indices, sigma = torch.randint(size[0], shape, device=device), torch.rand(shape[0], device=device) + 0.1
    upstream = torch.randn(*shape, size[1], device=device).to(dtype)
    exact = dbkernels.inject_noise_table_reference(indices, table.double(), sigma.double(), SIGMA_DATA, True, 3, 0)
    check(ours((indices, table), sigma, normalize=True), exact)
    table.requires_grad_()
    compiled = torch.compile(eager_rows, dynamic=False)
    contenders = {
        "eager": with_backward(lambda: eager_rows(indices, table, sigma), table, upstream),
        "compile": with_backward(lambda: compiled(indices, table, sigma), table, upstream),
        "ours": with_backward(lambda: ours((indices, table), sigma, normalize=True), table, upstream),
    }
    # Rows and the upstream gradient read, z and the table's gradient written.
    return harness.measure(case, dtype, contenders, 3 * upstream.nbytes + table.nbytes, device, seconds)


def main():
    options = harness.options(__doc__)
    device, rows = options.device, []
    for dtype in DTYPES:
        for case, shape in SHAPES.items():
            torch._dynamo.reset()
            rows += dense_rows(case, shape, dtype, device, options.seconds)
        for case, (shape, size) in TABLES.items():
            torch._dynamo.reset()
            rows += table_rows(case, shape, size, dtype, device, options.seconds)
    harness.save("inject_noise", rows, device, options.out, options.note)


if __name__ == "__main__":
    main()
