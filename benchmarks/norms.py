"""What the benches of the modulated norms share: forward and backward of eager PyTorch, torch.compile, ours, and on a
GPU Liger where it is installed.
"""

import importlib.util

import harness
import torch
import torch.nn.functional as functional

import dbkernels

SHAPES = {"ViT-S 64x197x384": (64, 197, 384), "DiT-L/2 32x256x1024": (32, 256, 1024),
          "Llama-768 8x1024x768": (8, 1024, 768), "4096-wide 2x1024x4096": (2, 1024, 4096),
          "digits 128x17x64": (128, 17, 64)}  # fmt: skip


def layer(x, shift, scale):
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def rms(x, shift, scale):
    return functional.rms_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def gated(x, branch, gate, shift, scale):
    h = x + gate * branch
    return h, layer(h, shift, scale)


def liger_norm(name, dim, dtype, device):
    """What Liger's users write: its modulated RMSNorm, or its LayerNorm with the modulation behind it."""
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


# Tensors of x's size that must be read and written once, forward and backward.
OPS = {
    "ada_layer_norm": (layer, dbkernels.ada_layer_norm, 1, 2 + 3),
    "ada_rms_norm": (rms, dbkernels.ada_rms_norm, 1, 2 + 3),
    "gated_residual_norm": (gated, dbkernels.gated_residual_norm, 2, 4 + 6),
}


def both_ways(op, rows, modulation, upstream):
    """Forward, then the gradients of all inputs. The modulation is chunks of one tensor, as from a linear layer."""

    def call():
        outs = op(*rows, *modulation.chunk(modulation.shape[-1] // rows[0].shape[-1], -1))
        outs = outs if isinstance(outs, tuple) else (outs,)
        return *outs, *torch.autograd.grad(outs, (*rows, modulation), upstream[: len(outs)])

    return call


def check(ours, eager, exact, dtype):
    """Ours is as near to float64 as eager is, but for a rounding, output by output and gradient by gradient."""
    unit = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7}[dtype]
    for a, b, c in zip(ours, eager, exact, strict=True):
        errors = [(t.double() - c).abs().max() for t in (a, b)]
        assert errors[0] <= 2 * errors[1] + unit * c.abs().max(), "wrong here: no timing"


def bench(name, doc):
    options = harness.options(doc)
    plain, op, count, tensors = OPS[name]
    rows = []
    for case, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            like = dict(device=options.device)
            inputs = [torch.randn(shape, **like).to(dtype).requires_grad_() for _ in range(count)]
            modulation = torch.randn(shape[0], 1, shape[-1] * (count + 1), **like).to(dtype).requires_grad_()
            upstream = [torch.randn(shape, **like).to(dtype) for _ in range(2)]
            torch._dynamo.reset()
            contenders = {
                "eager": both_ways(plain, inputs, modulation, upstream),
                "compile": both_ways(torch.compile(plain, dynamic=False), inputs, modulation, upstream),
                "ours": both_ways(op, inputs, modulation, upstream),
            }
            if options.device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
                peer = liger_norm(name, shape[-1], dtype, options.device)
                contenders["liger"] = both_ways(peer, inputs, modulation, upstream)
            wide = [t.detach().double().requires_grad_() for t in (*inputs, modulation)]
            exact = both_ways(plain, wide[:-1], wide[-1], [t.double() for t in upstream])
            check(contenders["ours"](), contenders["eager"](), exact(), dtype)
            moved = tensors * inputs[0].nbytes
            rows += harness.measure(case, dtype, contenders, moved, options.device, options.seconds)
    harness.save(name, rows, options.device, options.out, options.note)
