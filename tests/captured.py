"""Trainings with and without recorded graphs, side by side."""

from __future__ import annotations

import warnings

import torch
from torch import nn

import diffusionblocks as db
import small

STEPS = 26
SETTINGS = {"lr": 1e-2, "steps": 40, "warmup": 0.2, "visit": 4, "ema": 0.9, "clip": 0.3, "log_every": 5}


class Rows(list):
    """A callback that keeps the log's rows, without what the clock and the allocator say."""

    def on_log(self, trainer, row):
        self.append({k: v for k, v in row.items() if k not in ("allocated", "reserved")})


def dense(kind, **options):
    """Return a model; of masks with a head that takes all positions: the linear one counts them on the host."""
    torch.manual_seed(0)
    if kind != "masked":
        return small.model(kind, blocks=3, layers=3, **options)
    head = nn.Sequential(nn.GELU(), nn.Linear(8, 5))
    layers = [small.Residual(8) for _ in range(3)]
    return db.from_layers(
        layers, blocks=3, stem=small.MaskedStem(8, 8), head=head, target=db.MaskedTarget(5), **options
    )


def trainer(captured, model=None, **settings):
    rows = Rows()
    made = db.Trainer(model or dense("labels"), device="cpu", capture=captured, callbacks=[rows], **SETTINGS | settings)
    return made, rows


def train(made, first=0, last=STEPS, kind="labels", size=8):
    """Return what the steps returned."""
    outputs = [made.step(*small.batch(kind, step, size)) for step in range(first, last)]
    return [(o.block, float(o.loss), float(o.grad_norm)) for o in outputs]


def assert_alike(one, other):
    one, other = small.everything(one), small.everything(other)
    assert one.keys() == other.keys()
    assert [name for name, t in one.items() if not torch.equal(t, other[name])] == []


def both(model=dense, kind="labels", steps=STEPS, **settings):
    """Train with graphs and without, compare all bits, and return the trainers."""
    made = [trainer(captured, model(kind), **settings) for captured in (True, False)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (ours, rows), (plain, expected) = made
        assert train(ours, last=steps, kind=kind) == train(plain, last=steps, kind=kind)
    assert rows == expected and len(rows) >= steps // 5
    assert_alike(ours, plain)
    ours.check()
    return ours, plain
