"""A block that is read ahead is the one read then, and no bit changes."""

from __future__ import annotations

import os
import threading

import pytest
import torch

import diffusionblocks as db
import small
from diffusionblocks.noise.partition import step_levels

CPU = torch.device("cpu")
waiting = pytest.mark.parametrize("offload", ["cpu", "disk"])


def trained(tmp_path, offload="disk", *, kind="labels", slots=1):
    """Return a trainer of three blocks, each of which has had its turn."""
    model = small.model(kind, blocks=3, layers=3)
    trainer = db.Trainer(
        model, device="cpu", visit=1, offload=offload, folder=tmp_path / "waiting", ema=0.9, slots=slots
    )
    trainer.fit(small.Loader(kind), steps=6, progress=False)
    return trainer


def scrambled(tmp_path, offload="disk", slots=1):
    """Return an offloader all of whose tensors hold numbers of their own, and a copy of them."""
    trainer = trained(tmp_path, offload, slots=slots)
    for part in trainer.offloader.parts:
        tensors = trainer.offloader.tensors(part)
        floats = {name: torch.rand_like(t) if t.is_floating_point() else t for name, t in tensors.items()}
        trainer.offloader.load(part, floats)
    return trainer.offloader, small.everything(trainer)


def test_a_prefetched_block_is_read_beside_the_active_one_and_changes_no_bit(tmp_path, monkeypatch):
    offloader, expected = scrambled(tmp_path, slots=2)
    offloader.activate(0)
    read, gate = [], threading.Event()
    preadv = os.preadv

    def slow(*args):
        assert gate.wait(5)
        read.append(threading.current_thread())
        return preadv(*args)

    monkeypatch.setattr(os, "preadv", slow)
    for block in (1, 2):
        gate.clear()
        offloader.prefetch(block)
        offloader.prefetch(block)  # asked for once
        assert offloader.active is not None and offloader.model.blocks[offloader.active].layers[0] is not None
        gate.set()
        offloader.activate(block)
        tensors = offloader.tensors(f"block_{block}")
        assert all(torch.equal(t, expected[f"block_{block}/{name}"]) for name, t in tensors.items())
    assert len(read) == 2 and threading.main_thread() not in read
    offloader.activate(1)
    assert len(read) == 2, "the one before is still in its slot"


def test_with_one_slot_nothing_is_read_ahead(tmp_path, monkeypatch):
    offloader, _ = scrambled(tmp_path)
    offloader.activate(0)
    monkeypatch.setattr(os, "preadv", None)
    offloader.prefetch(1)
    offloader.activate(0)


@waiting
@pytest.mark.parametrize("slots", [1, 2])
def test_a_prefetched_block_is_what_was_loaded_since_and_another_may_come_first(tmp_path, offload, slots):
    offloader, _ = scrambled(tmp_path, offload, slots)

    def filled(block, value):
        tensors = offloader.tensors(f"block_{block}")
        return {n: torch.full_like(t, value) if t.is_floating_point() else t for n, t in tensors.items()}

    def is_filled(block, value):
        tensors = offloader.tensors(f"block_{block}").values()
        return all((t == value).all() for t in tensors if t.is_floating_point())

    offloader.activate(0)
    offloader.prefetch(1)
    offloader.load("block_1", filled(1, 7))
    offloader.activate(1)
    assert is_filled(1, 7)
    offloader.prefetch(0)
    offloader.activate(2)
    for t in offloader.tensors("block_2").values():
        t.data.fill_(8)
    offloader.activate(0)
    offloader.activate(2)
    assert is_filled(2, 8) and is_filled(1, 7)


@waiting
@pytest.mark.parametrize("kind", small.KINDS)
def test_a_trajectory_with_prefetching_is_the_same(tmp_path, offload, kind):
    trainer = trained(tmp_path, offload, kind=kind, slots=2)
    x, _ = small.batch(kind, size=4)
    found = []
    for prefetch in (False, True, True):
        with trainer.averages():
            z = trainer.model.target.start(4, 1.0, seed=1, device=CPU)
            read = db.Sampler(trainer.model, x, prefetch=prefetch)
            found.append([read(z, sigma) for sigma in step_levels(trainer.model.partition, 6)[:-1]])
    for other in found[1:]:
        assert all(
            torch.equal(a, b) for one, two in zip(found[0], other, strict=True) for a, b in zip(one, two, strict=True)
        )
