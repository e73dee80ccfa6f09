"""Slots and stores against a dict: whatever comes in whatever order, no bit is lost, and no address moves."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from diffusionblocks.checkpoint.layout import Layout
from diffusionblocks.checkpoint.parts import Stored, write_part
from diffusionblocks.offload import disk_store, host_store, lanes
from diffusionblocks.offload.disk_store import DiskStore
from diffusionblocks.offload.host_store import HostStore
from diffusionblocks.offload.lanes import Lanes
from diffusionblocks.offload.slots import Slots

CPU = torch.device("cpu")
NAMES = [f"block_{i}" for i in range(4)]
stores = pytest.mark.parametrize("place", ["cpu", "disk"])
counts = pytest.mark.parametrize("count", [1, 2])


def make_store(place, folder):
    none = Lanes.of(CPU)
    return HostStore(none, pin=False) if place == "cpu" else DiskStore(Path(folder), none, pin=False)


def tensors_of(seed, size=1500):
    """Return tensors of uneven sizes, so that a part takes several pieces and its last one isn't whole."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight/w": torch.randn(size + 13 * (seed % 3), generator=generator),
        "exp_avg/w": torch.randn(7, 11, generator=generator).double(),
        "next_step/w": torch.tensor(seed),
    }


def slots_of(place, folder, count, names=NAMES):
    made = Slots(count, CPU, make_store(place, folder))
    expected = {}
    for seed, name in enumerate(names):
        expected[name] = tensors_of(seed)
        made.put(name, expected[name])
    return made, expected


def equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(t, expected[name]) for name, t in found.items())


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Pieces so small that each part takes several."""
    for module in (lanes, host_store, disk_store):
        monkeypatch.setattr(module, "CHUNK", 4096)


@stores
@counts
def test_slots_never_move(tmp_path, place, count):
    """Over a thousand visits in any order: captured work finds its tensors."""
    slots, expected = slots_of(place, tmp_path, count)
    for name in NAMES:
        slots.bring(name)
    addresses = {slot.buffer.data_ptr() for slot in slots._slots}
    generator = torch.Generator().manual_seed(0)
    for step in range(300 if place == "disk" else 1000):
        name = NAMES[int(torch.randint(len(NAMES), (), generator=generator))]
        views = slots.bring(name)
        assert views["weight/w"].untyped_storage().data_ptr() in addresses
        views["weight/w"].add_(1)
        expected[name]["weight/w"] = expected[name]["weight/w"] + 1
        slots.touch(name)
        slots.prefetch(NAMES[step % len(NAMES)])
    assert {slot.buffer.data_ptr() for slot in slots._slots} == addresses and len(addresses) == count
    assert all(equal(slots.get(name), expected[name]) for name in NAMES)


@stores
@counts
def test_uneven_parts_share_slots_of_the_largest(tmp_path, place, count):
    slots = Slots(count, CPU, make_store(place, tmp_path))
    expected = {f"block_{i}": tensors_of(i, size) for i, size in enumerate((10, 5000, 800))}
    for name, tensors in expected.items():
        slots.put(name, tensors)
    largest = max(layout.nbytes for layout in slots.layouts.values())
    for name in (*expected, *reversed(expected)):
        assert equal(slots.bring(name), expected[name])
    assert [slot.buffer.numel() for slot in slots._slots] == [largest] * count
    slots.put("block_0", tensors_of(9, 9000))  # optimizer state was made
    assert equal(slots.bring("block_0"), tensors_of(9, 9000)) and equal(slots.get("block_1"), expected["block_1"])


@stores
def test_what_has_not_changed_is_not_written(tmp_path, place, monkeypatch):
    slots, expected = slots_of(place, tmp_path, 1)
    slots.bring("block_0")
    monkeypatch.setattr(os, "pwrite", None)
    for name in NAMES:
        slots.bring(name)["weight/w"].zero_()  # untold: dropped
    assert equal(slots.get("block_0"), expected["block_0"])


@stores
@counts
def test_a_checkpoint_is_written_from_a_slot_or_linked_to_the_store(tmp_path, place, count):
    slots, expected = slots_of(place, tmp_path / "store", count)
    (tmp_path / "saved").mkdir()
    slots.bring("block_0")["weight/w"].add_(1)
    slots.touch("block_0")
    for name in ("block_0", "block_1"):
        source = slots.source(name)
        assert isinstance(source, Stored) == (place == "disk" and name == "block_1")
        record = write_part(tmp_path / "saved" / f"{name}.safetensors", lambda source=source: source)
        if isinstance(source, Stored):
            assert os.path.samefile(source.path, tmp_path / "saved" / f"{name}.safetensors")
            assert record.size == source.path.stat().st_size
    saved = (tmp_path / "saved" / "block_1.safetensors").read_bytes()
    slots.bring("block_1")["weight/w"].add_(1)
    slots.touch("block_1")
    slots.retire("block_1")
    assert (tmp_path / "saved" / "block_1.safetensors").read_bytes() == saved, "a linked file is never written again"
    assert torch.equal(slots.get("block_1")["weight/w"], expected["block_1"]["weight/w"] + 1)


def changed_slots(folder, count):
    """Return slots on disk that all hold parts which differ from their files."""
    slots, expected = slots_of("disk", folder, count)
    for name in NAMES[:count]:
        slots.bring(name)["weight/w"].add_(1)
        slots.touch(name)
        expected[name]["weight/w"] = expected[name]["weight/w"] + 1
    return slots, expected


def full(*_):
    raise OSError(errno.ENOSPC, "no space left on device")


@counts
def test_a_full_disk_keeps_the_part_in_its_slot(tmp_path, count, monkeypatch):
    slots, expected = changed_slots(tmp_path, count)
    write = os.pwrite
    for call in (lambda: slots.bring("block_3"), lambda: slots.retire("block_0"), lambda: slots.put("block_2", {})):
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="no space"):
            call()
        monkeypatch.setattr(os, "pwrite", write)
        assert all(equal(slots.get(name), expected[name]) for name in NAMES)
    assert equal(slots.bring("block_3"), expected["block_3"])
    assert all(equal(slots.get(name), expected[name]) for name in NAMES)


@counts
@pytest.mark.parametrize("after", [0, 1])
def test_a_disk_that_fills_up_in_the_middle_of_a_file_leaves_the_old_one(tmp_path, count, after, monkeypatch):
    slots, expected = slots_of("disk", tmp_path, count)
    slots.bring("block_0")["weight/w"].add_(1)
    slots.touch("block_0")
    expected["block_0"]["weight/w"] = expected["block_0"]["weight/w"] + 1
    write, calls = os.pwrite, []

    def filling(*args):
        calls.append(args)
        return full() if len(calls) > after else write(*args)

    monkeypatch.setattr(os, "pwrite", filling)
    with pytest.raises(OSError, match="no space"):
        slots.retire("block_0")
    monkeypatch.setattr(os, "pwrite", write)
    assert not list(tmp_path.glob("*.tmp*")) and all(equal(slots.get(name), expected[name]) for name in NAMES)


@counts
def test_a_read_that_fails_loses_nothing(tmp_path, count, monkeypatch):
    slots, expected = changed_slots(tmp_path, count)
    read = os.preadv

    def failing(*args):
        raise OSError(errno.EIO, "input/output error")

    for prefetch in (False, True):
        monkeypatch.setattr(os, "preadv", failing)
        with pytest.raises(OSError, match=r"input/output error.*block_3"):
            if prefetch:
                slots.prefetch("block_3")
            slots.bring("block_3")
        monkeypatch.setattr(os, "preadv", read)
        assert all(equal(slots.get(name), expected[name]) for name in NAMES)
    assert equal(slots.bring("block_3"), expected["block_3"])


def test_a_file_that_was_cut_off_is_an_error_by_name(tmp_path):
    slots, _ = slots_of("disk", tmp_path, 1)
    os.truncate(tmp_path / "block_2.safetensors", 6000)
    for call in (slots.bring, slots.get):
        with pytest.raises(OSError, match=r"ends too early.*block_2"):
            call("block_2")


def test_large_files_go_past_the_page_cache_where_that_can_be(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_store, "DIRECT", 4096)
    opened, open_ = [], os.open

    def watched(path, flags, *mode):
        opened.append(flags & os.O_DIRECT)
        if refuse and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "invalid argument")
        return open_(path, flags, *mode)

    monkeypatch.setattr(os, "open", watched)
    for refuse in (False, True):
        folder = tmp_path / str(refuse)
        slots, expected = slots_of("disk", folder, 2)
        assert all(equal(slots.bring(name), expected[name]) for name in NAMES) and any(opened)
        assert all(equal(slots.get(name), expected[name]) for name in NAMES)


class AnyOrder(RuleBasedStateMachine):
    """Bring, prefetch, change, retire, replace and read parts in any order, against a dict."""

    place = "cpu"

    @initialize(count=st.sampled_from([1, 2]))
    def start(self, count):
        self.folder = tempfile.TemporaryDirectory()
        self.slots, self.expected = slots_of(self.place, self.folder.name, count)
        self.active, self.seed = None, 10

    @rule(name=st.sampled_from(NAMES))
    def bring(self, name):
        assert equal(self.slots.bring(name), self.expected[name])
        self.active = name

    @rule(name=st.sampled_from(NAMES))
    def prefetch(self, name):
        self.slots.prefetch(name)

    @precondition(lambda self: self.active and self.slots.holds(self.active))
    @rule()
    def train(self):
        views = self.slots.bring(self.active)
        views["weight/w"].mul_(0.5).add_(1)
        self.expected[self.active]["weight/w"] = self.expected[self.active]["weight/w"] * 0.5 + 1
        self.slots.touch(self.active)

    @rule(name=st.sampled_from(NAMES))
    def retire(self, name):
        self.slots.retire(name)

    @rule(name=st.sampled_from(NAMES), size=st.sampled_from([1500, 1500, 40]))
    def replace(self, name, size):
        self.seed += 1
        self.expected[name] = tensors_of(self.seed, size)
        self.slots.put(name, self.expected[name])

    @rule(name=st.sampled_from(NAMES))
    def read(self, name):
        assert equal(self.slots.get(name), self.expected[name])

    @rule(name=st.sampled_from(NAMES))
    def save(self, name):
        source = self.slots.source(name)
        if isinstance(source, Stored):
            assert source.path.exists()
        else:
            assert equal(source, self.expected[name])

    def teardown(self):
        if hasattr(self, "slots"):
            assert all(equal(self.slots.get(name), self.expected[name]) for name in NAMES)
            self.slots.close()
            assert not list(Path(self.folder.name).glob("*.safetensors"))
            self.folder.cleanup()


class AnyOrderOnDisk(AnyOrder):
    """The same with files."""

    place = "disk"


BRIEF = settings(max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
TestAnyOrder, TestAnyOrderOnDisk = AnyOrder.TestCase, AnyOrderOnDisk.TestCase
TestAnyOrder.settings = TestAnyOrderOnDisk.settings = BRIEF


def test_layouts_of_equal_blocks_share_their_views(tmp_path):
    slots = Slots(1, CPU, make_store("cpu", tmp_path))
    for name in NAMES[:2]:
        slots.put(name, tensors_of(0))
    assert slots.layouts[NAMES[0]] is slots.layouts[NAMES[1]] and slots.layouts[NAMES[0]] == Layout.of(tensors_of(0))
    assert slots.bring(NAMES[0])["weight/w"] is slots.bring(NAMES[1])["weight/w"]
