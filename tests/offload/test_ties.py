"""Tensors in several places: tables registered in every layer, tied weights, views. Losses with waiting blocks are
those without; what can't be trained apart is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import diffusionblocks as db
from diffusionblocks.convert.conditioning import NoiseEmbedding

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


def build(put=lambda layers, table: None, layers=4, blocks=2):
    torch.manual_seed(0)
    stem, head, table = Stem(), nn.Linear(DIM, 2), torch.randn(DIM)
    made = [Layer() for _ in range(layers)]
    put(made, table)
    return db.from_layers(made, stem=stem, head=head, target=db.ContinuousTarget(sigma_data=0.7), blocks=blocks)


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


def trained(put, offload, folder, steps=6):
    """Losses, an estimate by the averages, and all averaged weights, after a few steps of both blocks."""
    model = build(put)
    trained_ = {name: [p for p in m.parameters() if p.requires_grad] for name, m in model.parts().items()}
    optimizers = {name: db.BlockAdamW(params, lr=1e-2, ema_decay=0.9) for name, params in trained_.items()}
    offloader = db.Offloader(model, optimizers, device="cpu", offload=offload, folder=folder)
    losses = []
    for step in range(steps):
        block = step % len(model.blocks)
        loss = model.loss(block, x, y, seed=0, step=step).loss
        loss.backward()
        losses.append(loss.item())
        for name in ("shared", f"block_{block}"):
            optimizers[name].step()
            optimizers[name].zero_grad()
    with offloader.averages():
        losses += [db.Sampler(model, x)(y, sigma).denoised.sum().item() for sigma in (1.0, 0.1)]
        weights = offloader.weights()
    return losses, weights, model


@pytest.mark.parametrize("put", PUTS, ids=NAMES)
def test_where_blocks_wait_changes_nothing(put, tmp_path):
    kept, weights, model = trained(put, None, None)
    assert weights.keys() == {name for name in model.state_dict() if not name.endswith("_extra_state")}
    for offload in ("cpu", "disk"):
        losses, gathered, _ = trained(put, offload, tmp_path)
        assert kept == losses
        assert weights.keys() == gathered.keys()
        assert all(torch.equal(weights[name], gathered[name]) for name in weights)
    fresh = build(put)
    fresh.load_state_dict(weights | {"_extra_state": fresh.get_extra_state()})  # ties included
    assert all(torch.equal(t, weights[name]) for name, t in fresh.state_dict().items() if name in weights)


def test_a_table_of_all_layers_is_counted_and_kept_once(tmp_path):
    model = build(one_buffer)
    offloader = db.Offloader(model, device="cpu", offload="disk", folder=tmp_path)
    table = model.blocks[0].layers[0].table
    for block in (1, 0, 1):
        offloader.activate(block)
        assert all(layer.table is table for b in model.blocks for layer in b.layers) and table.isfinite().all()
    assert sum(name.endswith("table") for name in offloader.tensors("shared")) == 1
    assert not any(name.endswith("table") for part in ("block_0", "block_1") for name in offloader.tensors(part))


def across_blocks(layers, table):
    layers[3].lin = layers[0].lin


def test_weights_tied_across_blocks_are_refused_by_name():
    with pytest.raises(ValueError, match=r"block_1's layers\.1\.lin\.weight is the same parameter as block_0's layers"):
        build(across_blocks)


def test_weights_tied_to_the_stem_are_refused_by_name():
    torch.manual_seed(0)
    layers = [Layer(), Layer()]
    stem = Stem()
    stem.point2 = layers[1].lin
    with pytest.raises(
        ValueError, match=r"block_1's layers\.0\.lin\.weight is the same parameter as shared's stem_head"
    ):
        db.from_layers(layers, stem=stem, head=nn.Linear(DIM, 2), target=db.ContinuousTarget(0.7), blocks=2)


def test_frozen_layers_may_be_tied_across_blocks(tmp_path):
    def frozen(layers, table):
        layers[3].lin = layers[0].lin.requires_grad_(False)

    assert trained(frozen, None, None)[0] == trained(frozen, "disk", tmp_path)[0]


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_ties_are_ties_again_after_release(tmp_path, offload):
    _, _, model = trained(tied_within_a_layer, offload, tmp_path)
    model.offloader.release()
    assert all(layer.shift.weight is layer.lin.weight for b in model.blocks for layer in b.layers)
    _, _, model = trained(one_buffer, offload, tmp_path)
    model.offloader.release()
    tables = [layer.table for b in model.blocks for layer in b.layers]
    assert all(table.isfinite().all() and torch.equal(table, tables[0]) for table in tables)
