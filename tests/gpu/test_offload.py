"""Blocks that wait on the host or on disk come back to the device bit for bit, read ahead or not."""

from __future__ import annotations

import pytest
import torch

import diffusionblocks as db
import small
from diffusionblocks.offload.memory import count_bytes

waiting = pytest.mark.parametrize("offload", ["cpu", "disk"])


def trainer(tmp_path, device, offload, kind="images", **settings):
    settings = {"visit": 1, "ema": 0.9, "folder": tmp_path / "waiting", **settings}
    return db.Trainer(small.model(kind, blocks=3, layers=3), device=str(device), offload=offload, **settings)


def scrambled(tmp_path, device, offload, **settings):
    """Return a trainer whose blocks, moments and averages hold numbers of their own, and copies of them."""
    made = trainer(tmp_path, device, offload, **settings)
    made.fit(small.Loader("images"), steps=3, progress=False)
    generator = torch.Generator().manual_seed(3)
    for part in made.offloader.parts:
        values = made.offloader.tensors(part)
        made.offloader.load(part, {
            name: torch.randn(t.shape, generator=generator).to(t.dtype) if t.is_floating_point() else t
            for name, t in values.items()
        })  # fmt: skip
    return made.offloader, everything(made.offloader)


def everything(offloader):
    tensors = {f"{part}/{name}": t for part in offloader.parts for name, t in offloader.tensors(part).items()}
    return {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}


def same(offloader, expected):
    found = everything(offloader)
    return found.keys() == expected.keys() and all(torch.equal(t, expected[name]) for name, t in found.items())


def live(offloader, part):
    return offloader.parts[part].tensors()


@waiting
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_offloaded_blocks_come_back_bit_for_bit(tmp_path, device, offload, precision):
    offloader, expected = scrambled(tmp_path, device, offload, precision=precision)
    for block in (0, 2, 1, 0, 1):
        offloader.activate(block)
        for part in offloader.parts:
            there = {t.device.type for t in live(offloader, part).values()}
            assert there == {device.type if part in ("shared", f"block_{block}") else "cpu"}, part
        assert same(offloader, expected)
    offloader.retire()
    assert same(offloader, expected)


@waiting
@pytest.mark.parametrize("slots", [1, 2])
def test_the_device_holds_the_shared_part_and_the_slots(tmp_path, device, offload, slots):
    offloader, _ = scrambled(tmp_path, device, offload, slots=slots)
    for block in (1, 0, 2):
        offloader.activate(block)
    resident = [*live(offloader, "shared").values(), *live(offloader, f"block_{block}").values()]
    held = [*resident, *offloader._slots.buffers]
    assert offloader.usage().total == count_bytes(held, device)
    if device.type == "cuda":
        largest = max(layout.nbytes for layout in offloader._slots.layouts.values())
        assert sum(b.numel() for b in offloader._slots.buffers if b.is_cuda) == slots * largest


@waiting
@pytest.mark.parametrize("slots", [1, 2])
def test_slots_never_move_and_copies_wait_for_the_work_before_them(tmp_path, device, offload, slots):
    """Each visit changes all numbers by kernels that are still running when the block leaves."""
    offloader, expected = scrambled(tmp_path, device, offload, slots=slots)
    work, addresses, added = torch.randn(1024, 1024, device=device), set(), [0, 0, 0]
    for visit in range(60):
        block = (visit * 7) % 3
        offloader.activate(block)
        offloader.prefetch((block + 1) % 3)
        tensors = live(offloader, f"block_{block}")
        addresses.add(min(t.data_ptr() for t in tensors.values() if t.device == device))
        for _ in range(4 if device.type == "cuda" else 0):
            work = torch.tanh(work @ work)  # what the change waits for
        change = 1 + 0 * work[0, 0].nan_to_num()
        for name, t in tensors.items():
            if name.startswith(("weight/", "exp_avg/")) and t.dtype == torch.float32:
                t.data.add_(change)
        added[block] += 1
    assert len(addresses) <= slots
    for block, count in enumerate(added):
        for name, t in offloader.tensors(f"block_{block}").items():
            if name.startswith(("weight/", "exp_avg/")) and t.dtype == torch.float32:
                start = expected[f"block_{block}/{name}"]
                for _ in range(count):
                    start = start + 1
                assert torch.equal(t.cpu(), start), name


