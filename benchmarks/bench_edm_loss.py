"""edm_loss with the gradient of F: eager PyTorch, torch.compile, ours, on the outputs of models.

python benchmarks/bench_edm_loss.py [--device cuda] [--quick] [--out FOLDER]; --help names the rest

Loss and gradient are clocked together: ours finds both in one pass. "ours, z drawn" draws z again instead of reading
it. "sample" is followed by a mean over the samples, as in a trainer, so that the upstream factor is 1/B.

The cases "noise and loss" clock what a training step of continuous targets does beside its network, which gets c_in·z.
"ours, z kept" writes z, multiplies it by c_in in another pass and takes the loss of z; "ours" writes c_in·z alone, by
inject_noise(sigma_data=), and takes the loss of that, by edm_loss(z_scaled=True).
"""

import harness
import torch
from timing import Call

import dbkernels

CPU_SHAPES = {"ViT-S 64x197x384": (64, 197, 384), "DiT-L/2 32x256x1024": (32, 256, 1024),
              "Llama-768 8x1024x768": (8, 1024, 768), "4096-wide 2x1024x4096": (2, 1024, 4096),
              "digits 128x17x64": (128, 17, 64)}  # fmt: skip
GPU_SHAPES = {"64x1024x1024": (64, 1024, 1024), "128x197x384": (128, 197, 384)}
IMAGES = {"images 64x3x64x64": (64, 3, 64, 64)}
TINY = (2, 4, 64)
SIGMA_DATA = 0.5
# float32: a few roundings, and the sum's; bfloat16: the gradient is rounded once.
UNITS = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-7}


def per_sample(sigma, x):
    """Return sigma (B,) as (B, 1, ...), to broadcast over x."""
    return sigma.view(-1, *[1] * (x.dim() - 1))


def c_in(sigma, x):
    """Return EDM's 1 / sqrt(sigma² + sigma_data²), to broadcast over x."""
    return (per_sample(sigma, x).square() + SIGMA_DATA**2).rsqrt()


def eager(F, z, y, sigma, reduction):
    """Compute the loss as one would write it: arithmetic in float32."""
    level = per_sample(sigma, y)
    total = level.square() + SIGMA_DATA**2
    target = (y.float() - SIGMA_DATA**2 / total * z.float()) * (total.sqrt() / (level * SIGMA_DATA))
    square = (F.float() - target).square()
    return square.mean() if reduction == "mean" else square.flatten(1).mean(1)


def ours(F, z, y, sigma, reduction):
    seed = {} if z is not None else {"seed": 3}
    return dbkernels.edm_loss(F, z, y, sigma, sigma_data=SIGMA_DATA, reduction=reduction, **seed)


def definition(F, z, y, sigma, reduction):
    return dbkernels.edm_loss_reference(F, z, y, sigma, SIGMA_DATA, reduction, 3)


def step(op, F, *arguments):
    """Return the loss and the gradient of F."""
    loss = op(F, *arguments)
    return loss.detach(), *torch.autograd.grad(loss.mean(), F)


def case(shape, reduction, dtype, bench, drawn=False):
    F, y = torch.randn(2, *shape, device=bench.device).to(dtype)
    F = F.clone().requires_grad_()
    sigma = torch.rand(shape[0], device=bench.device) + 0.1
    z = None if drawn else dbkernels.inject_noise(y, sigma, seed=3)
    ops = {"ours, z drawn": ours} if drawn else {"eager": eager} | bench.compiled(eager) | {"ours": ours}
    contenders = {name: lambda op=op: Call(lambda: step(op, F, z, y, sigma, reduction)) for name, op in ops.items()}

    def exact():
        wide = [None if t is None else t.detach().double() for t in (z, y, sigma)]
        return step(definition, F.detach().double().requires_grad_(), *wide, reduction)

    # F, y and z, if it isn't drawn, are read, the gradient is written
    return harness.Case(contenders, {"both": (3 if drawn else 4) * F.nbytes}, exact, UNITS[dtype])


def z_kept(F, y, sigma):
    """Return c_in·z, which the network gets, and the loss of z."""
    z = dbkernels.inject_noise(y, sigma, seed=3)
    return (z * c_in(sigma, z)).to(y.dtype), ours(F, z, y, sigma, "sample")


def z_scaled(F, y, sigma):
    """Return c_in·z, and the loss of it."""
    z = dbkernels.inject_noise(y, sigma, sigma_data=SIGMA_DATA, seed=3)
    return z, dbkernels.edm_loss(F, z, y, sigma, sigma_data=SIGMA_DATA, reduction="sample", z_scaled=True)


def noise_and_loss(shape, dtype, bench):
    F, y = torch.randn(2, *shape, device=bench.device).to(dtype)
    F = F.clone().requires_grad_()
    sigma = torch.rand(shape[0], device=bench.device) + 0.5  # at less the rounding of a bfloat16 z is all that shows

    def step(op, F, y, sigma):
        z, loss = op(F, y, sigma)
        return z, loss.detach(), *torch.autograd.grad(loss.mean(), F)

    ops = {"ours, z kept": z_kept, "ours": z_scaled}
    contenders = {name: lambda op=op: Call(lambda: step(op, F, y, sigma)) for name, op in ops.items()}

    def exact():
        return step(z_kept, F.detach().double().requires_grad_(), y.double(), sigma.double())

    # y is read and c_in·z written; F, c_in·z and y are read, the gradient is written
    return harness.Case(contenders, {"both": 6 * F.nbytes}, exact, UNITS[dtype])


def main(arguments=None):
    bench = harness.Bench("edm_loss", harness.options(__doc__, arguments))
    dtypes = (torch.float32,) if bench.options.quick else (torch.bfloat16, torch.float32)
    for name, shape in bench.pick(cpu=CPU_SHAPES, gpu=GPU_SHAPES, quick={"tiny": TINY}).items():
        for dtype in dtypes:
            for reduction in ("mean", "sample"):
                given = shape, reduction, dtype, bench
                for drawn in (False, True):
                    bench.kernels(f"{name} {reduction}", dtype, lambda g=given, drawn=drawn: case(*g, drawn))
    for name, shape in bench.pick(cpu=IMAGES, gpu=IMAGES, quick={"tiny": TINY}).items():
        for dtype in dtypes:
            bench.kernels(f"{name} noise and loss", dtype, lambda g=(shape, dtype, bench): noise_and_loss(*g))
    bench.host("tiny 2x4x64 mean", dtypes[0], lambda: case(TINY, "mean", dtypes[0], bench))
    bench.finish()


if __name__ == "__main__":
    main()
