"""One step of one block, with the ops and with plain PyTorch in their place: time, and the bytes saved for backward.

python benchmarks/bench_training_step.py [--device cuda] [--threads N] [--seconds S] [--out FOLDER]
"""

import contextlib
from dataclasses import replace
from unittest import mock

import harness
import torch
import torch.nn.functional as functional

import dbkernels
from diffusionblocks.adapters.vit import vit_blocks
from diffusionblocks.memory import SavedTensors
from diffusionblocks.models import ViTConfig
from diffusionblocks.optim import PartOptimizer, clip_gradients

CASES = {
    "vit-digits, block of 2, batch 32": (ViTConfig(), 3, 32),
    "ViT 12 x 384, block of 4, batch 32": (
        ViTConfig(image_size=28, patch=4, dim=384, layers=12, heads=6, mlp=1536, cond=96),
        3,
        32,
    ),
}


def plain_inject_noise(y, sigma, *, sigma_data=None, seed, offset=0):
    return y + sigma.view(-1, *[1] * (y.dim() - 1)) * torch.randn_like(y)


def plain_ada_layer_norm(x, shift=None, scale=None, *, weight=None, bias=None, eps=1e-6):
    out = functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return out if shift is None else out * (1 + scale) + shift


def plain_gated_residual_norm(x, branch, gate, shift, scale, *, weight=None, bias=None, eps=1e-6, norm="layer"):
    h = x + gate * branch
    return h, plain_ada_layer_norm(h, shift, scale, weight=weight, bias=bias, eps=eps)


class PlainOptimizer:
    """torch's fused AdamW and an average by lerp, in PartOptimizer's place."""

    def __init__(self, named_parameters):
        self.params = [p for _, p in named_parameters]
        self.adamw = torch.optim.AdamW(self.params, fused=True)
        self.emas = [p.detach().clone() for p in self.params]

    def step(self, lr):
        self.adamw.step()
        self.adamw.zero_grad()
        torch._foreach_lerp_(self.emas, [p.detach() for p in self.params], 0.01)


PLAIN = {
    "inject_noise": plain_inject_noise,
    "ada_layer_norm": plain_ada_layer_norm,
    "gated_residual_norm": plain_gated_residual_norm,
}


def step_of(config, blocks, batch, device, plain):
    """A call that makes one training step of block 0, and one that says what its forward pass saves, in bytes."""
    model = vit_blocks(config, blocks).to(device)
    make = PlainOptimizer if plain else lambda named: PartOptimizer(named, ema_decay=0.99)
    optimizers = [make(model.parts()[part].named_parameters()) for part in ("shared", "block_0")]
    x = torch.randn(batch, config.channels, config.image_size, config.image_size, device=device)
    y = torch.randint(config.classes, (batch,), device=device)
    ops = mock.patch.multiple(dbkernels, **PLAIN) if plain else contextlib.nullcontext()

    def forward():
        with ops:
            return model.loss(0, x, y, seed=0, step=1).loss

    def step():
        forward().backward()
        clip_gradients(optimizers, 1.0)
        for optimizer in optimizers:
            optimizer.step(1e-3)

    def saved():
        with SavedTensors(model.parameters()).count() as counter:
            forward()
        return counter.bytes

    return step, saved


def check(config, device):
    """The same loss with and without, at the same noise."""
    model = vit_blocks(replace(config, layers=2), 1).to(device)
    x = torch.randn(4, config.channels, config.image_size, config.image_size, device=device)
    losses = []
    plain_norms = mock.patch.multiple(dbkernels, **PLAIN | {"inject_noise": dbkernels.inject_noise})
    for ops in (contextlib.nullcontext(), plain_norms):
        with ops:
            losses.append(model.loss(0, x, torch.arange(4, device=device), seed=0, step=0).loss)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)


def main():
    options = harness.options(__doc__)
    rows, notes = [], [options.note] if options.note else []
    for case, (config, blocks, batch) in CASES.items():
        check(config, options.device)
        contenders = {}
        for name, plain in (("eager", True), ("ours", False)):
            contenders[name], saved = step_of(config, blocks, batch, options.device, plain)
            kept = saved()
            notes.append(f"{case}: {name} keeps {kept / 2**20:.2f} MiB for backward")
            print(notes[-1])
        # What ours keeps is written once and read once: a floor for the traffic of a step.
        rows += harness.measure(case, torch.float32, contenders, 2 * kept, options.device, options.seconds)
    harness.save("training_step", rows, options.device, options.out, "; ".join(notes))


if __name__ == "__main__":
    main()
