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
import diffusionblocks as db
from diffusionblocks.experiments.models import ViTConfig
from diffusionblocks.experiments.tasks.vit import vit_blocks
from diffusionblocks.offload.memory import SavedTensors
from diffusionblocks.training.optimizer import BlockAdamW

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


IMAGES = {"outside the network, (64, 3, 64, 64)": (64, 3, 64, 64)}
UNIT = 1e-4  # of the loss: float32 sums in another order


class PlainOptimizers:
    """torch's clipping and fused AdamW, and an average by lerp, in BlockAdamW's place."""

    def __init__(self, parts):
        self.params = [p for part in parts for p in part if p.requires_grad]
        self.adamw = torch.optim.AdamW(self.params, fused=True)
        self.emas = [p.detach().clone() for p in self.params]

    def step(self):
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.adamw.step()
        self.adamw.zero_grad()
        torch._foreach_lerp_(self.emas, [p.detach() for p in self.params], 0.01)


class OurOptimizers:
    """Parts clipped by their joint norm within their steps, as Trainer does it."""

    def __init__(self, parts):
        self.adamws = [BlockAdamW([p for p in part if p.requires_grad], ema_decay=0.99) for part in parts]

    def step(self):
        norm = dbkernels.total_norm([p.grad for adamw in self.adamws for p in adamw.params() if p.grad is not None])
        for adamw in self.adamws:
            adamw.step(norm=norm, max_norm=1.0)
            adamw.zero_grad()


PLAIN = {
    "inject_noise": plain_inject_noise,
    "ada_layer_norm": plain_ada_layer_norm,
    "gated_residual_norm": plain_gated_residual_norm,
}


def step_of(config, blocks, batch, device, plain):
    """Return a call that runs one training step of block 0, and one that counts the bytes its forward pass saves."""
    model = vit_blocks(config, blocks).to(device)
    parts = [list(model.parts()[part].parameters()) for part in ("shared", "block_0")]
    optimizers = (PlainOptimizers if plain else OurOptimizers)(parts)
    x = torch.randn(batch, config.channels, config.image_size, config.image_size, device=device)
    y = torch.randint(config.num_classes, (batch,), device=device)
    ops = mock.patch.multiple(dbkernels, **PLAIN) if plain else contextlib.nullcontext()

    def forward():
        with ops:
            return model.loss(0, x, y, seed=0, step=1).loss

    def step():
        forward().backward()
        optimizers.step()

    def saved():
        with SavedTensors(model.parameters()).count() as counter:
            forward()
        return counter.bytes

    return step, saved


class Nothing(torch.nn.Module):
    """A stem, a layer and a head that cost nothing: F is a leaf, whatever z is."""

    def __init__(self, shape):
        super().__init__()
        self.F = torch.nn.Parameter(torch.randn(shape))

    def forward(self, h, *_):
        return self.F

    def features(self, h):
        return h


class NoStem(torch.nn.Module):
    def forward(self, x, z, c_noise):
        return z, None


def plain_step(model, y, sigma):
    """EDM's loss by its formulas: preconditioning, noise, weighted error."""
    s = 0.5
    level = sigma.view(-1, 1, 1, 1)
    z = y + level * torch.randn_like(y)
    root = (level**2 + s**2).sqrt()
    (z / root, sigma.log() / 4)  # the network's inputs
    D = s**2 / root**2 * z + level * s / root * model.F
    return ((level**2 + s**2) / (level * s) ** 2 * (D - y) ** 2).mean()


def outside(bench, size):
    """A training step of continuous targets but for the network: noise, preconditioning, loss and its gradient."""
    y, sigma = torch.randn(size, device=bench.device), torch.rand(size[0], device=bench.device) + 0.1
    x, nothing = torch.zeros(size[0], device=bench.device), Nothing(size).to(bench.device)
    around = db.StemHead(NoStem(), nothing)
    model = db.DiffusionBlocks(
        around, [torch.nn.Identity()], db.ContinuousTarget(), db.make_partition(db.LogNormal(), 1)
    )
    model.blocks[0].layers[0].forward = lambda h, cond: h

    def ours():
        nothing.F.grad = None
        model.loss_at(0, x, y, sigma, seed=0, step=1).loss.backward()

    def plain():
        nothing.F.grad = None
        plain_step(nothing, y, sigma).backward()

    moved = 7 * y.numel() * y.element_size()  # y read, c_in z written; F, z, y read, the gradient written and read
    return harness.Case({"eager": lambda: Call(plain), "ours": lambda: Call(ours)}, {"both": moved}, list, 1.0)


def loss_of(config, device, plain):
    """Return the loss of a fresh model at fixed noise: the same with the ops and without."""
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
    # The saved bytes are written once and read once: a floor for the traffic of a step.
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
    for name, size in bench.pick(cpu=IMAGES, gpu=IMAGES, quick={"tiny images": (2, 1, 8, 8)}).items():
        bench.kernels(name, torch.float32, lambda size=size: outside(bench, size))
    bench.finish()


if __name__ == "__main__":
    main()
