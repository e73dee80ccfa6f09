"""Tensors that share memory without being one tensor, and steps without gradients: refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import diffusionblocks as db
from small import Odd, assert_alike, run


def trainer(add=lambda layer: None, offload=None):
    torch.manual_seed(0)
    model = db.from_layers(
        [Odd(add) for _ in range(3)], stem=nn.Linear(6, 8), head=nn.Linear(8, 3), target=db.LabelTarget(3, 8),
        blocks=3, dim=8,
    )  # fmt: skip
    return db.Trainer(model, device="cpu", offload=offload, visit=1, ema=0.9)


def row(layer):
    layer.register_buffer("row", layer.linear.weight.data[0])


def half(layer):
    layer.part = nn.Parameter(layer.linear.weight.data.view(-1)[:9])


def expanded(layer):
    layer.gain = nn.Parameter(torch.ones(1).expand(8))


@pytest.mark.parametrize(("add", "words"), [
    (row, r"layer\.linear\.weight and layers\.0\.layer\.row share memory"),
    (half, r"layer\.part and layers\.0\.layer\.linear\.weight share memory|weight and layers\.0\.layer\.part share"),
    (expanded, r"block_0's layers\.0\.layer\.gain is expanded"),
])  # fmt: skip
@pytest.mark.parametrize("offload", [None, "cpu"])
def test_tensors_that_overlap_are_refused_by_name(add, words, offload):
    """Files, and flat memory, have a place for each of them."""
    with pytest.raises(ValueError, match=words):
        trainer(add, offload)


def test_weights_tied_by_their_memory_across_blocks_are_refused():
    """Their objects differ, so nothing else tells."""
    weight = torch.randn(8, 8)

    def tie(layer):
        layer.linear.weight = nn.Parameter(weight)

    with pytest.raises(ValueError, match=r"block_0's .*linear\.weight and block_1's .*linear\.weight share memory"):
        trainer(tie)


def test_tensors_that_overlap_with_another_between_them_are_refused():
    def views(layer):
        whole = torch.randn(8, 16)
        layer.a, layer.b, layer.c = (nn.Parameter(t) for t in (whole[:, :8], whole[0, 8:], whole[5, :8]))

    with pytest.raises(ValueError, match=r"layer\.a and .*layer\.c share memory"):
        trainer(views)


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_constants_may_be_expanded(offload):
    def constant(layer):
        layer.register_buffer("mask", torch.tensor(1.0).expand(8))
        layer.gain = nn.Parameter(torch.ones(1).expand(8), requires_grad=False)
        layer.forward = lambda h: h + layer.linear(h) * layer.mask * layer.gain

    states = [made.model.state_dict() for made in (run(trainer(constant, offload), 4), run(trainer(), 4))]
    assert all(torch.equal(t, states[0][name]) for name, t in states[1].items())


def test_tensors_beside_each_other_in_one_memory_train():
    def columns(layer):
        both = torch.ones(8, 6)
        layer.left, layer.right = nn.Parameter(both[:, :3]), nn.Parameter(both[:, 3:])
        layer.forward = lambda h: h + layer.linear(h) * layer.left.mean() + layer.right.mean()

    assert_alike(run(trainer(columns), 4), run(trainer(columns, "cpu"), 4))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_step_without_gradients_is_refused(mode):
    made = trainer()
    with mode(), pytest.raises(RuntimeError, match=r"call it outside torch\.no_grad"):
        run(made, 1)
