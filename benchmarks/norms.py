"""What the benches of the modulated norms share: eager PyTorch, torch.compile, ours, and on a GPU Liger."""

import harness
import torch
import torch.nn.functional as functional
from timing import Call

import dbkernels

CPU_SHAPES = {"ViT-S 64x197x384": (64, 197, 384), "DiT-L/2 32x256x1024": (32, 256, 1024),
              "Llama-768 8x1024x768": (8, 1024, 768), "4096-wide 2x1024x4096": (2, 1024, 4096),
              "digits 128x17x64": (128, 17, 64)}  # fmt: skip
GPU_SHAPES = {"64x1024x1024": (64, 1024, 1024), "16x1024x4096": (16, 1024, 4096), "32x2048x768": (32, 2048, 768),
              "128x197x384": (128, 197, 384)}  # fmt: skip
TINY = (2, 4, 64)
# A result's error as a share of the largest value: float32 sums of a thousand terms; bfloat16 rounds the result.
UNITS = {torch.float32: 2.0**-17, torch.bfloat16: 2.0**-7}


def layer(x, shift, scale):
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def rms(x, shift, scale):
    return functional.rms_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def gated(x, branch, gate, shift, scale):
    h = x + gate * branch
    return h, layer(h, shift, scale)


def liger_norm(name, dim, dtype, device):
    """Return what Liger's users write: its modulated RMSNorm, or its LayerNorm with the modulation behind it."""
    from liger_kernel.transformers import functional as liger

    one, zero = torch.ones(dim, dtype=dtype, device=device), torch.zeros(dim, dtype=dtype, device=device)

    def rms(x, shift, scale):
        return liger.liger_modulated_rms_norm(x, None, scale, shift, 1e-6, in_place=False)

    def layer(x, shift, scale):
        return liger.liger_layer_norm(x, one, zero, 1e-6) * (1 + scale) + shift

    def gated(x, branch, gate, shift, scale):
        h = x + gate * branch
        return h, layer(h, shift, scale)

    return {"ada_layer_norm": layer, "ada_rms_norm": rms, "gated_residual_norm": gated}[name]


# Plain, ours, inputs of x's size, and tensors of that size that must be read and written once, forward and backward.
OPS = {
    "ada_layer_norm": (layer, dbkernels.ada_layer_norm, 1, (2, 3)),
    "ada_rms_norm": (rms, dbkernels.ada_rms_norm, 1, (2, 3)),
    "gated_residual_norm": (gated, dbkernels.gated_residual_norm, 2, (4, 6)),
}


def call_of(op, rows, modulation, upstream):
    """The modulation is chunks of one tensor, as from a linear layer; gradients are of all inputs."""
    parts = modulation.shape[-1] // rows[0].shape[-1]
    return Call(lambda: op(*rows, *modulation.chunk(parts, -1)), (*rows, modulation), upstream)


def case(name, shape, dtype, bench):
    plain, op, count, tensors = OPS[name]
    device = bench.device
    rows = [torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(count)]
    modulation = torch.randn(shape[0], 1, shape[-1] * (count + 1), device=device).to(dtype).requires_grad_()
    upstream = [torch.randn(shape, device=device).to(dtype) for _ in range(count)]
    inputs = rows, modulation, upstream
    contenders = {key: lambda f=f: call_of(f, *inputs) for key, f in ({"eager": plain} | bench.compiled(plain)).items()}
    contenders["ours"] = lambda: call_of(op, *inputs)
    if device.type == "cuda":
        contenders["liger"] = lambda: call_of(liger_norm(name, shape[-1], dtype, device), *inputs)

    def exact():
        *wide, last = (t.detach().double().requires_grad_() for t in (*rows, modulation))
        return call_of(plain, wide, last, [t.double() for t in upstream]).results()

    moved = {way: n * rows[0].nbytes for way, n in zip(("forward", "backward"), tensors, strict=True)}
    return harness.Case(contenders, moved, exact, UNITS[dtype])


def run(name, doc, arguments=None):
    options = harness.options(doc, arguments)
    bench = harness.Bench(name, options)
    on_gpu = options.device.type == "cuda"
    dtypes = (torch.float32,) if options.quick else (torch.bfloat16, torch.float32)
    for dtype in dtypes:
        shapes = bench.pick(cpu=CPU_SHAPES, gpu=GPU_SHAPES, quick={"tiny": TINY})
        for key, shape in shapes.items():
            if on_gpu and dtype == torch.float32 and key != next(iter(shapes)):
                continue  # a GPU's time is for halves
            bench.kernels(key, dtype, lambda shape=shape, dtype=dtype: case(name, shape, dtype, bench))
    bench.host("tiny 2x4x64", dtypes[0], lambda: case(name, TINY, dtypes[0], bench))
    bench.finish()
