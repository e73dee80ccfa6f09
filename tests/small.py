"""Models and batches small enough for tests of the library, made by its public API alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import diffusionblocks as db


class Residual(nn.Module):
    """A plain residual layer with dropout: (..., D) -> (..., D)."""

    def __init__(self, dim: int, dropout: float = 0.1):
        super().__init__()
        self.norm, self.linear, self.dropout = nn.LayerNorm(dim), nn.Linear(dim, dim), nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.dropout(self.linear(self.norm(h)))


class Odd(nn.Module):
    """A linear layer with what `add` puts beside it: (..., 8) -> (..., 8)."""

    def __init__(self, add: Callable[[nn.Module], Any]):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        add(self)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.linear(h)


class ImageStem(nn.Module):
    """(labels (B,), z (B, 2, 4), c_noise) -> ((B, 2, D), (B, C))."""

    def __init__(self, dim: int, cond: int):
        super().__init__()
        self.label, self.z, self.noise = nn.Embedding(4, cond), nn.Linear(4, dim), nn.Linear(1, cond)

    def forward(self, x: Tensor, z: Tensor, c_noise: Tensor) -> tuple[Tensor, Tensor]:
        return self.z(z), self.label(x) + self.noise(c_noise.unsqueeze(-1))

    def unconditional(self, x: Tensor) -> Tensor:
        return torch.full_like(x, 3)


class MaskedStem(nn.Module):
    """(nothing (B, 0), tokens (B, N), c_noise) -> ((B, N, D), (B, C))."""

    def __init__(self, dim: int, cond: int):
        super().__init__()
        self.tokens, self.noise = nn.Embedding(6, dim), nn.Linear(1, cond)

    def forward(self, x: Tensor, z: Tensor, c_noise: Tensor) -> tuple[Tensor, Tensor]:
        return self.tokens(z), self.noise(c_noise.unsqueeze(-1))


KINDS = ("labels", "images", "tokens", "masked")


def model(
    kind: str = "labels", *, blocks: int = 2, layers: int = 4, seed: int = 0, **options: Any
) -> db.DiffusionBlocks:
    """Return an untrained model of a kind of target."""
    torch.manual_seed(seed)
    parts: dict[str, Any] = {
        "labels": lambda: dict(stem=nn.Linear(6, 8), head=nn.Linear(8, 3), target=db.LabelTarget(num_classes=3, dim=8)),
        "images": lambda: dict(stem=ImageStem(8, 8), head=nn.Linear(8, 4), target=db.ContinuousTarget(0.5)),
        "tokens": lambda: dict(
            stem=nn.Embedding(5, 8), head=nn.Linear(8, 5), target=db.TokenTarget(db.spread_codebook(5, 8))
        ),
        "masked": lambda: dict(stem=MaskedStem(8, 8), head=nn.Linear(8, 5), target=db.MaskedTarget(5)),
    }
    return db.from_layers([Residual(8) for _ in range(layers)], blocks=blocks, **parts[kind](), **options)


def batch(kind: str = "labels", step: int = 0, size: int = 8) -> tuple[Tensor, Tensor]:
    """Return batch number `step` of a learnable task."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(3, (size,), generator=generator)
    if kind == "labels":
        return nn.functional.one_hot(labels, 6) + 0.1 * torch.randn(size, 6, generator=generator), labels
    if kind == "images":
        return labels, (labels.view(-1, 1, 1) - 1) * 0.5 + 0.1 * torch.randn(size, 2, 4, generator=generator)
    tokens = (labels.view(-1, 1) + torch.arange(4)) % 5
    return (tokens, tokens) if kind == "tokens" else (tokens[:, :0], tokens)


class Loader:
    """Batches in order, whose position is its state."""

    def __init__(self, kind: str = "labels", size: int = 8):
        self.kind, self.size, self.position = kind, size, 0

    def __iter__(self) -> Any:
        while True:
            self.position += 1
            yield batch(self.kind, self.position - 1, self.size)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def everything(trainer: db.Trainer) -> dict[str, Tensor]:
    """Return all tensors of a trainer, copied: weights, optimizer state, averages."""
    return {
        f"{part}/{name}": t.detach().clone()
        for part in trainer.offloader.parts
        for name, t in trainer.offloader.tensors(part).items()
    }


def run(trainer: db.Trainer, last: int) -> db.Trainer:
    """Train up to step `last`, and return the trainer."""
    while trainer.steps_done < last:
        trainer.step(*batch(step=trainer.steps_done))
    return trainer


def assert_alike(one: db.Trainer, other: db.Trainer) -> None:
    """Fail unless two trainers hold the same bits."""
    ours, theirs = everything(one), everything(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(t, theirs[name]) for name, t in ours.items())
