"""Fine-tuning in blocks: each way of training trains what it says, and is read in all three ways."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def warm(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("warm_start")
    sys.modules.pop("warm_start", None)


@pytest.mark.parametrize("way", ["end to end", "in blocks", "in blocks, with the whole network's loss"])
def test_a_way_trains_every_block_and_lowers_what_it_trains(warm, way):
    tokens = torch.arange(4000) % 7
    before = warm.bits(warm.db.convert(warm.llama(0), 2, cond=0), tokens[:640].view(10, 64))
    model = warm.WAYS[way](warm.llama(0).train(), warm.windows(tokens, 0), 40, 3e-3, 0)  # visits are of 25 steps
    first = warm.db.convert(warm.llama(0), 2, cond=0)
    for one, other in zip(model.blocks, first.blocks, strict=True):
        assert not torch.equal(next(one.parameters()), next(other.parameters()))
    after = warm.bits(model, tokens[:640].view(10, 64))
    if way != "in blocks":
        assert after["whole"] < before["whole"]
    if way != "end to end":
        assert after["mean"] < before["mean"] and max(after["blocks"]) < max(before["blocks"])
