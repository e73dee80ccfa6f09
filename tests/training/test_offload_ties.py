"""Tensors in several places: tables registered in every layer, tied weights, views. Losses with waiting blocks are
those without; what can't be trained apart is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffusionblocks import ContinuousTarget, DiffusionBlocks, Ends, LogNormal, PartOptimizer, Residency, make_partition
from diffusionblocks.convert.conditioning import NoiseEmbedding
from diffusionblocks.sampling.sampler import Walker

DIM = 8
x, y = torch.arange(8), torch.randn(8, 2, generator=torch.Generator().manual_seed(7))


class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.octant, self.point, self.noise = nn.Embedding(8, DIM), nn.Linear(2, DIM), NoiseEmbedding(DIM)

    def forward(self, x, z, c_noise):
        return self.octant(x) + self.point(z), self.noise(c_noise)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.shift = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, h, cond):
        h = h + self.table if hasattr(self, "table") else h
        return h + torch.tanh(self.lin(h) + self.shift(cond))


class Head(nn.Linear):
    def features(self, h):
        return h

    def forward(self, h, cond):
        return super().forward(h)


def build(put=lambda layers, table: None, layers=4, blocks=2):
    torch.manual_seed(0)
    stem, head, table = Stem(), Head(DIM, 2), torch.randn(DIM)
    made = [Layer() for _ in range(layers)]
    put(made, table)
    partition = make_partition(LogNormal(), layers, blocks)
    return DiffusionBlocks(Ends(stem, head), made, ContinuousTarget(sigma_data=0.7), partition)


def one_buffer(layers, table, persistent=True):
    for layer in layers:
        layer.register_buffer("table", table, persistent=persistent)


def views(layers, table):
    for layer in layers:
        layer.register_buffer("table", table[:])


def a_part_of_another(layers, table):
    for layer in layers:
        layer.register_buffer("table", table.clone())
        layer.register_buffer("begin", layer.table[:4])


def one_frozen_parameter(layers, table):
    one = nn.Parameter(table, requires_grad=False)
    for layer in layers:
        layer.table = one


def tied_within_a_layer(layers, table):
    for layer in layers:
        layer.shift.weight = layer.lin.weight


def tied_within_a_block(layers, table):
    layers[1].lin, layers[3].lin = layers[0].lin, layers[2].lin


PUTS = [one_buffer, lambda layers, table: one_buffer(layers, table, False), views, a_part_of_another,
        one_frozen_parameter, tied_within_a_layer, tied_within_a_block]  # fmt: skip
NAMES = ["one buffer", "not persistent", "views", "a part of another", "one frozen parameter", "a layer's ties",
         "a block's ties"]  # fmt: skip


def trained(put, store, folder, steps=6):
    """Losses, an estimate by the averages, and all averaged weights, after a few steps of both blocks."""
    model = build(put)
    optimizers = {name: PartOptimizer(m.named_parameters(), ema_decay=0.9) for name, m in model.parts().items()}
    residency = Residency(model, optimizers, device="cpu", store=store, folder=folder)
    losses = []
    for step in range(steps):
        block = step % len(model.blocks)
        residency.activate(block)
        loss = model.loss(block, x, y, seed=0, step=step).loss
        loss.backward()
        losses.append(loss.item())
        for name in ("shared", f"block_{block}"):
            optimizers[name].step(1e-2)
    with residency.averages():
        losses.append(Walker(model, residency).read(x, y, 1.0).denoised.sum().item())
        with residency.borrowed(0):
            losses.append(model.blocks[0].layers[0](torch.ones(1, DIM), torch.ones(1, DIM)).sum().item())
        weights = residency.weights()
    return losses, weights, model


@pytest.mark.parametrize("put", PUTS, ids=NAMES)
def test_the_store_changes_nothing(put, tmp_path):
    kept, weights, model = trained(put, "host", None)
    on_disk, weights_on_disk, _ = trained(put, "disk", tmp_path)
    assert kept == on_disk
    assert weights.keys() == weights_on_disk.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], weights_on_disk[name]) for name in weights)
    fresh = build(put)
    fresh.load_state_dict(weights)  # ties included


def test_a_table_of_all_layers_is_counted_and_kept_once(tmp_path):
    model = build(one_buffer)
    residency = Residency(model, device="cpu", store="disk", folder=tmp_path)
    table = model.blocks[0].layers[0].table
    for block in (1, 0, 1):
        residency.activate(block)
        assert all(layer.table is table for b in model.blocks for layer in b.layers) and table.numel() == DIM
    assert sum(name.endswith("table") for name in residency.tensors("shared")) == 1
    assert not any(name.endswith("table") for part in ("block_0", "block_1") for name in residency.tensors(part))


def across_blocks(layers, table):
    layers[3].lin = layers[0].lin


def test_weights_tied_across_blocks_are_refused_by_name():
    with pytest.raises(ValueError, match=r"block_1's layers\.1\.lin\.weight is the same parameter as block_0's layers"):
        build(across_blocks)


def test_weights_tied_to_the_ends_are_refused_by_name():
    torch.manual_seed(0)
    layers = [Layer(), Layer()]
    stem = Stem()
    stem.point2 = layers[1].lin
    with pytest.raises(ValueError, match=r"block_1's layers\.0\.lin\.weight is the same parameter as shared's ends"):
        DiffusionBlocks(
            Ends(stem, Head(DIM, 2)), layers, ContinuousTarget(sigma_data=0.7), make_partition(LogNormal(), 2, 2)
        )


def test_frozen_layers_may_be_tied_across_blocks(tmp_path):
    def frozen(layers, table):
        layers[3].lin = layers[0].lin.requires_grad_(False)

    assert trained(frozen, "host", None)[0] == trained(frozen, "disk", tmp_path)[0]
