"""Blocks that wait on the host or on disk come back to the device bit for bit, read ahead or not."""

from __future__ import annotations

import pytest
import torch

import tiny_all
from diffusionblocks.sampling.sampler import Walker
from diffusionblocks.training.memory import count_bytes

stores = pytest.mark.parametrize("store", ["host", "disk"])


def scrambled(tmp_path, device, store):
    """Return a session whose blocks, moments and averages hold numbers of their own, and copies of them."""
    session = tiny_all.session(tiny_all.config("dit", tmp_path, store=store), device)
    generator = torch.Generator().manual_seed(3)
    for part in session.residency.parts:
        values = session.residency.tensors(part)
        session.residency.load(part, {name: torch.randn(t.shape, generator=generator) for name, t in values.items()})
    return session, tiny_all.tensors(session)


def same(session, expected):
    found = tiny_all.tensors(session)
    assert found.keys() == expected.keys()
    return all(torch.equal(t, expected[name]) for name, t in found.items())


@stores
def test_offloaded_blocks_come_back_bit_for_bit(tmp_path, device, store):
    session, expected = scrambled(tmp_path, device, store)
    residency = session.residency
    for block in (0, 2, 1, 0, 1):
        residency.activate(block)
        for part in residency.parts:
            there = {t.device.type for t in residency._live(part).values()}
            assert there == {device.type if part in ("shared", f"block_{block}") else "cpu"}, part
        assert same(session, expected)
    residency.retire()
    assert same(session, expected)


@stores
def test_only_one_block_is_on_the_device(tmp_path, device, store):
    session, _ = scrambled(tmp_path, device, store)
    residency = session.residency
    for block in (1, 0):
        residency.activate(block)
        mine = [*residency._live("shared").values(), *residency._live(f"block_{block}").values()]
        used = residency.usage().by_category
        if device.type == "cuda" or store == "disk":  # a host that trains holds what waits on it
            assert sum(used.values()) == count_bytes(mine, device)


@stores
def test_a_block_read_ahead_is_the_one_read_then(tmp_path, device, store):
    session, expected = scrambled(tmp_path, device, store)
    residency = session.residency
    residency.activate(0)
    work = torch.randn(512, 512, device=device)
    for block in (1, 2, 0, 2, 1):
        residency.prefetch(block)
        for _ in range(8):
            work = torch.tanh(work @ work)  # what the copy runs beside
        residency.activate(block)
        at_once = {name: t.detach() * 2 for name, t in residency.tensors(f"block_{block}").items()}
        assert all(torch.equal(t.cpu(), expected[f"block_{block}/{name}"] * 2) for name, t in at_once.items())
        assert same(session, expected)
    residency.prefetch(2)
    residency.activate(0)  # another than was asked for
    assert same(session, expected)


@stores
def test_averages_swap_in_and_out_wherever_blocks_wait(tmp_path, device, store):
    session, expected = scrambled(tmp_path, device, store)
    residency = session.residency
    with residency.averages():
        for block in (0, 2):
            residency.prefetch(block)
            residency.activate(block)
            names = session.optimizers[f"block_{block}"].names
            live = dict(residency.parts[f"block_{block}"].named_parameters())
            for name in names:
                assert torch.equal(live[name].cpu(), expected[f"block_{block}/ema/{name}"])
        gathered = residency.weights()
        assert {t.device.type for t in gathered.values()} == {"cpu"}
        for name in session.optimizers["block_1"].names:  # one that waits
            assert torch.equal(gathered[f"blocks.1.{name}"], expected[f"block_1/ema/{name}"])
    assert same(session, expected)


def test_training_with_prefetch_between_visits_changes_no_bit(tmp_path, device, repeatable):
    results = []
    for prefetch in (False, True):
        session = tiny_all.session(tiny_all.config("vit", tmp_path / str(prefetch), steps=20), device)
        if prefetch:
            activate = session.residency.activate

            def ahead(block, session=session, activate=activate):
                session.residency.prefetch(block)
                activate(block)
                session.residency.prefetch((block + 1) % 3)  # the right one or not

            session.residency.activate = ahead
        tiny_all.run(session, until=12)
        results.append(tiny_all.tensors(session))
    assert all(torch.equal(t, results[1][name]) for name, t in results[0].items())


def test_a_lent_block_leaves_the_device_again(tmp_path, device):
    session, expected = scrambled(tmp_path, device, "host")
    residency = session.residency
    residency.activate(0)
    with residency.borrowed(2):
        weights = {t.device.type for name, t in residency._live("block_2").items() if name.startswith("weight/")}
        assert weights == {device.type}
    assert same(session, expected)
    assert {t.device.type for t in residency._live("block_2").values()} == {"cpu"}
    assert Walker(session.model, residency).device == torch.device(device)
