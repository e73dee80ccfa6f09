"""inject_noise, forward and backward: eager PyTorch, torch.compile, ours, on the targets of models, then on rows of
normalised tables (a label's embedding, a token's).

python benchmarks/bench_inject_noise.py [--device cuda] [--quick] [--out FOLDER]; --help names the rest

"torch's Philox" is eager with normals by address, which torch has from 2.13.
"""

import harness
import torch
from timing import Call

import dbkernels

CPU_SHAPES = {"ViT-S 64x197x384": (64, 197, 384), "DiT-L/2 32x256x1024": (32, 256, 1024),
              "Llama-768 8x1024x768": (8, 1024, 768), "4096-wide 2x1024x4096": (2, 1024, 4096),
              "digits 128x17x64": (128, 17, 64)}  # fmt: skip
GPU_SHAPES = {"64x1024x1024": (64, 1024, 1024), "128x197x384": (128, 197, 384)}
TABLES = {"digits, 128 of 10x64": ((128,), (10, 64)), "ViT-S, 64 of 1000x384": ((64,), (1000, 384)),
          "Llama-768, 8x1024 of 8192x768": ((8, 1024), (8192, 768))}  # fmt: skip
GPU_TABLES = {"Llama-768, 32x2048 of 32000x768": ((32, 2048), (32000, 768))}
TINY, TINY_TABLE = (2, 4, 64), ((2, 4), (10, 64))
SIGMA_DATA = 0.5
# float32: 24-bit uniforms and fast logarithms; the table's gradient is a sum of rows. bfloat16 is rounded once.
UNITS = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-7}


def noised(y, sigma, eps):
    """Add noise in eager PyTorch: arithmetic in float32, result in y's dtype."""
    level = sigma.view(-1, *[1] * (y.dim() - 1))
    return ((y.float() + level * eps) * torch.rsqrt(level * level + SIGMA_DATA**2)).to(y.dtype)


def eager(y, sigma):
    return noised(y, sigma, torch.randn(y.shape, device=y.device))


def torchs_philox(y, sigma):
    key = torch.tensor([3, 0], dtype=torch.uint64, device=y.device)
    return noised(y, sigma, torch.ops.aten._philox_normal_(torch.empty(y.shape, device=y.device), key))


def eager_rows(y, sigma):
    indices, table = y
    return eager(torch.nn.functional.normalize(table, dim=-1)[indices], sigma)


def ours(y, sigma, **options):
    return dbkernels.inject_noise(y, sigma, sigma_data=SIGMA_DATA, seed=3, **options)


def ours_rows(y, sigma):
    return ours(y, sigma, normalize=True)


def on_gpu(device):
    """Return what only a GPU has: torch's normals by address, and ours of fewer rounds."""
    found = {}
    if device.type == "cuda":
        found["ours, 7 rounds"] = lambda y, sigma: ours(y, sigma, rounds=7)
    if device.type == "cuda" and hasattr(torch.ops.aten, "_philox_normal_"):
        found["torch's Philox"] = torchs_philox
    return found


def dense(shape, dtype, bench):
    device = bench.device
    y, upstream = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    sigma = torch.rand(shape[0], device=device) + 0.1
    y.requires_grad_()
    ops = {"eager": eager} | bench.compiled(eager) | {"ours": ours} | on_gpu(device)
    contenders = {name: lambda op=op: Call(lambda: op(y, sigma), [y], [upstream]) for name, op in ops.items()}

    def exact():
        wide = y.detach().double().requires_grad_()
        z = dbkernels.inject_noise_reference(wide, sigma.double(), SIGMA_DATA, 3, 0)
        return z, *torch.autograd.grad(z, wide, upstream.double())

    # y or the upstream gradient read, z or y's gradient written
    moved = {"forward": 2 * y.nbytes, "backward": 2 * y.nbytes}
    # others draw other noise
    return harness.Case(contenders, moved, exact, UNITS[dtype], checked={"ours": contenders["ours"]})


def rows(shape, size, dtype, bench):
    device = bench.device
    table = torch.randn(size, device=device).to(dtype)
    indices, sigma = torch.randint(size[0], shape, device=device), torch.rand(shape[0], device=device) + 0.1
    upstream = torch.randn(*shape, size[1], device=device).to(dtype)
    table.requires_grad_()
    ops = {"eager": eager_rows} | bench.compiled(eager_rows) | {"ours": ours_rows}
    given = indices, table
    contenders = {name: lambda op=op: Call(lambda: op(given, sigma), [table], [upstream]) for name, op in ops.items()}

    def exact():
        wide = table.detach().double().requires_grad_()
        z = dbkernels.inject_noise_table_reference(indices, wide, sigma.double(), SIGMA_DATA, True, 3, 0)
        return z, *torch.autograd.grad(z, wide, upstream.double())

    # Rows read and z written; the upstream gradient read and the table's gradient written.
    moved = {"forward": 2 * upstream.nbytes, "backward": upstream.nbytes + table.nbytes}
    return harness.Case(contenders, moved, exact, UNITS[dtype], checked={"ours": contenders["ours"]})


def main(arguments=None):
    bench = harness.Bench("inject_noise", harness.options(__doc__, arguments))
    dtypes = (torch.float32,) if bench.options.quick else (torch.bfloat16, torch.float32)
    for dtype in dtypes:
        for name, shape in bench.pick(cpu=CPU_SHAPES, gpu=GPU_SHAPES, quick={"tiny": TINY}).items():
            bench.kernels(name, dtype, lambda s=shape, d=dtype: dense(s, d, bench))
        for name, sizes in bench.pick(cpu=TABLES, gpu=GPU_TABLES, quick={"tiny table": TINY_TABLE}).items():
            bench.kernels(name, dtype, lambda s=sizes, d=dtype: rows(*s, d, bench))
    bench.host("tiny 2x4x64", dtypes[0], lambda: dense(TINY, dtypes[0], bench))
    bench.host("tiny 2x4 of 10x64", dtypes[0], lambda: rows(*TINY_TABLE, dtypes[0], bench))
    bench.finish()


if __name__ == "__main__":
    main()
