"""What model(x) answers: logits of classes, else y; and what a plain model's targets take."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import diffusionblocks as db
import tiny_transformers as tiny
from diffusionblocks.card import model_card


def regression(**options):
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(2)]
    return db.from_layers(
        layers, stem=nn.Linear(2, 16), head=nn.Linear(16, 1), target=db.ContinuousTarget(1.0, shape=(1,)), blocks=2
    )


def test_numbers_are_answered_themselves():
    model = regression()
    trainer = db.Trainer(model, lr=1e-2, device="cpu", visit=1)
    for _ in range(300):
        x = torch.randn(64, 2)
        trainer.step(x, (x[:, :1] + x[:, 1:]) / 2**0.5)
    x = torch.randn(200, 2)
    wrong = (model.eval()(x) - (x[:, :1] + x[:, 1:]) / 2**0.5).square().mean()
    assert wrong < 0.1, "F has a mean square of about one, and is another thing"
    assert torch.equal(model(x, steps=4), db.sample(model, x, steps=4, sampler="euler"))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.place = nn.Embedding(8, 16), nn.Embedding(32, 16)

    def forward(self, x):
        return self.token(x) + self.place(torch.arange(x.shape[1]))


@pytest.mark.parametrize("shared", ["shared", "per_block"])
@pytest.mark.parametrize("offload", [None, "cpu"])
def test_texts_of_any_length_are_answered(shared, offload):
    layers = [nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)) for _ in range(2)]
    model = db.from_layers(
        layers, stem=Words(), head=nn.Linear(16, 8), target=db.TokenTarget(db.spread_codebook(8, 4)), blocks=2,
        shared=shared,
    )  # fmt: skip
    trainer = db.Trainer(model, device="cpu", offload=offload, visit=1)
    for length in (6, 9):
        x = torch.randint(8, (4, length))
        trainer.step(x, x.roll(-1, 1))
    for length in (1, 5, 12):
        assert model.eval()(torch.randint(8, (3, length))).shape == (3, length, 8)


def test_looking_for_the_length_changes_nothing():
    """It is asked for in the middle of training, of one x: batch norm has no statistics of that."""

    class Normed(Words):
        def __init__(self):
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(16), nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(self.norm(super().forward(x).mT).mT)

    model = db.from_layers(
        [nn.Linear(16, 16)], stem=Normed(), head=nn.Linear(16, 8), target=db.TokenTarget(db.spread_codebook(8, 4)),
        blocks=1,
    )  # fmt: skip
    x = torch.randint(8, (2, 5))
    before, state = {name: t.clone() for name, t in model.named_buffers()}, torch.get_rng_state()
    assert model.start(x, 1.0, seed=0).shape == (2, 5, 4)
    assert torch.equal(torch.get_rng_state(), state) and all(m.training for m in model.modules())
    assert all(torch.equal(t, before[name]) for name, t in model.named_buffers())


class Optional(nn.Linear):
    def forward(self, h, cond=None):
        return super().forward(h)


def test_a_head_may_take_a_conditioning_that_it_does_not_need():
    assert made(head=Optional(8, 3))(torch.randn(2, 4)).shape == (2, 3)


@pytest.mark.parametrize(("make", "error", "words"), [
    (lambda: db.TokenTarget(16), TypeError, r"table must be a tensor \(K, d\).*got 16"),
    (lambda: db.ContinuousTarget(1.0, shape=1), ValueError, r"shape must be that of one sample.*got 1"),
    (lambda: db.ContinuousTarget(1.0, shape=(0,)), ValueError, "shape must be that of one sample"),
    (lambda: made(target=db.ContinuousTarget(1.0)), ValueError, r"or give the target its shape here"),
    (lambda: made(head=Bare()), ValueError, r"head \(Bare\) takes the conditioning, too: give it features\(h\)"),
])  # fmt: skip
def test_what_does_not_fit_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


class Bare(nn.Linear):
    def __init__(self):
        super().__init__(8, 3)

    def forward(self, h, cond):
        return super().forward(h)


def made(head=None, target=None):
    return db.from_layers(
        [nn.Linear(8, 8)], stem=nn.Linear(4, 8), head=head or nn.Linear(8, 3), target=target or db.LabelTarget(3, 8),
        blocks=1,
    )  # fmt: skip


@pytest.mark.parametrize("build", [made, regression, lambda: db.convert(tiny.network("LlamaForCausalLM"), 2)])
def test_logits_of_x_alone_need_a_model_without_z(build):
    with pytest.raises(ValueError, match="logits are of x alone, and this model's blocks read z"):
        build().logits(torch.ones(1, 4, dtype=torch.int64))


@pytest.mark.parametrize(("build", "words"), [
    (made, "logits = model(x)"), (regression, "y = db.sample(model, x, seed=0)"),
    (lambda: db.convert(tiny.network("LlamaForCausalLM"), 2), "the layers have AdaLN"),
    (lambda: db.convert(tiny.network("LlamaForCausalLM"), 2, cond=0), "ids = db.generate(model, prompt_ids"),
    (lambda: db.convert(tiny.network("LlamaForCausalLM"), 2, cond=0), "`db.to_original(model)` makes networks"),
])  # fmt: skip
def test_cards_say_how_a_model_is_asked(build, words):
    assert words in model_card(build(), "name")


def test_runs_cards_name_the_command_that_works():
    assert "`dblocks predict out IMAGES`" in model_card(made(), "out", run=True)
    model = made()
    model.origin = {"kind": "mine.Net", "options": {}}
    assert "`db.load` needs the code that registered the network's class" in model_card(model, "out")
    card = model_card(regression(), "out", run=True)
    assert "`dblocks sample out`" in card and "predict" not in card and "import diffusionblocks as db" in card
