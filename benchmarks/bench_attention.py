"""attention, forward and backward: PyTorch's by each of its backends, xformers, and ours, which takes the fastest.

python benchmarks/bench_attention.py [--device cuda] [--quick] [--out FOLDER]; --help names the rest

TFLOP/s count the pairs that see each other, forward 4·D each and backward 10·D: N² of them, half as many if causal.
The causal cases are also the scale for two_stream_attention.
"""

import harness
import torch
import torch.nn.functional as functional
from timing import Call
from torch.nn.attention import SDPBackend, sdpa_kernel

import dbkernels

# B, H, N, D, causal
CPU_CASES = {"causal 1x4x1024x64": (1, 4, 1024, 64, True), "full 8x6x197x64": (8, 6, 197, 64, False)}
GPU_CASES = {
    "causal 4x16x4096x64": (4, 16, 4096, 64, True),
    "causal 4x16x4096x128": (4, 16, 4096, 128, True),
    "causal 1x16x16384x64": (1, 16, 16384, 64, True),
    "full 64x16x256x64": (64, 16, 256, 64, False),
}
QUICK = {"tiny 1x2x32x16": (1, 2, 32, 16, True)}
TINY = (1, 2, 64, 64, True)
UNITS = {torch.bfloat16: 2.0**-5, torch.float32: 2.0**-16}  # bfloat16 rounds probabilities and slopes too, then sums
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION}  # fmt: skip


def sdpa(q, k, v, causal):
    return functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


def by(backend):
    def op(q, k, v, causal):
        with sdpa_kernel(backend):
            return sdpa(q, k, v, causal)

    return op


def xformers(q, k, v, causal):
    from xformers import ops

    bias = ops.LowerTriangularMask() if causal else None
    rows = (t.transpose(1, 2) for t in (q, k, v))
    return ops.memory_efficient_attention(*rows, attn_bias=bias).transpose(1, 2)


def ours(q, k, v, causal):
    return dbkernels.attention(q, k, v, causal=causal)


def case(sizes, dtype, bench):
    B, H, N, D, causal = sizes
    device = bench.device
    qkv = [torch.randn(B, N, H, D, device=device).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3)]
    upstream = [torch.randn(B, H, N, D, device=device).to(dtype)]
    ops = {"eager": sdpa, "ours": ours}
    if device.type == "cuda":
        ops |= {name: by(backend) for name, backend in BACKENDS.items()} | {"xformers": xformers}
    contenders = {name: lambda op=op: Call(lambda: op(*qkv, causal), qkv, upstream) for name, op in ops.items()}

    def exact():
        # one sequence and one head: float64 keeps its scores
        wide = [t.detach()[:1, :1].double().requires_grad_() for t in qkv]
        return Call(lambda: sdpa(*wide, causal), wide, [upstream[0][:1, :1].double()]).results()

    moved = {"forward": 4 * qkv[0].nbytes, "backward": 8 * qkv[0].nbytes}
    pairs = B * H * N * N / (2 if causal else 1)
    flop = {"forward": 4 * D * pairs, "backward": 10 * D * pairs}
    return harness.Case(contenders, moved, exact, UNITS[dtype], flop, pick=lambda results: [t[:1, :1] for t in results])


def main(arguments=None):
    bench = harness.Bench("attention", harness.options(__doc__, arguments))
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    for name, sizes in bench.pick(cpu=CPU_CASES, gpu=GPU_CASES, quick=QUICK).items():
        bench.kernels(name, dtype, lambda s=sizes: case(s, dtype, bench))
    bench.host("tiny 1x2x64x64", dtype, lambda: case(TINY, dtype, bench))
    bench.finish()


if __name__ == "__main__":
    main()
