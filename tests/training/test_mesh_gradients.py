"""Ranks that don't reach the same parameters, or have statistics of their own rows: two threads stand for processes."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from torch import nn

import diffusionblocks as db
from diffusionblocks.training import mesh, trainer
from diffusionblocks.training.mesh import Mesh

TAG = 3.0  # of rows that the second expert gets


class Threads:
    """torch.distributed for two threads."""

    def __init__(self):
        self.barrier, self.given, self.own = threading.Barrier(2, timeout=20), [None, None], threading.local()

    def exchange(self, t):
        self.given[self.own.rank] = t.clone()
        self.barrier.wait()
        found = list(self.given)
        self.barrier.wait()
        if found[0].shape != found[1].shape:
            raise ValueError(f"{found[0].shape} meets {found[1].shape}")  # where gloo ends the process
        return found

    def all_reduce(self, t, async_op):
        t.copy_(sum(self.exchange(t)))
        return type("Done", (), {"wait": lambda self: None})()

    def all_gather(self, into, own):
        for t, other in zip(into, self.exchange(own), strict=True):
            t.copy_(other)


class Routed(nn.Module):
    """Experts of one shape: rows go by their last feature, which nothing changes; nobody reaches the last expert."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(7, 7, bias=False) for _ in range(3))

    def forward(self, h):
        out = h.clone()
        for expert, rows in zip(self.experts, (h[:, -1] < 0, h[:, -1] > 0, h[:, -1] == 0), strict=True):
            if rows.any():
                out[rows, :-1] = h[rows, :-1] + expert(h[rows, :-1])
        return out


class Stem(nn.Linear):
    def forward(self, x):
        return torch.cat([super().forward(x), x[:, -1:]], 1)


def model(layer=Routed):
    torch.manual_seed(0)
    parts = dict(stem=Stem(4, 7), head=nn.Linear(8, 3), target=db.LabelTarget(3, 8), shared="frozen")
    return db.from_layers([layer() for _ in range(2)], blocks=2, dim=8, **parts)


def train(network, steps=4):
    made = db.Trainer(network, device="cpu", visit=1, adapt=False, lr=0.01)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 4, generator=generator)
        x[:, -1] = torch.tensor([-TAG, -TAG, TAG, TAG])  # a rank has one kind of rows
        made.step(x, torch.randint(3, (4,), generator=generator))
    return made


def by_two(monkeypatch, layer=Routed):
    group, errors = Threads(), []
    made = [model(layer) for _ in range(2)]  # before there are threads, which share torch's generator

    def rank(number):
        group.own.rank = number
        try:
            made[number] = train(made[number])
        except Exception as error:
            errors.append(error)
            group.barrier.abort()

    monkeypatch.setattr(mesh, "dist", group)
    monkeypatch.setattr(trainer, "open_mesh", lambda shape, device: (Mesh(1, 2, 0, group.own.rank), device))
    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return made


def test_experts_of_other_rows_are_trained_as_in_one_process(monkeypatch):
    one, ranks = train(model()), by_two(monkeypatch)
    start = model().state_dict()
    expected, found = one.model.state_dict(), [made.model.state_dict() for made in ranks]
    for name, t in expected.items():
        assert torch.equal(found[0][name], found[1][name])
        torch.testing.assert_close(found[0][name], t, rtol=1e-3, atol=1e-4)
    for block, expert in itertools.product(range(2), range(3)):
        (name,) = (n for n in expected if n.startswith(f"blocks.{block}.") and f"experts.{expert}." in n)
        assert torch.equal(expected[name], start[name]) == (expert == 2)
        for made in ranks:  # one that no row reached isn't even decayed, as in one process
            optimizer, weight = made.optimizers[f"block_{block}"], made.model.get_parameter(name)
            (place,) = (i for i, p in enumerate(optimizer.params()) if p is weight)
            assert optimizer.counts[place] == (2 if expert < 2 else 0)


@pytest.mark.parametrize("kept", [True, False])
def test_batch_norm_is_refused_by_name(monkeypatch, kept):
    monkeypatch.setattr(trainer, "open_mesh", lambda shape, device: (Mesh(1, 2, 0, 0), device))
    with pytest.raises(ValueError, match=r"blocks.0.layers.0\S* is a BatchNorm1d.*GroupNorm or LayerNorm, or one data"):
        db.Trainer(model(lambda: nn.BatchNorm1d(8, track_running_stats=kept)), device="cpu", visit=1, adapt=False)


class Mean(nn.Module):
    """Keeps the mean of what it saw, and the number of its calls."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, h):
        self.mean.lerp_(h.detach().mean(0), 0.1)
        self.calls += 1
        return h + self.linear(h)


def test_buffers_of_each_ranks_rows_are_refused_by_name_after_a_step(monkeypatch):
    with pytest.raises(ValueError, match=r"different values in block_\d's \S+mean on the ranks .* one data rank"):
        by_two(monkeypatch, Mean)


def test_buffers_that_stay_equal_are_trained_with(monkeypatch):
    def normed():
        return nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))

    one, other = (made.model.state_dict() for made in by_two(monkeypatch, normed))
    assert all(torch.equal(t, other[name]) for name, t in one.items())
