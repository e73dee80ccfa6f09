"""Layers that don't fit `from_layers` are refused by what they take and what they make, never fed something else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import diffusionblocks as db

DIM = 8


class Layer(nn.Module):
    """A linear layer whose forward is given."""

    def __init__(self, forward):
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.forward = forward.__get__(self)


def model(*layers, stem=None, **changes):
    parts = dict(stem=stem or nn.Linear(6, DIM), head=nn.Linear(DIM, 3), target=db.LabelTarget(3, DIM), blocks=1)
    return db.from_layers(layers, **(parts | changes))


def encoder(**changes):
    return nn.TransformerEncoderLayer(DIM, 2, 16, **changes)


@pytest.mark.parametrize(
    "layer,words",
    [
        (Layer(lambda self, h, mask: h), r"layers\[0\] \(Layer\) takes \(h, mask\)"),
        (Layer(lambda self, h, *, mask: h), "takes \\(h, mask\\).*wrap it in a module"),
        (Layer(lambda self, h, position_embeddings: h), "position_embeddings"),
        (Layer(lambda self, h, scale: h), "called cond"),
        (Layer(lambda self, h, cond, mask: h), "h, cond, mask"),
        (nn.TransformerDecoderLayer(DIM, 2, 16, batch_first=True), "tgt, memory"),
        (nn.MultiheadAttention(DIM, 2), "query, key, value"),
        (encoder(), "batch_first=True"),
        (nn.GRU(DIM, DIM), "batch_first=True"),
        (nn.Sequential(nn.LayerNorm(DIM), encoder()), "batch_first=True"),
    ],
)
def test_layers_that_take_something_else_are_refused(layer, words):
    with pytest.raises(ValueError, match=words):
        model(layer)


@pytest.mark.parametrize("name", ["cond", "c", "temb", "noise_level", "time_embedding"])
def test_a_conditioning_has_many_names(name):
    namespace = {}
    exec(f"def forward(self, h, {name}): return h + {name}[:, :1]", namespace)
    made = model(Layer(namespace["forward"]))
    assert type(made.blocks[0].layers[0]) is Layer, "it gets no AdaLN of ours"


@pytest.mark.parametrize(
    "forward,words",
    [
        (lambda self, h: self.linear(h)[:, :4], r"made \(5, 4\) of h \(5, 8\)"),
        (lambda self, h: self.linear(h)[:, :1], r"made \(5, 1\)"),  # would be broadcast
        (lambda self, h: {"h": h}, "made dict"),
        (lambda self, h: (h, self.linear(h)), r"made \(5, 8\), \(5, 8\).*no other is of its shape"),
        (lambda self, h: (None, h), r"made NoneType, \(5, 8\)"),
    ],
)
def test_what_layers_make_is_clear_or_refused(forward, words):
    with pytest.raises(ValueError, match=words):
        model(Layer(forward))(torch.randn(5, 6))


def test_the_first_of_a_tuple_is_taken_where_the_others_are_of_other_shapes():
    made = model(Layer(lambda self, h: (self.linear(h), h.mean(), None)))
    assert made(torch.randn(5, 6)).shape == (5, 3)


def test_a_width_that_the_stem_does_not_give_is_named():
    layer = model(nn.Linear(DIM, DIM)).blocks[0].layers[0]
    with pytest.raises(ValueError, match="h is 6 wide and the layers are taken for 8"):
        layer(torch.randn(2, 6), torch.randn(2, 8))


def test_a_network_is_no_list_of_layers():
    with pytest.raises(TypeError, match="layers must be a list of modules"):
        db.from_layers(
            nn.TransformerEncoder(encoder(batch_first=True), 2), stem=nn.Identity(), head=nn.Identity(),
            target=db.LabelTarget(3, DIM), blocks=1,
        )  # fmt: skip


def test_what_is_added_has_the_dtype_of_the_layers():
    made = model(nn.Linear(DIM, DIM).bfloat16(), stem=nn.Linear(6, DIM).bfloat16(), head=nn.Linear(DIM, 3).bfloat16())
    assert {p.dtype for p in (*made.stem_head.parameters(), *made.blocks.parameters())} == {torch.bfloat16}
    loss = made.loss(0, torch.randn(5, 6).bfloat16(), torch.randint(3, (5,))).loss
    assert torch.isfinite(loss)


@pytest.mark.parametrize(
    "shape,y,head,words",
    [
        ((1,), (5,), 1, r"targets y must be \(B, 1\) as ContinuousTarget's shape says, got \(5,\)"),
        ((1,), (5, 1), 2, r"the head must give F in y's shape \(5, 1\), got \(5, 2\)"),
    ],
)
def test_a_continuous_target_is_of_its_shape(shape, y, head, words):
    made = model(nn.Linear(DIM, DIM), target=db.ContinuousTarget(shape=shape), head=nn.Linear(DIM, head))
    with pytest.raises(ValueError, match=words):
        made.loss(0, torch.randn(5, 6), torch.randn(y))


def test_a_number_is_no_vector_for_a_plain_stem():
    with pytest.raises(ValueError, match="can't take a ContinuousTarget's z"):
        model(nn.Linear(DIM, DIM), target=db.ContinuousTarget(shape=()), head=nn.Linear(DIM, 1))
