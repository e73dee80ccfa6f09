"""denoising_cross_entropy, forward and backward, against F.linear + F.cross_entropy (eager, compiled), PyTorch's own
linear_cross_entropy and, on a GPU where they are installed, Liger's and cut-cross-entropy. Then the posterior readout.

python benchmarks/bench_denoising_cross_entropy.py [--device cuda] [--threads N] [--seconds S] [--out FOLDER]

TFLOP/s count the three products: 6·rows·V·d.
"""

import importlib.util

import harness
import torch
import torch.nn.functional as functional

import dbkernels

# rows, width, vocabulary
CASES = {
    "characters 8192x256, V 256": (8192, 256, 256),
    "words 2048x256, V 32k": (2048, 256, 32000),
    "4096-wide 256x4096, V 32k": (256, 4096, 32000),
    "Llama-768 128x768, V 256k": (128, 768, 256000),
}
GPU_CASES = {
    "Llama-768 16384x768, V 32k": (16384, 768, 32000),
    "Llama-768 8192x768, V 128k": (8192, 768, 128256),
    "4096-wide 8192x4096, V 128k": (8192, 4096, 128256),
    "characters 65536x256, V 256": (65536, 256, 256),
}


def eager(h, weight, target):
    return functional.cross_entropy(functional.linear(h, weight).float(), target)


def ours(h, weight, target):
    return dbkernels.denoising_cross_entropy(h, weight, target)


def pytorchs(h, weight, target):
    return functional.linear_cross_entropy(h, weight, target)


def peers(device):
    """Other libraries' fused losses on a GPU."""
    found = {}
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        found["liger"] = liger_fused_linear_cross_entropy
    if device.type == "cuda" and importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        found["cce"] = lambda h, weight, target: linear_cross_entropy(h, weight, target)
    return found


def readout_eager(h, weight, target, z, table, sigma):
    logits = functional.linear(h, weight).float()
    evidence = functional.linear(z, table).float() - table.float().square().sum(-1) / 2
    return functional.cross_entropy(logits + evidence / sigma.square().unsqueeze(1), target)


def readout_ours(h, weight, target, z, table, sigma):
    return dbkernels.denoising_cross_entropy(h, weight, target, posterior=(z, table, sigma))


def both_ways(op, h, weight, *rest):
    def call():
        loss = op(h, weight, *rest)
        return loss.detach(), *torch.autograd.grad(loss, (h, weight))

    return call


def verify(ops, h, weight, target, rest, dtype):
    """Loss and gradients against float64, on some of the rows."""
    few = slice(0, 512)
    part = [h[few].detach().requires_grad_(), weight, target[few]]
    wide = [t.detach().double().requires_grad_() for t in part[:2]] + part[2:]
    if rest:
        z, table, sigma = rest
        part += [z[few], table, sigma[few]]
        wide += [z[few].double(), table.double(), sigma[few].double()]
    exact = both_ways(readout_wide if rest else plain_wide, *wide)()
    unit = 2.0**-6 if dtype == torch.bfloat16 else 2.0**-14
    for name, op in ops.items():
        if name == "compile":  # the same as eager, but for the time it takes to compile twice
            continue
        for a, b in zip(both_ways(op, *part)(), exact, strict=True):
            assert (a.double() - b).abs().max() <= unit * b.abs().max(), f"{name} is wrong: no timing"


def plain_wide(h, weight, target):
    return functional.cross_entropy(h @ weight.T, target)


def readout_wide(h, weight, target, z, table, sigma):
    evidence = z @ table.T - table.square().sum(-1) / 2
    return functional.cross_entropy(h @ weight.T + evidence / sigma.square().unsqueeze(1), target)


def case(name, rows, width, vocabulary, dtype, options):
    device = options.device
    h = torch.randn(rows, width, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, device=device) / width**0.5).to(dtype).requires_grad_()
    target = torch.randint(vocabulary, (rows,), device=device)
    table = functional.normalize(torch.randn(vocabulary, width, device=device), dim=-1).to(dtype)
    sigma = torch.rand(rows, device=device) + 0.3
    z = (table[target] + sigma.unsqueeze(1) * torch.randn(rows, width, device=device)).to(dtype)
    flop, moved, result = 6 * rows * vocabulary * width, 2 * (h.nbytes + weight.nbytes), []
    plain = {"ours": ours, "eager": eager, **peers(device)}
    if hasattr(functional, "linear_cross_entropy"):
        plain["torch"] = pytorchs
    readout = {"ours": readout_ours, "eager": readout_eager}
    losses = [(name, plain, ())]
    if width == 256:
        losses.append((f"{name}, readout", readout, (z, table, sigma)))
    for title, ops, rest in losses:
        torch._dynamo.reset()
        ops = ops | {"compile": torch.compile(ops["eager"], dynamic=False)}
        contenders = {key: both_ways(op, h, weight, target, *rest) for key, op in ops.items()}
        verify(ops, h, weight, target, rest, dtype)
        result += harness.measure(title, dtype, contenders, moved, device, options.seconds, flop)
    return result


def main():
    options = harness.options(__doc__)
    on_gpu, rows = options.device.type == "cuda", []
    for dtype in (torch.bfloat16,) if on_gpu else (torch.float32, torch.bfloat16):
        for name, sizes in (GPU_CASES if on_gpu else CASES).items():
            # Without instructions for it, PyTorch's bfloat16 products take some 15 s a call here.
            if on_gpu or dtype == torch.float32 or sizes[2] < 1000:
                rows += case(name, *sizes, dtype, options)
    harness.save("denoising_cross_entropy", rows, options.device, options.out, options.note)


if __name__ == "__main__":
    main()
