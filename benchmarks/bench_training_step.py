"""One step of one block, with the ops and with plain PyTorch in their place: time, and the bytes saved for backward.

python benchmarks/bench_training_step.py [--device cuda] [--quick] [--out FOLDER]; --help names the rest
"""

import contextlib
from dataclasses import replace
from unittest import mock

import harness
import torch
import torch.nn.functional as functional
from timing import Call

import dbkernels
from diffusionblocks.experiments.models import ViTConfig
from diffusionblocks.experiments.tasks.vit import vit_blocks
from diffusionblocks.training.memory import SavedTensors
from diffusionblocks.training.optimizer import PartOptimizer, clip_gradients

QUICK = {"tiny": (ViTConfig(dim=16, layers=3, heads=2, mlp=16, cond=8), 3, 4)}
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


UNIT = 1e-4  # of the loss: float32 sums in another order


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


def loss_of(config, device, plain):
    """The loss of a fresh model at one noise: the same with the ops and without."""
    torch.manual_seed(0)
    model = vit_blocks(replace(config, layers=2), 1).to(device)
    x = torch.randn(4, config.channels, config.image_size, config.image_size, device=device)
    # only the norms differ: another noise would give another loss
    norms = mock.patch.multiple(dbkernels, **PLAIN | {"inject_noise": dbkernels.inject_noise})
    with norms if plain else contextlib.nullcontext():
        return model.loss(0, x, torch.arange(4, device=device), seed=0, step=0).loss


def case(name, config, blocks, batch, bench):
    made, kept = {}, 0
    for contender, plain in (("eager", True), ("ours", False)):
        step, saved = step_of(config, blocks, batch, bench.device, plain)
        kept = saved()
        bench.note(f"{name}: {contender} keeps {kept / 2**20:.2f} MiB for backward")
        made[contender] = lambda step=step: Call(step)
    # What ours keeps is written once and read once: a floor for the traffic of a step.
    return harness.Case(
        made,
        {"both": 2 * kept},
        lambda: [loss_of(config, bench.device, True).detach().double()],
        UNIT,
        checked={"ours": lambda: Call(lambda: loss_of(config, bench.device, False))},
    )


def main(arguments=None):
    bench = harness.Bench("training_step", harness.options(__doc__, arguments))
    for name, sizes in bench.pick(cpu=CASES, gpu=CASES, quick=QUICK).items():
        bench.kernels(name, torch.float32, lambda name=name, sizes=sizes: case(name, *sizes, bench))
    bench.finish()


if __name__ == "__main__":
    main()
