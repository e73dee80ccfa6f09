"""Any stem, layers and head as blocks: what the parts may be, and what they compute at the start."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import diffusionblocks as db
import small
from diffusionblocks.convert.conditioning import Conditioned

DIM = 8
LABELS = db.LabelTarget(3, DIM)


class WithCond(nn.Module):
    """A layer that is conditioned already."""

    def __init__(self, cond=8):
        super().__init__()
        self.linear, self.shift = nn.Linear(DIM, DIM), nn.Linear(cond, DIM)

    def forward(self, h, cond):
        shift = self.shift(cond)
        return h + torch.tanh(self.linear(h) + (shift.unsqueeze(1) if h.dim() > shift.dim() else shift))


class OwnHead(nn.Module):
    """A head of two stages, the second conditioned."""

    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.LayerNorm(DIM), nn.Linear(DIM, 3)

    def features(self, h):
        return self.norm(h)

    def forward(self, h, cond):
        return self.out(h) + cond[:, :3]


def plain(count=4):
    return [small.Residual(DIM, dropout=0.0) for _ in range(count)]


def build(layers=None, **changes):
    parts = dict(stem=nn.Linear(6, DIM), head=nn.Linear(DIM, 3), target=db.LabelTarget(3, DIM), blocks=2)
    return db.from_layers(plain() if layers is None else layers, **(parts | changes))


def learns(model, x, y, steps=30):
    """Train all blocks and return whether each one's loss fell."""
    optimizer = db.BlockAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = [[] for _ in model.blocks]
    for _ in range(steps):
        for block, own in enumerate(losses):
            loss = model.loss(block, x, y).loss
            loss.backward()
            own.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return all(sum(own[-5:]) < 0.9 * sum(own[:5]) for own in losses)


def test_at_the_start_a_converted_network_computes_what_the_plain_one_did():
    layers, stem, head = plain(), nn.Linear(6, DIM), nn.Linear(DIM, 3)
    x, noise = torch.randn(5, 6), torch.randn(5, DIM)
    model = build(layers, stem=stem, head=head)
    h = stem(x) + model.stem_head.stem.z(noise)
    for layer in layers:
        h = layer(h)
    found, cond = model.stem_head.stem(x, noise, torch.randn(5))
    for block in model.blocks:
        for layer in block.layers:
            found = layer(found, cond)
    torch.testing.assert_close(model.stem_head.head(found, cond), head(h), rtol=1e-5, atol=1e-6)
    assert all(isinstance(layer, Conditioned) for block in model.blocks for layer in block.layers)
    assert [layer.layer for block in model.blocks for layer in block.layers] == layers, "used in place"


@pytest.mark.parametrize("tokens", [0, 4], ids=["(B, D)", "(B, N, D)"])
def test_a_plain_stem_gets_z_at_the_first_token(tokens):
    stem = nn.Sequential(nn.Linear(6, DIM), *([nn.Unflatten(1, (tokens, 2)), nn.Linear(2, DIM)] if tokens else []))
    head = nn.Sequential(nn.Flatten(), nn.Linear(max(1, tokens) * DIM, 3))
    model = build(stem=stem, head=head)
    x, y = small.batch()
    h, _ = model.stem_head.stem(x, torch.zeros(8, DIM), torch.zeros(8))
    moved, _ = model.stem_head.stem(x, torch.ones(8, DIM), torch.zeros(8))
    touched = (moved != h).flatten(1).any(1) if not tokens else (moved != h).any(-1).any(0)
    assert touched.tolist() == ([True] * 8 if not tokens else [True, False, False, False])
    assert learns(model, x, y) and model.eval()(x).shape == (8, 3)


def test_z_per_token():
    model = build(stem=nn.Embedding(5, DIM), head=nn.Linear(DIM, 5), target=db.TokenTarget(db.spread_codebook(5, DIM)))
    x, y = small.batch("tokens")
    z = torch.zeros(8, 4, DIM)
    h, cond = model.stem_head.stem(x, z, torch.zeros(8, 4))
    z[:, 2] = 1
    moved, _ = model.stem_head.stem(x, z, torch.zeros(8, 4))
    assert (moved != h).any(-1).any(0).tolist() == [False, False, True, False]
    assert cond.shape[:2] == (8, 4) and learns(model, x, y) and model.eval()(x).shape == (8, 4, 5)


