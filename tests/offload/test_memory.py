"""Bytes: of storages, of what a step saves for its backward pass, as text."""

from __future__ import annotations

import pytest
import torch

import diffusionblocks as db
import small
from diffusionblocks.checkpoint.layout import PAGE
from diffusionblocks.offload.memory import (
    CATEGORIES,
    SavedTensors,
    Usage,
    allocated,
    count_bytes,
    parse_bytes,
    readable,
)

CPU = torch.device("cpu")


def test_a_storage_counts_once_and_only_on_its_device():
    base = torch.zeros(100)
    tensors = [base, base[10:], base.view(10, 10).T, torch.zeros(3, dtype=torch.float64), torch.zeros(9, device="meta")]
    assert count_bytes(tensors, CPU) == 424
    assert count_bytes(iter(tensors), torch.device("cuda")) == 0


def test_what_backward_needs_is_counted_without_weights():
    weight, x = torch.randn(5, 5, requires_grad=True), torch.randn(7, 5)
    with SavedTensors([weight]).count() as saved:
        h = (x @ weight).sin()  # saves x, and x @ weight
        out = (h * h).sum()  # saves h, once
    out.backward()
    assert saved.bytes == 3 * 7 * 5 * 4 and weight.grad is not None


def test_nothing_is_kept_alive_afterwards():
    saved = SavedTensors([])
    with saved.count():
        torch.randn(9, requires_grad=True).sin()
    assert saved.bytes == 36 and not saved._seen


def test_usage_is_by_category():
    usage = Usage({"weights": 3, "moments": 4}, allocated=9)
    assert usage.total == 7 and usage.with_(activations=5).by_category == {"weights": 3, "moments": 4, "activations": 5}
    assert usage.by_category == {"weights": 3, "moments": 4}


@pytest.mark.parametrize("offload", [None, "disk"])
def test_a_trainers_memory_is_of_what_is_on_the_device(tmp_path, offload):
    model = small.model(blocks=4)
    trainer = db.Trainer(model, device="cpu", offload=offload, folder=tmp_path, visit=1)
    trainer.fit(small.Loader(), steps=4, progress=False)
    usage = trainer.memory()
    assert usage.by_category.keys() <= set(CATEGORIES)
    resident = [
        model.parts()["shared"],
        *(model.blocks if offload is None else [model.blocks[trainer.offloader.active]]),
    ]
    trained = sum(p.numel() for module in resident for p in module.parameters() if p.requires_grad)
    frozen = sum(t.numel() for module in resident for t in [*module.buffers(), *module.parameters()]) - trained
    optimizers = len(resident)
    buffers = usage.by_category["buffers"]
    assert usage.by_category == {
        "weights": 4 * (trained + frozen), "gradients": 0, "moments": 8 * trained + 8 * optimizers,
        "averages": 4 * trained, "buffers": buffers,
    }  # fmt: skip
    assert buffers == 0 if offload is None else buffers < PAGE, "the rest of a slot: what aligns it"
    assert usage.allocated == usage.reserved > usage.total, "the host's peak resident set"


def test_the_hosts_peak_grows_with_what_is_used():
    before = allocated(CPU)[0]
    held = torch.ones(before // 4 + (64 << 20) // 4)  # more than the peak so far
    assert allocated(CPU)[0] > before and held[0] == 1


@pytest.mark.parametrize(("text", "count"), [
    ("24GiB", 24 << 30), ("512MB", 512_000_000), ("1e9", 10**9), ("1.5 KiB", 1536), ("3b", 3), (" 2 kb ", 2000),
])  # fmt: skip
def test_bytes_are_parsed(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "0", "3 TB", "1e999", "nan", "two MB", " ", "24G", "inf", "0.4"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="memory must be like 24GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(("count", "text"), [
    (0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (-2048, "-2.0 KiB"), (3 << 20, "3.0 MiB"),
    (5000 << 30, "5000.0 GiB"),
])  # fmt: skip
def test_bytes_are_readable(count, text):
    assert readable(count) == text