@pytest.mark.parametrize("pin", [True, False])
def test_host_buffers_are_page_locked_where_asked_for(tmp_path, device, pin):
    made = trainer(tmp_path, device, "cpu", pin=pin)
    buffers = made.offloader._slots.store.buffers
    assert len(buffers) == 3
    if device.type == "cuda":
        assert all(b.is_pinned() == pin for b in buffers)


@waiting
@pytest.mark.parametrize("slots", [1, 2])
def test_training_in_slots_is_training_with_all_resident(tmp_path, device, repeatable, offload, slots):
    results = []
    for place, count in ((None, 1), (offload, slots)):
        made = trainer(tmp_path / str(place), device, place, "labels", visit=2, slots=count, precision="bfloat16")
        made.fit(small.Loader(), steps=14, progress=False)
        results.append(everything(made.offloader))
    assert all(torch.equal(t, results[1][name]) for name, t in results[0].items())


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@waiting
def test_torchs_optimizers_go_with_their_blocks(tmp_path, device, offload, name):
    made = trainer(tmp_path, device, offload, optimizer={
        "SGD": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9),
        "AdamW": lambda params: torch.optim.AdamW(params, 0.01),
    }[name])  # fmt: skip
    made.fit(small.Loader("images"), steps=6, progress=False)
    made.model.activate(1)
    for part in made.offloader.parts:
        resident = part in ("shared", "block_1")
        for key, t in live(made.offloader, part).items():
            on_host = key.startswith("step/") or not resident
            assert t.device.type == ("cpu" if on_host else device.type), key
    assert made.offloader.load("block_1", made.offloader.tensors("block_1")) is None
    made.fit(made.loader, steps=9, progress=False)


@waiting
def test_a_block_read_ahead_is_the_one_read_then(tmp_path, device, offload):
    offloader, expected = scrambled(tmp_path, device, offload, slots=2)
    offloader.activate(0)
    work = torch.randn(512, 512, device=device)
    for block in (1, 2, 0, 2, 1):
        offloader.prefetch(block)
        for _ in range(8):
            work = torch.tanh(work @ work)  # what the copy runs beside
        offloader.activate(block)
        at_once = {name: t.detach() * 2 for name, t in offloader.tensors(f"block_{block}").items()}
        assert all(torch.equal(t.cpu(), expected[f"block_{block}/{name}"] * 2) for name, t in at_once.items())
        assert same(offloader, expected)
    offloader.prefetch(2)
    offloader.activate(0)  # another than was asked for
    assert same(offloader, expected)


@waiting
def test_averages_swap_in_and_out_wherever_blocks_wait(tmp_path, device, offload):
    offloader, expected = scrambled(tmp_path, device, offload)
    averages = [key for key in expected if "/ema/" in key]
    with offloader.averages():
        for block in (0, 2):
            offloader.prefetch(block)
            offloader.activate(block)
            weights = dict(offloader.parts[f"block_{block}"].module.named_parameters())
            for name, p in weights.items():
                assert torch.equal(p.cpu(), expected[f"block_{block}/ema/{name}"])
        gathered = offloader.weights()
        assert {t.device.type for t in gathered.values()} == {"cpu"}
        own = [key for key in averages if key.startswith("block_1/")]  # one that waits
        assert own and all(torch.equal(gathered["blocks.1." + key[12:]], expected[key]) for key in own)
    assert same(offloader, expected)


def test_training_with_prefetch_between_visits_changes_no_bit(tmp_path, device, repeatable):
    results = []
    for prefetch in (False, True):
        made = trainer(tmp_path / str(prefetch), device, "cpu", "labels", visit=2, slots=2)
        if prefetch:
            activate = made.offloader.activate

            def ahead(block, made=made, activate=activate):
                made.offloader.prefetch(block)
                activate(block)
                made.offloader.prefetch((block + 1) % 3)  # the right one or not

            made.offloader.activate = ahead
        made.fit(small.Loader(), steps=12, progress=False)
        results.append(everything(made.offloader))
    assert all(torch.equal(t, results[1][name]) for name, t in results[0].items())


@waiting
def test_release_brings_all_to_the_host(tmp_path, device, offload):
    offloader, expected = scrambled(tmp_path, device, offload)
    offloader.activate(1)
    offloader.release()
    found = {f"{part}/{name}": t for part in offloader.parts for name, t in live(offloader, part).items()}
    assert all(t.device.type == "cpu" and torch.equal(t, expected[name]) for name, t in found.items())
    model = offloader.model.to(device)
    assert db.sample(model, torch.arange(3, device=device), steps=3).device.type == device.type
