"""edm_loss, forward and backward: eager PyTorch, torch.compile, ours, on the outputs of four models.

python benchmarks/bench_edm_loss.py [--device cuda] [--threads N] [--seconds S] [--out FOLDER]

"drawn" is ours with z drawn again instead of read. "sample" is followed by a mean over the samples, as in the trainer.
"""

import harness
import torch

import dbkernels

SHAPES = {"ViT-S 64x197x384": (64, 197, 384), "DiT-L/2 32x256x1024": (32, 256, 1024),
          "Llama-768 8x1024x768": (8, 1024, 768), "4096-wide 2x1024x4096": (2, 1024, 4096),
          "digits 128x17x64": (128, 17, 64)}  # fmt: skip
SIGMA_DATA = 0.5


def eager(F, z, y, sigma, reduction):
    """As one would write it: arithmetic in float32."""
    level = sigma.view(-1, 1, 1)
    total = level.square() + SIGMA_DATA**2
    target = (y.float() - SIGMA_DATA**2 / total * z.float()) * (total.sqrt() / (level * SIGMA_DATA))
    square = (F.float() - target).square()
    return square.mean() if reduction == "mean" else square.flatten(1).mean(1)


def ours(F, z, y, sigma, reduction):
    return dbkernels.edm_loss(F, z, y, sigma, sigma_data=SIGMA_DATA, reduction=reduction)


def drawn(F, z, y, sigma, reduction):
    return dbkernels.edm_loss(F, None, y, sigma, sigma_data=SIGMA_DATA, reduction=reduction, seed=3)


def step(op, F, *arguments):
    """Loss and the gradient of F."""
    loss = op(F, *arguments)
    return loss.detach(), *torch.autograd.grad(loss.mean(), F)


def check(F, z, y, sigma, reduction):
    """Loss and gradient of F against the definition in float64, which the tests hold to the paper's formula."""
    exact = F.detach().double().requires_grad_()
    coarse = 2.0**-7 if F.dtype == torch.bfloat16 else 2.0**-20
    for op, source, seed in ((ours, z.double(), 0), (drawn, None, 3)):
        exact.grad = None
        expected = dbkernels.edm_loss_reference(exact, source, y.double(), sigma.double(), SIGMA_DATA, reduction, seed)
        expected.mean().backward()
        loss, grad = step(op, F, z, y, sigma, reduction)
        assert ((loss - expected).abs() <= 2.0**-18 * expected).all(), f"{op.__name__}: wrong loss, no timing"
        error = (grad.double() - exact.grad).abs()
        assert (error <= coarse * exact.grad.abs().max()).all(), f"{op.__name__}: wrong gradient, no timing"


def main():
    options = harness.options(__doc__)
    device, rows = options.device, []
    for case, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            F, y = torch.randn(2, *shape, device=device).to(dtype)
            F = F.clone().requires_grad_()
            sigma = torch.rand(shape[0], device=device) + 0.1
            z = dbkernels.inject_noise(y, sigma, seed=3)
            for reduction in ("mean", "sample"):
                check(F, z, y, sigma, reduction)
                torch._dynamo.reset()
                ops = {"eager": eager, "compile": torch.compile(eager, dynamic=False), "ours": ours, "drawn": drawn}
                contenders = {
                    name: lambda op=op, F=F, z=z, y=y, s=sigma, r=reduction: step(op, F, z, y, s, r)
                    for name, op in ops.items()
                }
                rows += harness.measure(f"{case} {reduction}", dtype, contenders, 4 * F.nbytes, device, options.seconds)
    harness.save("edm_loss", rows, device, options.out, options.note)


if __name__ == "__main__":
    main()
