"""Puzzles that need many sequential steps: easy one step at a time, out of reach of a few layers at once.

Stateless: a batch is a function of (seed, step). A hash of the puzzle decides its split, so the splits are disjoint
for every seed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...noise.rng import stream
from ...targets.devices import send

BASE = 3
WALLS = 0.4  # probability of a wall
SHARES = {"val": range(1), "test": range(1, 2), "train": range(2, 16)}  # sixteenths of all puzzles


class Puzzle(ABC):
    """A task: x holds `tokens` tokens below `vocab_size`, y an answer below `num_classes` for each.

    Raises:
        ValueError: size is less than 2.
    """

    vocab_size: int
    num_classes: int
    tokens: int

    def __init__(self, size: int):
        if size < 2:
            raise ValueError(f"size must be at least 2, got {size}")
        self.size = size

    @abstractmethod
    def draw(self, count: int, share: range, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw puzzles of a share, in sixteenths of all, and their answers: x and y, both (count, tokens) int64."""

    @abstractmethod
    def ask(self, x: Tensor) -> str:
        """Format one puzzle (tokens,) as text."""

    def answer(self, x: Tensor, y: Tensor) -> str:
        """Format its answers y (tokens,) as text; -1 marks one that isn't known yet."""
        return " ".join("?" if value < 0 else str(value) for value in y.tolist())


class Drawn(Puzzle):
    """A task whose puzzles are made anew for every batch; the hash of a puzzle decides its share."""

    @abstractmethod
    def make(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw puzzles x and their answers y, both (count, tokens) int64."""

    def draw(self, count: int, share: range, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        pieces: list[tuple[Tensor, Tensor]] = []
        while sum(len(x) for x, _ in pieces) < count:
            x, y = self.make(count, generator)
            member = in_share(digest(x), share)
            pieces.append((x[member], y[member]))
            if len(pieces) == 64 and not any(len(x) for x, _ in pieces):
                raise ValueError(
                    f"with size={self.size} there are so few puzzles that a split has none: take a larger one"
                )
        x, y = (torch.cat(parts)[:count] for parts in zip(*pieces, strict=True))
        return x, y


class Sums(Drawn):
    """Running sums: `size` base-3 digits; answer i is the sum of digits 0 to i, modulo 3."""

    def __init__(self, size: int):
        super().__init__(size)
        self.vocab_size = self.num_classes = BASE
        self.tokens = size

    def make(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randint(BASE, (count, self.size), generator=generator)
        return x, x.cumsum(1) % BASE

    def ask(self, x: Tensor) -> str:
        return " ".join(map(str, x.tolist()))


class Mazes(Drawn):
    """Flood fill on `size` x `size` cells: walls are 1, the entrance is 2; a cell's answer is whether it is reachable
    from the entrance.
    """

    def __init__(self, size: int):
        super().__init__(size)
        self.vocab_size, self.num_classes = 3, 2
        self.tokens = size * size

    def make(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        score = torch.rand(count, self.tokens, generator=generator)
        wet = torch.zeros_like(score, dtype=torch.bool).scatter(1, score.argmax(1, keepdim=True), True)
        x = torch.where(wet, 2, (score < WALLS).long())
        free, wet = (x != 1).view(-1, self.size, self.size), wet.view(-1, self.size, self.size)
        before = torch.zeros_like(wet)
        while not torch.equal(before, wet):
            before, near = wet, pad(wet, (1, 1, 1, 1))
            wet = free & (wet | near[:, 2:, 1:-1] | near[:, :-2, 1:-1] | near[:, 1:-1, 2:] | near[:, 1:-1, :-2])
        return x, wet.flatten(1).long()

    def ask(self, x: Tensor) -> str:
        return self._grid(["o#E"[cell] for cell in x.tolist()])

    def answer(self, x: Tensor, y: Tensor) -> str:
        return self._grid(["#" if wall == 1 else "o~?"[wet] for wall, wet in zip(x.tolist(), y.tolist(), strict=True)])

    def _grid(self, cells: list[str]) -> str:
        return "\n".join("".join(cells[row : row + self.size]) for row in range(0, len(cells), self.size))


def draw(puzzle: Puzzle, count: int, split: str, key: int) -> tuple[Tensor, Tensor]:
    """Draw `count` puzzles of a split with their answers.

    Args:
        puzzle: the task.
        count: number of puzzles.
        split: "train", "val" or "test".
        key: seed; the same key gives the same puzzles.

    Returns:
        x and y, both (count, tokens) int64.

    Raises:
        ValueError: another split, or puzzles so small that the split has none.
    """
    if split not in SHARES:
        raise ValueError(f"split must be one of {', '.join(SHARES)}, got {split!r}")
    return puzzle.draw(count, SHARES[split], torch.Generator().manual_seed(key))


def in_share(digests: Tensor, share: range) -> Tensor:
    """Return which puzzles (B,) are in a share, by their digests."""
    part = digests % 16
    return (share.start <= part) & (part < share.stop)


def digest(x: Tensor) -> Tensor:
    """Return a 31-bit hash (B,) of each row of tokens (B, T): a polynomial in wrapping 64-bit integers."""
    value = torch.zeros(len(x), dtype=torch.int64)
    for column in x.unbind(1):
        value = (value + column + 1) * 6364136223846793005
    return (value >> 33) & 0x7FFFFFFF


class PuzzleBatches:
    """Training batches by step: puzzles x and answers y, both (batch_size, tokens)."""

    def __init__(self, puzzle: Puzzle, batch_size: int, *, seed: int, device: torch.device | str):
        self.puzzle, self.batch_size, self.seed, self.device = puzzle, batch_size, seed, device

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return batch `step` on the device."""
        x, y = draw(self.puzzle, self.batch_size, "train", stream(self.seed, "puzzles", step))
        return send(x, self.device), send(y, self.device)
