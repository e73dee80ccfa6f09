"""NoProp: its trajectory is the posterior of its noise, its blocks are alone, and it learns."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from blobs import task
from diffusionblocks.experiments.baselines.noprop import ALPHA_MIN, NoProp, noprop
from diffusionblocks.targets.base import Output

CPU = torch.device("cpu")


class Rows:
    def __init__(self):
        self.rows = []

    def on_log(self, trainer, row):
        self.rows.append(dict(row))


def test_it_learns(tmp_path):
    log = Rows()
    result = noprop(task(tmp_path, steps=150, lr=1e-2), CPU, log)
    assert result.name == "noprop" and result.test["accuracy"] > 40  # ten classes
    assert result.choice == {"lr": 1e-2, "warmup": 0.2}
    assert {row["block"] for row in log.rows} == {0, 1, 2}
    assert len({row["bytes"]["activations"] for row in log.rows}) == 1, "every block is as large as the others"
    assert result.memory["weights"] < 0.6 * sum(p.numel() * 4 for p in NoProp(tiny.config(tmp_path)).parameters())


def test_a_block_learns_alone(tmp_path):
    model = NoProp(tiny.config(tmp_path))
    x, y = torch.randn(8, 1, 8, 8), torch.arange(8)
    with torch.no_grad():
        for block in model.blocks:
            block.stem_head.head.linear.weight.normal_()
    model.loss(1, x, y).loss.backward()
    touched = {name.split(".")[1] for name, p in model.blocks.named_parameters(prefix="b") if p.grad is not None}
    assert touched == {"1"} and model.target.out.weight.grad is not None and model.target.table.grad is None


@pytest.mark.parametrize("block", [0, 1, 2])
def test_the_loss_is_the_papers(tmp_path, block):
    """Equations of NoProp-DT in float64: variance-preserving z, the gain of alpha_bar / (1 - alpha_bar)."""
    model = NoProp(tiny.config(tmp_path))
    x, y, B = torch.randn(8, 1, 8, 8), torch.arange(8), 3
    with torch.no_grad():
        model.blocks[block].stem_head.head.linear.weight.normal_()
    alpha_bar = [min(max(math.cos((1 - t / B) * math.pi / 2) ** 2, ALPHA_MIN), 1 - ALPHA_MIN) for t in range(B + 1)]
    seen = []
    model.blocks[block].register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    model.blocks[block].register_forward_hook(lambda module, inputs, features: seen.append(features))
    model.target.out.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    loss = float(model.loss(block, x, y, seed=3, step=4).loss.detach())
    (_, z, c_noise, _), features, (end,) = seen
    snr = [a / (1 - a) for a in alpha_bar]
    assert c_noise.tolist() == pytest.approx([-math.log(snr[block]) / 8] * 8, rel=1e-5)
    table = model.target.table.double()
    # the noise that the equation z = sqrt(alpha_bar) u + sqrt(1 - alpha_bar) eps implies is of unit variance
    for noisy, a in ((z, alpha_bar[block]), (end, alpha_bar[B])):
        eps = (noisy.double() - math.sqrt(a) * table[y]) / math.sqrt(1 - a)
        assert float(eps.square().mean()) == pytest.approx(1, abs=0.35)  # 8 x 16 normal numbers
    estimate = features.head(features.h, features.cond).double().softmax(-1) @ table
    squared = (estimate - table[y]).square().sum(-1).mean().detach()
    entropy = torch.nn.functional.cross_entropy(model.target.out(end).double(), y).detach()
    assert loss == pytest.approx(float(entropy + B / 2 * 0.1 * (snr[block + 1] - snr[block]) * squared), rel=1e-4)


def test_knowing_the_label_the_trajectory_keeps_to_the_noise_it_was_trained_on(tmp_path, monkeypatch):
    """With the true embedding as D every z has the mean and variance of `noised`: each step is the posterior."""
    model, count = NoProp(tiny.config(tmp_path)), 20_000
    y, seen = torch.zeros(count, dtype=torch.int64), []
    embedding = model.target.table[0]

    def denoise(x, z, sigma, block):
        seen.append((z, sigma))
        return Output(z, embedding.expand(count, -1))

    monkeypatch.setattr(model, "denoise", denoise)
    model.target.out.register_forward_pre_hook(
        lambda module, inputs: seen.append((inputs[0] * math.sqrt(1 + edges[-1] ** 2), edges[-1]))
    )
    edges = model.partition.edges
    model(torch.empty(count, 1))
    assert [sigma for _, sigma in seen] == list(edges)
    for t, (z, sigma) in enumerate(seen):
        error = 4 * sigma / math.sqrt(count)  # four standard errors of the mean
        torch.testing.assert_close(z.mean(0), embedding, rtol=0, atol=error)
        assert float(z.var(0).mean()) == pytest.approx(sigma**2, rel=0.01)
        noised = model.target.noised(y, torch.full((count,), sigma), seed=t, offset=0)
        torch.testing.assert_close(noised.mean(0), z.mean(0), rtol=0, atol=2 * error)
