"""two_stream_attention, forward and backward, against one sequence of 2N under a dense mask (SDPA) and, on a GPU, under
flex_attention's block mask, and for groups of one against two calls of causal flash attention, merged.

python benchmarks/bench_two_stream_attention.py [--device cuda] [--quick] [--out FOLDER]; --help names the rest

TFLOP/s count the pairs that see each other: N² + N·group_size, forward 4·D each and backward 10·D. For scale,
bench_attention.py has one causal stream. The dense mask is left out where it alone takes 1 GiB.
"""

import harness
import torch
from attention_peers import Composed, dense, dense_mask, flex
from timing import Call

import dbkernels

GROUPS = (1, 4, 32)
CPU_SIZES = [(D, N, k) for D in (64, 128) for N in (256, 1024, 4096, 16384) for k in GROUPS]
GPU_SIZES = [(D, N, k) for D in (64, 128) for N in (4096, 16384) for k in GROUPS]
QUICK_SIZES = [(16, 64, 1), (16, 64, 4)]
# flex_attention compiles for a quarter of a minute per case
FLEX = [(64, 4096, 1), (64, 4096, 4), (64, 4096, 32), (64, 16384, 4), (128, 4096, 1), (128, 4096, 32)]
FLEX_FLASH = (64, 4096, 1)
DENSE = 8192  # tokens at most
FIRST = 256  # tokens that are checked: they attend to no others
UNITS = {torch.bfloat16: 2.0**-5, torch.float32: 2.0**-16}  # bfloat16 rounds probabilities and slopes too, then sums


def ours(group_size):
    return lambda streams: dbkernels.two_stream_attention(*streams, group_size=group_size)


def first(results):
    """Return the results that are known of a sequence's first tokens: not what its clean keys get of later queries."""
    out, out_noisy, dq, dk, dv, *noisy = results
    known = [out, out_noisy, dq, *([dk, dv] if out.shape[2] <= FIRST else []), *noisy]
    return [t[:, :, :FIRST] for t in known]


def contenders(D, N, group_size, bench):
    device = bench.device
    found = {"ours": lambda: ours(group_size)}
    if N <= DENSE:
        mask = dense_mask(N, group_size, device)
        found["eager"] = lambda: lambda streams: dense(streams, mask)
    if device.type != "cuda":
        return found
    if group_size == 1:
        found["composed"] = lambda: lambda streams: Composed.apply(*streams)
    if (D, N, group_size) in FLEX:

        def make(options=None):
            op, took = flex(N, group_size, device, options)
            bench.note(f"{N} tokens, groups of {group_size}: flex_attention's block mask took {took:.2f} s")
            return op

        found["flex"] = make
        if (D, N, group_size) == FLEX_FLASH:
            found["flex, flash"] = lambda: make({"BACKEND": "FLASH"})
    return found


def case(sizes, shape, dtype, bench):
    D, N, group_size = sizes
    B, H = shape
    device = bench.device
    streams = [torch.randn(B, N, H, D, device=device).to(dtype).transpose(1, 2).requires_grad_() for _ in range(6)]
    upstream = [torch.randn(B, H, N, D, device=device).to(dtype) for _ in range(2)]
    choice = dbkernels.two_stream_choice(*streams, group_size=group_size)
    print(f"ours: forward {choice.forward}, backward {choice.backward}", flush=True)

    def call(make):
        op = make()
        return Call(lambda: op(streams), streams, upstream)

    def exact():
        n = min(FIRST, N)
        short = [t.detach()[:, :, :n].double().requires_grad_() for t in streams]
        mask = dense_mask(n, group_size, device)
        outs = Call(lambda: dense(short, mask), short, [u[:, :, :n].double() for u in upstream]).results()
        return outs if n == N else [*outs[:3], *outs[5:]]

    moved = {"forward": 4 * 2 * streams[0].nbytes, "backward": 8 * 2 * streams[0].nbytes}
    pairs = B * H * (N * N + N * group_size)
    flop = {"forward": 4 * D * pairs, "backward": 10 * D * pairs}
    made = {name: lambda make=make: call(make) for name, make in contenders(D, N, group_size, bench).items()}
    return harness.Case(made, moved, exact, UNITS[dtype], flop, pick=first)


def main(arguments=None):
    bench = harness.Bench("two_stream_attention", harness.options(__doc__, arguments))
    on_gpu = bench.device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    for sizes in bench.pick(cpu=CPU_SIZES, gpu=GPU_SIZES, quick=QUICK_SIZES):
        D, N, group_size = sizes
        B, H = bench.pick(cpu=(1, max(1, 4096 // N)), gpu=(max(1, 16384 // N), 16), quick=(1, 2))
        name = f"{B}x{H}x{N}x{D}, groups of {group_size}"
        bench.kernels(name, dtype, lambda s=sizes, BH=(B, H): case(s, BH, dtype, bench))
    tiny = 32 if on_gpu else 16
    bench.host(f"tiny 1x2x64x{tiny}, groups of 4", dtype, lambda: case((tiny, 64, 4), (1, 2), dtype, bench))
    bench.finish()


if __name__ == "__main__":
    main()
