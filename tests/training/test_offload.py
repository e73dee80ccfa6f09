"""Only the active block is there: counted in bytes, and nothing is lost on the way."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

import tiny
from diffusionblocks.experiments.metrics.classification import walk
from diffusionblocks.experiments.session import train
from diffusionblocks.noise.partition import step_levels
from diffusionblocks.sampling.sampler import Walker
from diffusionblocks.training import offload as module
from diffusionblocks.training.memory import count_bytes
from diffusionblocks.training.offload import Residency

CPU = torch.device("cpu")


def bytes_of(module: torch.nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


@pytest.mark.parametrize("shared", ["shared", "per_block", "frozen"])
def test_only_the_active_block_and_the_shared_part_hold_bytes(tmp_path, shared):
    session = tiny.session(tiny.config(tmp_path, shared=shared))
    residency = session.residency
    whole = {part: bytes_of(module) for part, module in residency.parts.items()}
    assert whole["block_0"] == whole["block_1"] == 0, "waiting blocks must hold nothing"
    for block in (0, 2, 1):
        residency.activate(block)
        held = {part: bytes_of(module) for part, module in residency.parts.items()}
        assert [part for part, n in held.items() if n] == ["shared", f"block_{block}"]
        usage = residency.usage().by_category
        assert usage["weights"] == held["shared"] + held[f"block_{block}"]
        trained = sum(p.numel() for part in ("shared", f"block_{block}") for p in session.optimizers[part].params)
        assert (usage["moments"], usage["averages"], usage["gradients"]) == (8 * trained, 4 * trained, 0)


def test_no_tensor_in_the_process_belongs_to_a_waiting_block(tmp_path):
    gc.collect()
    before = {id(o) for o in gc.get_objects() if isinstance(o, torch.Tensor)}
    session = tiny.session(tiny.config(tmp_path, shared="per_block"))
    train(session, tiny.RandomBatches(), on_log=lambda row: None, on_step=lambda: None)
    gc.collect()
    mine = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and id(o) not in before]
    counted = count_bytes(mine, CPU)
    usage = session.residency.usage().total
    # beside weights, moments and averages: the meter, the codebook's knots, the last batch
    assert usage <= counted < 1.5 * usage
    one_block = bytes_of(session.model.blocks[session.residency.active])
    assert counted < usage + 4 * one_block, "the state of a second block would add four times its weights"


def test_a_block_comes_back_bit_for_bit(tmp_path):
    session = tiny.session(tiny.config(tmp_path))
    session.residency.activate(1)
    for t in session.residency.tensors("block_1").values():
        t.data.copy_(torch.randn_like(t))
    before = {name: t.detach().clone() for name, t in session.residency.tensors("block_1").items()}
    session.residency.activate(0)
    on_disk = session.residency.tensors("block_1")
    session.residency.activate(1)
    for name, t in session.residency.tensors("block_1").items():
        assert torch.equal(t, before[name]) and torch.equal(on_disk[name], before[name]), name


def test_averages_swap_in_and_out(tmp_path):
    session = tiny.session(tiny.config(tmp_path))
    residency = session.residency
    residency.activate(0)
    for block in (0, 1):
        residency.activate(block)
        for ema in session.optimizers[f"block_{block}"].emas:
            ema.fill_(block + 5.0)
    plain = {p: {n: t.clone() for n, t in residency.tensors(p).items()} for p in residency.parts}
    with residency.averages():
        for block in (1, 0, 1):
            residency.activate(block)
            assert all((p == block + 5.0).all() for p in session.optimizers[f"block_{block}"].params)
    for part, tensors in plain.items():
        for name, t in residency.tensors(part).items():
            assert torch.equal(t, tensors[name]), f"{part} {name}"


def test_using_a_waiting_block_says_so(tmp_path):
    session = tiny.session(tiny.config(tmp_path))
    x, y = tiny.RandomBatches().batch(0)
    with pytest.raises(ValueError, match="block 1 is not resident"):
        session.model.loss(1, x, y, seed=0, step=0)


def test_errors_name_the_argument(tmp_path):
    session = tiny.session(tiny.config(tmp_path))
    with pytest.raises(ValueError, match="store must be"):
        Residency(session.model, device="cpu", store="cloud")
    with pytest.raises(ValueError, match="needs a folder"):
        Residency(session.model, device="cpu", store="disk")
    with pytest.raises(ValueError, match="no block 7"):
        session.residency.activate(7)
    tensors = session.residency.tensors("block_0")
    with pytest.raises(ValueError, match="does not fit this model"):
        session.residency.load("block_0", {**tensors, "weight/other": torch.zeros(1)})


def test_host_store_keeps_waiting_blocks_usable_as_data(tmp_path):
    session = tiny.session(tiny.config(tmp_path, store="host"))
    session.residency.activate(0)
    assert all(t.device == CPU and t.numel() for t in session.residency.tensors("block_2").values())


def test_a_prefetched_block_is_read_beside_the_active_one_and_changes_no_bit(tmp_path, monkeypatch):
    session = tiny.session(tiny.config(tmp_path))
    residency, threads = session.residency, []
    for b in (1, 2):
        residency.activate(b)
        for t in residency.tensors(f"block_{b}").values():
            t.data.copy_(torch.randn_like(t))
    plain = {part: {n: t.clone() for n, t in residency.tensors(part).items()} for part in residency.parts}
    residency.activate(0)
    load = module.load_file
    monkeypatch.setattr(
        module, "load_file", lambda *a, **k: threads.append(threading.current_thread()) or load(*a, **k)
    )
    for b in (1, 2):
        residency.prefetch(b)
        residency.prefetch(b)  # asked for once
        residency.activate(b)
        assert all(torch.equal(t, plain[f"block_{b}"][n]) for n, t in residency.tensors(f"block_{b}").items())
    assert len(threads) == 2 and threading.main_thread() not in threads
    residency.activate(0)
    assert threads.pop() is threading.main_thread()


def test_a_prefetched_block_is_what_was_loaded_since_and_another_may_come_first(tmp_path):
    session = tiny.session(tiny.config(tmp_path))
    residency = session.residency
    residency.activate(0)
    residency.prefetch(1)
    residency.load("block_1", {n: torch.full_like(t, 7) for n, t in residency.tensors("block_1").items()})
    residency.activate(1)
    assert all((t == 7).all() for t in residency.tensors("block_1").values())
    residency.prefetch(0)
    residency.activate(2)
    for t in residency.tensors("block_2").values():
        t.data.fill_(8)
    residency.activate(0)
    residency.activate(2)
    assert all((t == 8).all() for t in residency.tensors("block_2").values())
    with pytest.raises(ValueError, match="no block 9"):
        residency.prefetch(9)


@pytest.mark.parametrize("store", ["host", "disk"])
def test_a_walk_with_prefetching_is_the_same_walk(tmp_path, store):
    session = tiny.session(tiny.config(tmp_path, store=store))
    x, _ = tiny.RandomBatches(4).batch(0)
    levels = step_levels(session.model.partition, 6)
    train(session, tiny.RandomBatches(), on_log=lambda row: None, on_step=lambda: None)
    walks = []
    for prefetch in (False, True, True):
        with session.residency.averages():
            walks.append(walk(Walker(session.model, session.residency, prefetch=prefetch), x, levels))
    for other in walks[1:]:
        assert all(torch.equal(a["logits"], b["logits"]) for a, b in zip(walks[0], other, strict=True))
