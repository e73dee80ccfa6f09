"""NoProp: its walk is the posterior of its noise, its blocks are alone, and it learns."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from blobs import adapter
from diffusionblocks.experiments.baselines.noprop import NoProp, noprop

CPU = torch.device("cpu")


def test_it_learns(tmp_path):
    rows: list = []
    result = noprop(adapter(tmp_path, steps=150, lr=1e-2), CPU, on_log=rows.append)
    assert result.test["accuracy"] > 40 and {row["run"] for row in rows} == {"noprop"}  # ten classes
    assert len({row["bytes"]["activations"] for row in rows}) == 1, "every block is as large as the others"


def test_a_block_learns_alone(tmp_path):
    network = NoProp(tiny.config(tmp_path))
    x, y = torch.randn(8, 1, 8, 8), torch.arange(8)
    with torch.no_grad():
        for block in network.blocks:
            block.head.linear.weight.normal_()
    network.loss(x, y, 1, seed=0, step=0).backward()
    touched = {name.split(".")[1] for name, p in network.blocks.named_parameters(prefix="b") if p.grad is not None}
    assert touched == {"1"} and network.out.weight.grad is not None


def test_knowing_the_label_the_walk_keeps_to_the_noise_it_was_trained_on(tmp_path, monkeypatch):
    """With the true embedding as estimate every z has the mean and variance of `noised`: each step is the posterior."""
    network = NoProp(tiny.config(tmp_path))
    y, seen = torch.zeros(20_000, dtype=torch.int64), []
    monkeypatch.setattr(network, "estimate", lambda x, z, t: seen.append(z) or network.table[y])
    network.out = torch.nn.Identity()
    network.out.register_forward_hook(lambda module, inputs, z: seen.append(z))
    network.walk(torch.empty(len(y), 1), seed=0)
    assert len(seen) == 4
    for t, z in enumerate(seen):
        signal = network.alpha_bar[t]
        error = 4 / math.sqrt(len(y))  # four standard errors of a mean of unit variance
        torch.testing.assert_close(z.mean(0), math.sqrt(signal) * network.table[0], rtol=0, atol=error)
        assert float(z.var(0).mean()) == pytest.approx(1 - signal, abs=0.01)
        noised = network.noised(y, t, 0, 0)
        torch.testing.assert_close(noised.mean(0), z.mean(0), rtol=0, atol=2 * error)