def test_layers_and_stems_that_are_conditioned_stay_as_they_are():
    layers = [WithCond() for _ in range(4)]
    stem = small.ImageStem(DIM, 8)
    model = build(layers, stem=stem, head=nn.Linear(DIM, 4), target=db.ContinuousTarget(0.5))
    assert [layer for block in model.blocks for layer in block.layers] == layers and model.stem_head.stem is stem
    assert learns(model, *small.batch("images"))


def test_plain_and_conditioned_layers_mix():
    layers = [plain(1)[0], WithCond(), plain(1)[0], WithCond()]
    model = build(layers, cond=8)
    kinds = [type(layer) for block in model.blocks for layer in block.layers]
    assert kinds == [Conditioned, WithCond] * 2 and learns(model, *small.batch())


@pytest.mark.parametrize("head", [
    nn.Linear(DIM, 3), nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 3)), OwnHead(),
], ids=["linear", "sequence", "own"])  # fmt: skip
def test_heads(head):
    model = build(head=head, cond=8)
    made = model.stem_head.head
    assert (made is head) == isinstance(head, OwnHead)
    if not isinstance(head, OwnHead):
        assert made.linear is (head if isinstance(head, nn.Linear) else None), "else the norm would be left out"
    assert learns(model, *small.batch())


@pytest.mark.parametrize(
    ("blocks", "counts"), [(2, (2, 2)), (3, (2, 1, 1)), (4, (1, 1, 1, 1)), ((1, 3), (1, 3)), ([3, 1], (3, 1))]
)
def test_layers_are_spread_or_counted(blocks, counts):
    layers = plain()
    model = build(layers, blocks=blocks)
    assert model.partition.layers == counts == tuple(len(block.layers) for block in model.blocks)
    assert [layer.layer for block in model.blocks for layer in block.layers] == layers


@pytest.mark.parametrize("shared", ["shared", "per_block", "frozen"])
def test_stem_and_head_are_shared_copied_or_frozen(shared):
    stem = nn.Linear(6, DIM)
    model = build(stem=stem, shared=shared)
    own = [block.around(model.stem_head).stem.stem for block in model.blocks]
    assert (own[0] is own[1]) == (shared != "per_block")
    assert torch.equal(own[0].weight, own[1].weight) and torch.equal(own[0].weight, stem.weight)
    assert own[0].weight.requires_grad == (shared != "frozen")
    model.loss(1, *small.batch()).loss.backward()
    assert [w.weight.grad is not None for w in own] == {
        "shared": [True, True], "per_block": [False, True], "frozen": [False, False]
    }[shared]  # fmt: skip


def test_options_reach_the_partition():
    density = db.LogUniform(0.1, 10.0)
    model = build(density=density, overlap=0.2, context=0.25)
    assert (model.partition.density, model.partition.overlap, model.context) == (density, 0.2, 0.25)
    assert build().context == 0.5, "labels: half of a batch must answer from x alone"
    images = build([WithCond(), WithCond()], stem=small.ImageStem(DIM, 8), head=nn.Linear(DIM, 4),
                   target=db.ContinuousTarget(0.5))  # fmt: skip
    assert images.context == 0.0 and isinstance(images.partition.density, db.LogNormal)
    assert small.model("masked").partition.overlap == 0.0


def test_the_width_is_seen_or_given():
    attention = nn.MultiheadAttention(DIM, 2)
    hidden = [nn.Sequential(nn.Identity(), layer) for layer in (attention, nn.LayerNorm(DIM), nn.Linear(DIM, DIM))]
    for layer in hidden:
        assert build([layer], blocks=1).blocks[0].layers[0].linear.out_features == 3 * DIM
    with pytest.raises(ValueError, match="pass dim="):
        build([nn.Identity(), nn.Identity()])
    assert build([nn.Identity(), nn.Identity()], dim=DIM).blocks[0].layers[0].linear.out_features == 3 * DIM


LAYER = small.Residual(DIM)


