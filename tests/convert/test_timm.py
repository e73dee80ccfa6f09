"""timm's vision transformers as blocks, in a process of their own, with a stub of torchvision if that is missing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

CODE = """
import importlib.machinery, importlib.util, sys, tempfile, types

class Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name

class Stub(types.ModuleType):
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})

if importlib.util.find_spec("torchvision") is None:  # timm's import needs it, its transformers don't
    for name in ("", ".datasets", ".models", ".models.feature_extraction", ".ops", ".ops.misc", ".transforms",
                 ".transforms.functional", ".utils"):
        name = "torchvision" + name
        stub = sys.modules[name] = Stub(name)
        stub.__spec__ = importlib.machinery.ModuleSpec(name, None)
        if "." in name:
            setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], stub)

import timm, torch, diffusionblocks as db

SIZES = dict(img_size=16, patch_size=8, depth=4, embed_dim=24, num_heads=2, num_classes=5)
x, y = torch.randn(6, 3, 16, 16), torch.arange(6) % 5

def network(name, **changes):
    torch.manual_seed(0)
    made = timm.create_model(name, **{**SIZES, **changes}).eval()
    with torch.no_grad():  # biases and norms that do nothing would hide a lost module
        for p in made.parameters():
            p += 0.1 * torch.randn_like(p)
    return made

def refused(words, made, **options):
    try:
        db.convert(made, 2, **options).loss(0, x[:, :, :8], y)
    except ValueError as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"not refused: {words}")

for name, changes in [("vit_tiny_patch16_224", dict(global_pool="avg")), ("deit_tiny_distilled_patch16_224", {}),
                      ("deit3_small_patch16_224", {}), ("eva02_tiny_patch14_224", {})]:
    made = network(name, **changes)
    with torch.no_grad():
        expected = made(x)
        assert expected.std() > 0.1
        torch.testing.assert_close(db.convert(made, 1, cond=0).logits(x), expected)
        model = db.convert(made, 1)
        features = model.blocks[0](x, torch.zeros(6, 24), torch.zeros(6), model.stem_head)
        torch.testing.assert_close(features.head(features.h, features.cond), expected, rtol=1e-4, atol=1e-5)
    model = db.convert(made, 2, cond=0, shared="per_block")
    trainer = db.Trainer(model, lr=1e-2, device="cpu", offload="cpu", visit=1, seed=0)
    for _ in range(4):
        trainer.step(x, y)
    model.eval()
    given = db.to_original(model, 1)
    assert type(given) is type(made) and len(given.blocks) == 2
    with torch.no_grad(), model.averages():
        torch.testing.assert_close(given(x), model.logits(x, 1))
    assert not torch.allclose(given(x), expected, atol=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert torch.equal(db.load(folder)(x), model(x))

refused("images must be 16x16, got 8x16", network("vit_tiny_patch16_224"))
refused("is no classifier", network("vit_tiny_patch16_224", num_classes=0))
refused("these differ: blocks.0.mlp", network("vit_tiny_patch16_224", mlp_ratio=2))
refused("make it by timm.create_model", timm.models.VisionTransformer(**SIZES))
made = network("vit_tiny_patch16_224")
made.set_grad_checkpointing()
refused("set_grad_checkpointing(False)", made)
"""


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm isn't installed")
def test_vision_transformers_convert_train_and_come_back():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False, env=env)
    assert run.returncode == 0, run.stderr
