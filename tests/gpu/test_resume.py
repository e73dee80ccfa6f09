"""A checkpoint goes on to the same bits on the device it was written on, and opens on any other."""

from __future__ import annotations

import pytest
import torch

import diffusionblocks as db
import small
from diffusionblocks.training.state import load_averages

MIDDLE, END = 7, 14  # in the middle of a visit of three steps
every_kind = pytest.mark.parametrize("kind", small.KINDS)


def trainer(kind, device, folder, **settings):
    settings = {"offload": "cpu", "precision": "float32", **settings}
    model = small.model(kind, blocks=3, layers=3)
    return db.Trainer(model, device=str(device), steps=40, visit=3, ema=0.9, folder=folder / "waiting", **settings)


def trained(made, kind, until):
    """Train and return the losses."""
    losses = []
    while made.steps_done < until:
        losses.append(float(made.step(*small.batch(kind, made.steps_done)).loss))
    return losses


def tensors(made):
    return {name: t.cpu() for name, t in small.everything(made).items()}


def same(a, b):
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


@every_kind
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_training_ends_with_the_same_bits(kind, precision, tmp_path, device, repeatable):
    whole = trainer(kind, device, tmp_path / "whole", precision=precision)
    losses = trained(whole, kind, END)
    half = trainer(kind, device, tmp_path / "half", precision=precision)
    trained(half, kind, MIDDLE)
    half.save(tmp_path / "checkpoint", extra={"seconds": 1.5})
    back = trainer(kind, device, tmp_path / "back", precision=precision)
    assert back.load(tmp_path / "checkpoint") == {"seconds": 1.5} and back.steps_done == MIDDLE
    assert trained(back, kind, END) == losses[MIDDLE:]
    assert same(whole, back)
    assert not whole.meter or torch.equal(whole.meter.sums, back.meter.sums)


@pytest.mark.parametrize("kind", ["labels", "tokens"])
@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_a_checkpoint_of_the_cpu_goes_on_on_a_device_and_back(kind, offload, tmp_path, device):
    there = trainer(kind, "cpu", tmp_path / "cpu")
    trained(there, kind, MIDDLE)
    folder = tmp_path / "checkpoint"
    there.save(folder)
    back = trainer(kind, device, tmp_path / "device", offload=offload)
    back.load(folder)
    assert same(there, back), "nothing is rounded on the way"
    assert all(loss > 0 for loss in trained(back, kind, END))
    back.save(folder)
    home = trainer(kind, "cpu", tmp_path / "home")
    home.load(folder)
    assert home.steps_done == END and same(back, home)


@every_kind
def test_averages_are_opened_on_a_device(kind, tmp_path, device):
    made = trainer(kind, device, tmp_path / "made")
    trained(made, kind, END)
    made.save(tmp_path / "checkpoint")
    model = small.model(kind, blocks=3, layers=3, seed=1)
    load_averages(db.Offloader(model, device=device, offload="cpu"), tmp_path / "checkpoint")
    x, _ = small.batch(kind, size=4)
    expected = db.sample(made.model, x.to(device), steps=4)
    found = db.sample(model, x.to(device), steps=4)
    assert found.device.type == device.type and torch.equal(found, expected)