@pytest.mark.parametrize(("layers", "changes", "error", "words"), [
    ([LAYER, LAYER], {}, ValueError, "one layer object stands in `layers` twice"),
    ([], {}, ValueError, "layers must hold at least one layer"),
    ([LAYER, torch.tanh], {}, TypeError, r"layers\[1\] must be a torch.nn.Module, got"),
    (None, dict(stem=lambda x: x), TypeError, "stem must be a torch.nn.Module, got function"),
    (None, dict(head=3), TypeError, "head must be a torch.nn.Module, got int"),
    (None, dict(target="labels"), TypeError, "target must be a Target"),
    (None, dict(blocks=5), ValueError, "layers"), (None, dict(blocks=0), ValueError, "blocks"),
    *((None, dict(blocks=b), TypeError, "blocks must be their number or the layers of each, e.g. 2 or")
      for b in ("2", True, 2.5, None, (2, 2.0), "ab")),
    *((None, dict(blocks=b), ValueError, "must share the network's 4 layers, each block at least one")
      for b in ((1, 1), (0, 4), ())),
    *((None, dict(cond=c), ValueError, "cond must be a whole number of at least 1") for c in (0, -1, True, 2.5)),
    (None, dict(dim=0), ValueError, "dim must be a whole number"),
    (None, dict(stem=nn.LazyLinear(DIM)), ValueError, "stem has a lazy weight"),
    (None, dict(shared="some"), ValueError, "shared must be one of"),
    (None, dict(context=1.5), ValueError, "context must be a share"),
    (None, dict(target=db.ContinuousTarget(0.5)), ValueError, r"a plain stem\(x\) can't take a ContinuousTarget's z"),
])  # fmt: skip
def test_parts_that_do_not_fit_are_refused_by_name(layers, changes, error, words):
    with pytest.raises(error, match=words):
        build(layers, **changes)


def test_a_stem_whose_tokens_z_does_not_fit_is_refused():
    model = build(stem=nn.Sequential(nn.Linear(6, 2 * DIM), nn.Unflatten(1, (2, DIM))),
                  target=db.TokenTarget(db.spread_codebook(3, DIM)))  # fmt: skip
    with pytest.raises(ValueError, match="z needs a first token or a token each"):
        model.loss(0, torch.randn(4, 6), torch.zeros(4, 5, dtype=torch.int64))


class ByKeyword(nn.Module):
    """forward with cond by keyword only."""

    def __init__(self):
        super().__init__()
        self.linear, self.cond = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, h, *, cond=None):
        return h + self.linear(h) + self.cond(cond)


class ByPosition(ByKeyword):
    def forward(self, h, cond):
        return super().forward(h, cond=cond)


class StemByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.x, self.noise = nn.Linear(4, 8), nn.Linear(1, 8)

    def forward(self, x, *, z, c_noise):
        return self.x(x) + z, self.noise(c_noise.unsqueeze(-1))


class StemByPosition(StemByKeyword):
    def forward(self, x, z, c_noise):
        return super().forward(x, z=z, c_noise=c_noise)


def test_what_is_taken_by_keyword_only_is_passed_so():
    def build(layer, stem):
        torch.manual_seed(0)
        return db.from_layers([layer(), layer()], stem=stem(), head=nn.Linear(8, 3),
                              target=db.LabelTarget(3, 8), blocks=2, shared="per_block").eval()  # fmt: skip

    x = torch.randn(2, 4)
    assert torch.equal(build(ByKeyword, StemByKeyword)(x), build(ByPosition, StemByPosition)(x))


class Pair(nn.Module):
    """A conditioned layer in the manner of transformers: (h, attentions)."""

    def __init__(self, pair):
        super().__init__()
        self.linear, self.pair = nn.Linear(8, 8), pair

    def forward(self, h, cond):
        h = h + self.linear(h)
        return (h, None) if self.pair else h


def test_a_conditioned_layer_that_returns_a_tuple_gives_its_first():
    def build(pair):
        torch.manual_seed(0)
        return db.from_layers([Pair(pair), Pair(pair)], stem=nn.Linear(4, 8), head=nn.Linear(8, 3),
                              target=db.LabelTarget(3, 8), blocks=2, dim=8).eval()  # fmt: skip

    x = torch.randn(2, 4)
    assert torch.equal(build(True)(x), build(False)(x))


@pytest.mark.parametrize(
    "x, words",
    [
        (torch.randn(2, 5), r"x, \(2, 5\) torch.float32, does not fit the stem \(Linear\): mat1 and mat2 shapes"),
        (torch.randn(2, 4).double(), r"x, \(2, 4\) torch.float64, does not fit the stem \(Linear\)"),
    ],
)
def test_an_x_that_does_not_fit_a_plain_stem_is_named(x, words):
    model = db.from_layers([nn.Linear(8, 8)], stem=nn.Linear(4, 8), head=nn.Linear(8, 3),
                           target=db.LabelTarget(3, 8), blocks=1)  # fmt: skip
    for call in (lambda: model(x), lambda: model.loss(0, x, torch.tensor([0, 1])), lambda: db.sample(model, x)):
        with pytest.raises(ValueError, match=words):
            call()
