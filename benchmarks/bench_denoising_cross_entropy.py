"""denoising_cross_entropy with its gradients: F.linear + F.cross_entropy (eager, compiled), PyTorch's own
linear_cross_entropy in chunks and, on a GPU, Liger's and cut-cross-entropy. Then the posterior readout.

python benchmarks/bench_denoising_cross_entropy.py [--device cuda] [--quick] [--out FOLDER]; --help names the rest

Loss and gradients are clocked together, since some find them in one pass. TFLOP/s count the three products: 6·rows·V·d.
"""

import harness
import torch
import torch.nn.functional as functional
from timing import Call

import dbkernels

# rows, width, vocabulary
CPU_CASES = {
    "characters 8192x256, V 256": (8192, 256, 256),
    "words 2048x256, V 32k": (2048, 256, 32000),
    "4096-wide 256x4096, V 32k": (256, 4096, 32000),
    "Llama-768 128x768, V 256k": (128, 768, 256000),
}
GPU_CASES = {
    "Llama-768 16384x768, V 32k": (16384, 768, 32000),
    "4096-wide 8192x4096, V 128k": (8192, 4096, 128256),
    "characters 65536x256, V 256": (65536, 256, 256),
}
QUICK = {"tiny 64x32, V 100": (64, 32, 100)}
CHECKED = 512  # rows
# of the largest gradient: float32 sums over a vocabulary; bfloat16 rounds logits, probabilities and gradients
UNITS = {torch.float32: 2.0**-14, torch.bfloat16: 2.0**-6}


def eager(h, weight, target):
    return functional.cross_entropy(functional.linear(h, weight).float(), target)


def torchs(h, weight, target):
    """Return PyTorch's op with options, since without them it computes all logits; older versions lack it."""
    return functional.linear_cross_entropy(h, weight, target, options=torch.nn.LinearCrossEntropyOptions())


def liger(h, weight, target):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(h, weight, target)


def cut(preset):
    """Return cut-cross-entropy, which skips gradients that are small beside bfloat16's last place unless "exact"."""

    def op(h, weight, target):
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(h, weight, target, impl=preset)

    return op


def readout_eager(h, weight, target, z, table, sigma):
    logits = functional.linear(h, weight).float()
    evidence = functional.linear(z, table).float() - table.float().square().sum(-1) / 2
    return functional.cross_entropy(logits + evidence / sigma.square().unsqueeze(1), target)


def readout_ours(h, weight, target, z, table, sigma):
    return dbkernels.denoising_cross_entropy(h, weight, target, posterior=(z, table, sigma))


def plain_wide(h, weight, target):
    return functional.cross_entropy(h @ weight.T, target)


def readout_wide(h, weight, target, z, table, sigma):
    evidence = z @ table.T - table.square().sum(-1) / 2
    return functional.cross_entropy(h @ weight.T + evidence / sigma.square().unsqueeze(1), target)


def call_of(op, h, weight, *rest):
    def run():
        loss = op(h, weight, *rest)
        return loss.detach(), *torch.autograd.grad(loss, (h, weight))

    return Call(run)


def inputs(rows, width, vocabulary, dtype, device, readout):
    h = torch.randn(rows, width, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, device=device) / width**0.5).to(dtype).requires_grad_()
    target = torch.randint(vocabulary, (rows,), device=device)
    if not readout:
        return [h, weight, target]
    table = functional.normalize(torch.randn(vocabulary, width, device=device), dim=-1).to(dtype)
    sigma = torch.rand(rows, device=device) + 0.3
    z = (table[target] + sigma.unsqueeze(1) * torch.randn(rows, width, device=device)).to(dtype)
    return [h, weight, target, z, table, sigma]


def some_rows(given):
    """Return the same input with fewer rows, enough to check."""
    few = slice(0, CHECKED)
    h, weight, target, *rest = given
    few_h = h[few].detach().requires_grad_()
    if not rest:
        return [few_h, weight, target[few]]
    z, table, sigma = rest
    return [few_h, weight, target[few], z[few], table, sigma[few]]


def contenders(bench, readout):
    if readout:
        return {"ours": readout_ours, "eager": readout_eager} | bench.compiled(readout_eager)
    found = {"ours": dbkernels.denoising_cross_entropy, "eager": eager, "torch": torchs} | bench.compiled(eager)
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        del found["torch"]
    if bench.device.type == "cuda":
        found |= {"liger": liger, "cce": cut("cce"), "cce, exact": cut("cce_exact")}
    return found


def case(sizes, dtype, bench, readout):
    rows, width, vocabulary = sizes
    given = inputs(*sizes, dtype, bench.device, readout)
    few = some_rows(given)
    ops = contenders(bench, readout)
    made = {name: lambda op=op: call_of(op, *given) for name, op in ops.items()}
    # compiled, it is eager's function: to compile it for fewer rows as well would only take time
    checked = {name: lambda op=op: call_of(op, *few) for name, op in ops.items() if not name.startswith("compile")}

    def exact():
        h, weight, *rest = (t.detach().double() if t.is_floating_point() else t for t in few)
        leaves = h.requires_grad_(), weight.requires_grad_()
        return call_of(readout_wide if readout else plain_wide, *leaves, *rest).results()

    moved = {"both": 2 * (given[0].nbytes + given[1].nbytes)}
    flop = {"both": 6 * rows * vocabulary * width}
    return harness.Case(made, moved, exact, UNITS[dtype], flop, checked)


def main(arguments=None):
    bench = harness.Bench("denoising_cross_entropy", harness.options(__doc__, arguments))
    on_gpu = bench.device.type == "cuda"
    halves, full = torch.bfloat16, torch.float32
    dtypes = (full,) if bench.options.quick else (halves,) if on_gpu else (full, halves)
    for dtype in dtypes:
        for name, sizes in bench.pick(cpu=CPU_CASES, gpu=GPU_CASES, quick=QUICK).items():
            if not on_gpu and dtype == halves and sizes[2] > 1000:
                continue  # without instructions for it, PyTorch's bfloat16 products take some 15 s a call here
            bench.kernels(name, dtype, lambda s=sizes, d=dtype: case(s, d, bench, False))
            if sizes[1] <= 256:
                bench.kernels(f"{name}, readout", dtype, lambda s=sizes, d=dtype: case(s, d, bench, True))
    bench.host("tiny 64x32, V 100", dtypes[0], lambda: case((64, 32, 100), dtypes[0], bench, False))
    bench.finish()


if __name__ == "__main__":
    main()
