"""Checkpointed layers: the same bits from less memory, counted as they are."""

from __future__ import annotations

import functools
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import diffusionblocks as db
import small
from diffusionblocks.training.activations import saving
from diffusionblocks.training.config import TrainerConfig


class Odd(nn.Module):
    """A layer of (h, aside), which returns a tuple, from a dict of conditioning."""

    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, h, cond):
        h, aside = h
        return nn.functional.dropout(self.linear(h).tanh() * cond["scale"], 0.2), aside + 1


class Stem(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(6, dim)

    def forward(self, x, z, c_noise):
        h = self.linear(x) + z
        return (h, 0), {"scale": h.sigmoid()}


class Head(nn.Linear):
    def features(self, h):
        return h[0]

    def forward(self, h, cond):
        return super().forward(h)


def odd():
    torch.manual_seed(0)
    return db.from_layers(
        [Odd(8) for _ in range(3)], stem=Stem(8), head=Head(8, 3), target=db.LabelTarget(3, 8), blocks=1
    )


def trained(model, batch, **settings):
    """Return losses, gradients' norms, and all tensors after some steps."""
    trainer = db.Trainer(model, device="cpu", visit=2, log_every=3, seed=1, **settings)
    outputs = [trainer.step(*batch) for _ in range(8)]
    return [o.loss.item() for o in outputs], [o.grad_norm.item() for o in outputs], small.everything(trainer)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [*small.KINDS, "odd"])
def test_the_same_bits(kind, precision):
    make = odd if kind == "odd" else lambda: small.model(kind)
    batch = small.batch("labels" if kind == "odd" else kind)
    plain, ours = (trained(make(), batch, precision=precision, checkpoint_layers=c) for c in (False, True))
    assert plain[:2] == ours[:2]
    assert all(torch.equal(t, ours[2][name]) for name, t in plain[2].items())


class Peak(TorchDispatchMode):
    """The most bytes of storage alive at once, of those made within it."""

    def __init__(self):
        super().__init__()
        self.alive = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.known:
                self.add(t.untyped_storage())
        return result

    def add(self, storage):
        size, key = storage.nbytes(), storage._cdata
        self.known.add(key)
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(storage, self.drop, size, key)

    def drop(self, size, key):
        self.alive -= size
        self.known.discard(key)


class Wide(nn.Module):
    """A layer that saves five times its input."""

    def __init__(self, dim):
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, h, cond):
        return h + self.down(self.up(h).tanh())


def wide(layers):
    model = db.from_layers(
        [Wide(64) for _ in range(layers)],
        stem=nn.Linear(6, 64),
        head=nn.Linear(64, 3),
        target=db.LabelTarget(3, 64),
        blocks=1,
    )
    return model, (torch.randn(2048, 6), torch.zeros(2048, dtype=torch.int64))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_peak_of_a_step_is_what_is_counted(checkpointed):
    """Beside parameters' gradients and a layer's temporaries, which are the same at every depth."""
    config, found = TrainerConfig(device="cpu", checkpoint_layers=checkpointed), []
    for layers in (4, 16):
        model, batch = wide(layers)
        with Peak() as peak:
            with saving(model, 0, config, count=True) as saved:
                loss = model.loss(0, *batch, seed=0, step=0).loss
            loss.backward()
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        found.append((peak.most - gradients, saved.bytes))
    (low, counted_low), (high, counted_high) = found
    assert high - low == pytest.approx(counted_high - counted_low, rel=0.01)
    temporaries = 5 * batch[0].shape[0] * 64 * 4  # five times a layer's input
    assert counted_low < low < counted_low + temporaries


def test_a_call_that_raises_leaves_the_block_as_it_was():
    model = wide(2)[0]
    with pytest.raises(RuntimeError), saving(model, 0, TrainerConfig(checkpoint_layers=True), count=True):
        raise RuntimeError
    assert "call" not in vars(model.blocks[0])
    with saving(model, 0, TrainerConfig(), count=False) as saved:
        assert saved is None


def test_compiled_layers_are_checkpointed(monkeypatch):
    """By the graphs that autograd is given, without inductor's code of them, which takes half a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))

    def losses(**settings):
        trainer = db.Trainer(small.model(layers=2, blocks=1), device="cpu", log_every=2, clip=0.0, **settings)
        outputs = [trainer.step(*small.batch(step=s)) for s in range(4)]
        return [o.loss.item() for o in outputs]

    without = nn.Dropout.forward
    try:
        nn.Dropout.forward = lambda self, h: h  # a compiled dropout draws other numbers
        plain, ours = losses(), losses(compile=True, checkpoint_layers=True)
    finally:
        nn.Dropout.forward = without
    assert ours == pytest.approx(plain, rel=1e-4)
