"""What DiffusionBlocks refuses, and by which name."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import diffusionblocks as db
import small
from diffusionblocks.blocks import DiffusionBlocks
from diffusionblocks.denoiser import StemHead
from diffusionblocks.experiments.models.vit import ViT, ViTConfig
from diffusionblocks.noise.density import LogNormal
from diffusionblocks.noise.partition import make_partition
from diffusionblocks.targets.labels import LabelTarget

CONFIG = ViTConfig(image_size=4, channels=1, num_classes=5, patch=2, dim=8, layers=5, heads=2, mlp=16, cond=4)


def around() -> StemHead:
    vit = ViT(CONFIG, conditioned=True)
    return StemHead(vit.stem, vit.head)


def make(shared: str = "shared", *, blocks: int = 3, trainable: bool = False, **options) -> DiffusionBlocks:
    copies = [around() for _ in range(blocks if shared == "per_block" else 1)]
    target = LabelTarget(5, 8)
    target.table.requires_grad_(trainable)
    partition = make_partition(LogNormal(-0.5, 1.0, 0.05, 20.0), 5, blocks)
    layers = ViT(CONFIG, conditioned=True).layers
    return DiffusionBlocks(copies, list(layers), target, partition, shared=shared, **options)


def batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, 4, 4, generator=generator), torch.arange(count) % 5


MODEL = make()
FRAME = {"seed": 0, "step": 0}


@settings(deadline=None, max_examples=60)
@given(shape=st.lists(st.integers(0, 5), max_size=5))
def test_images_of_any_other_shape_are_refused(shape):
    assume(shape != [6, 1, 4, 4])
    with pytest.raises(ValueError, match=r"images|x and y"):
        MODEL.loss(0, torch.zeros(shape), batch()[1], **FRAME)


@settings(deadline=None, max_examples=60)
@given(shape=st.lists(st.integers(0, 5), max_size=3))
def test_labels_of_any_other_shape_are_refused(shape):
    assume(shape != [6])
    with pytest.raises(ValueError, match=r"labels|x and y"):
        MODEL.loss(0, batch()[0], torch.zeros(shape, dtype=torch.int64), **FRAME)


@settings(deadline=None, max_examples=60)
@given(shape=st.lists(st.integers(0, 9), max_size=3))
def test_points_of_any_other_shape_are_refused(shape):
    assume(shape != [6, 8])
    with pytest.raises(ValueError, match=r"z must|x and z"):
        MODEL.denoise(batch()[0], torch.zeros(shape), 1.0)


X, Y = batch()
Z = torch.zeros(6, 8)
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("call", "name"),
    [
        *[(lambda b=b: MODEL.loss(b, X, Y, **FRAME), "block") for b in (-1, 3)],
        (lambda: MODEL.loss(0, X[:0], Y[:0], **FRAME), "labels"),
        (lambda: MODEL.loss(0, X[:4], Y, **FRAME), "x and y"),
        *[(lambda d=d: MODEL.loss(0, X.to(d), Y, **FRAME), "images") for d in (torch.uint8, torch.float64)],
        *[(lambda d=d: MODEL.loss(0, X, Y.to(d), **FRAME), "labels") for d in (torch.float32, torch.bool)],
        *[(lambda v=v: MODEL.loss(0, X, Y + v, **FRAME), "labels") for v in (-1, 1)],
        (lambda: MODEL.loss(0, X.to("meta"), Y, **FRAME), "x on meta"),
        *[
            (lambda s=s: MODEL.loss(0, X, Y, sigma=torch.tensor([1.0] * 5 + [s]), **FRAME), "sigma")
            for s in (0.0, -1.0, NAN, INF)
        ],
        *[
            (lambda s=s: MODEL.loss(0, X, Y, sigma=s, **FRAME), "sigma")
            for s in (
                torch.ones(5),
                torch.ones(6, 1),
                torch.tensor(1.0),
                torch.ones(6, dtype=torch.int64),
                Z[:, 0].to("meta"),
            )
        ],
        (lambda: MODEL.loss(0, X, Y, seed=-1, step=0), "seed"),
        (lambda: MODEL.loss(0, X, Y, seed=0, step=-1), "offset"),
        *[(lambda s=s: MODEL.denoise(X, Z, s), "sigma") for s in (0.0, -1.0, NAN, INF)],
        (lambda: MODEL.denoise(X, Z, 1.0, block=3), "block"),
        (lambda: MODEL.denoise(X[:3], Z, 1.0), "x and z"),
        (lambda: MODEL.denoise(X[:, :, :2], Z, 1.0), "images"),
        (lambda: MODEL.denoise(X, Z.long(), 1.0), "z must"),
        (lambda: MODEL.denoise(X.to("meta"), Z, 1.0), "x on meta"),
        (lambda: MODEL.denoise(X, Z.to("meta"), 1.0), "z on meta"),
        *[(lambda s=s: make(s, trainable=True), "codebook") for s in ("per_block", "frozen")],
        (lambda: make("separate"), "shared"),
        (lambda: make(blocks=6), "blocks"),  # B > L
        *[(lambda c=c: make(context=c), "context") for c in (-0.1, 1.1, NAN)],
        (lambda: DiffusionBlocks(around(), [], MODEL.target, MODEL.partition), "layers"),
        (
            lambda: DiffusionBlocks(
                [around()] * 2, [nn.Identity()] * 5, MODEL.target, MODEL.partition, shared="per_block"
            ),
            "StemHead",
        ),
        (
            lambda: DiffusionBlocks(
                [around()] * 3, [nn.Identity()] * 5, MODEL.target, MODEL.partition, shared="per_block"
            ),
            "StemHead of its own",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(call, name):
    with pytest.raises(ValueError, match=name):
        call()


@pytest.mark.parametrize("logits", [1, 4])
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("kind", ["labels", "tokens", "masked"])
def test_a_head_of_another_number_of_classes_is_refused(kind, linear, logits):
    model = small.model(kind)
    head = nn.Linear(8, logits)
    model.stem_head.head.head = head if linear else nn.Sequential(head)
    with pytest.raises(ValueError, match=r"one logit per class|posterior's z .* and table"):
        model.loss(0, *small.batch(kind))


def test_layers_without_parameters_train():
    class Shift(nn.Module):
        def forward(self, h, cond):
            return h + 1

    around = {"stem": nn.Linear(6, 8), "head": nn.Linear(8, 3), "target": db.LabelTarget(3, 8)}
    model = db.from_layers([Shift(), Shift()], blocks=2, dim=8, **around)
    model.loss(1, *small.batch()).loss.backward()
    assert model.stem_head.head.head.weight.grad is not None
