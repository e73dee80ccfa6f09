"""Checkpointed layers that change buffers: their second pass begins with what the first one began with."""

import pytest
import torch
from torch import nn

import diffusionblocks as db
from diffusionblocks.training.activations import saving
from diffusionblocks.training.config import TrainerConfig


class Own(nn.Module):
    """Reads a running mean of its own, and makes a new tensor of it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, h):
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return h - self.mean


class Filled(Own):
    """Its buffer is made by the first call, and is two modules' at once."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.mean = None
        self.inner.register_buffer("count", torch.zeros(()))
        self.register_buffer("count", self.inner.count)

    def forward(self, h):
        self.count.add_(1)
        self.mean = h.detach().mean(0) if self.mean is None else 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return h - self.mean * self.inner.count


KINDS = {
    "batch norm": lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
    "its hook": lambda: nn.utils.spectral_norm(nn.Linear(8, 8)),
    "instance norm": lambda: nn.Sequential(nn.Linear(8, 8), nn.Unflatten(1, (2, 4)), Instances(), nn.Flatten()),
    "own": lambda: nn.Sequential(nn.Linear(8, 8), Own()),
    "filled": lambda: nn.Sequential(nn.Linear(8, 8), Filled()),
}


class Instances(nn.InstanceNorm1d):
    def __init__(self):
        super().__init__(2, track_running_stats=True)


class Layer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, h):
        return h + self.inner(h).relu()


def made(kind):
    torch.manual_seed(0)
    layers = [Layer(KINDS[kind]()) for _ in range(2)]
    return db.from_layers(layers, stem=nn.Linear(4, 8), head=nn.Linear(8, 3), target=db.LabelTarget(3, 8), blocks=1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits(kind):
    x, labels = torch.randn(16, 4), torch.randint(3, (16,))
    found = []
    for again in (False, True):
        trainer = db.Trainer(made(kind), device="cpu", log_every=2, checkpoint_layers=again)
        norms = [trainer.step(x, labels).grad_norm for _ in range(4)]
        found.append([*norms, *trainer.model.state_dict().values()])  # a buffer that is filled is none of the first
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_code_can_not_and_says_so_but_of_batch_norm_s_which_it_does_not_read(kind):
    """What a compiled step would run is run here uncompiled: what a buffer's version tells is the same."""
    model, config = made(kind), TrainerConfig(compile=True, checkpoint_layers=True)
    sigma = torch.ones(16)

    def step():
        with saving(model, 0, config, count=False):
            model.loss_at(0, torch.randn(16, 4), torch.randint(3, (16,)), sigma, seed=0, step=0)

    if kind in ("batch norm", "instance norm"):
        step()
        return
    with pytest.raises(ValueError, match=r"layers change buffers \(layers\.0\.layer\.inner.*leave one of the two out"):
        step()
    with saving(model, 0, TrainerConfig(compile=True), count=False):
        model.loss_at(0, torch.randn(16, 4), torch.randint(3, (16,)), sigma, seed=0, step=0)


def test_the_copies_are_counted():
    counted = []
    for size in (0, 1000):
        model = made("batch norm")
        for layer in model.blocks[0].layers:
            layer.register_buffer("more", torch.zeros(size))
        with saving(model, 0, TrainerConfig(checkpoint_layers=True), count=True) as saved:
            model.loss_at(0, torch.randn(16, 4), torch.randint(3, (16,)), torch.ones(16), seed=0, step=0)
        counted.append(saved.bytes)
    assert counted[1] - counted[0] == 2 * 4000
