"""Puzzles whose answers follow from each other: a few layers can't give them all at once, step by step they are easy.

Nothing here has state: which puzzles make up a batch is a function of (seed, step). What a puzzle asks decides its
split, so validation and test never meet training, whatever the seeds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...noise.rng import stream
from ...targets.devices import send

BASE = 3
WALLS = 0.4
SHARES = {"val": range(1), "test": range(1, 2), "train": range(2, 16)}  # sixteenths of all puzzles


class Puzzle(ABC):
    """A task. x is `tokens` tokens of `symbols` kinds, each the place of an answer y of `classes` kinds.

    Raises: ValueError if size is less than 2.
    """

    symbols: int
    classes: int
    tokens: int

    def __init__(self, size: int):
        if size < 2:
            raise ValueError(f"size must be at least 2, got {size}")
        self.size = size

    @abstractmethod
    def make(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random puzzles x (count, tokens) and their answers y (count, tokens), int64."""

    @abstractmethod
    def ask(self, x: Tensor) -> str:
        """One puzzle (tokens,), for people."""

    def answer(self, x: Tensor, y: Tensor) -> str:
        """Its answers (tokens,), for people; those not known yet are -1 in y."""
        return " ".join("?" if value < 0 else str(value) for value in y.tolist())


class Sums(Puzzle):
    """`size` digits base 3; answer i is the last digit of the sum of the first i."""

    def __init__(self, size: int):
        super().__init__(size)
        self.symbols = self.classes = BASE
        self.tokens = size

    def make(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randint(BASE, (count, self.size), generator=generator)
        return x, x.cumsum(1) % BASE

    def ask(self, x: Tensor) -> str:
        return " ".join(map(str, x.tolist()))


class Mazes(Puzzle):
    """`size` by `size` cells, 2 in 5 of them walls (1), a free one the entrance (2); a cell's answer is whether water
    that enters there reaches it.
    """

    def __init__(self, size: int):
        super().__init__(size)
        self.symbols, self.classes = 3, 2
        self.tokens = size * size

    def make(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        score = torch.rand(count, self.tokens, generator=generator)
        wet = torch.zeros_like(score, dtype=torch.bool).scatter(1, score.argmax(1, keepdim=True), True)
        x = torch.where(wet, 2, (score < WALLS).long())
        free, wet = (x != 1).view(-1, self.size, self.size), wet.view(-1, self.size, self.size)
        for _ in range(self.tokens):
            near = pad(wet, (1, 1, 1, 1))
            wet = free & (wet | near[:, 2:, 1:-1] | near[:, :-2, 1:-1] | near[:, 1:-1, 2:] | near[:, 1:-1, :-2])
        return x, wet.flatten(1).long()

    def ask(self, x: Tensor) -> str:
        return self._grid(["o#E"[cell] for cell in x.tolist()])

    def answer(self, x: Tensor, y: Tensor) -> str:
        return self._grid(["#" if wall == 1 else "o~?"[wet] for wall, wet in zip(x.tolist(), y.tolist(), strict=True)])

    def _grid(self, cells: list[str]) -> str:
        return "\n".join("".join(cells[row : row + self.size]) for row in range(0, len(cells), self.size))


PUZZLES: dict[str, type[Puzzle]] = {"sums": Sums, "mazes": Mazes}


def draw(puzzle: Puzzle, count: int, split: str, key: int) -> tuple[Tensor, Tensor]:
    """`count` puzzles of "train", "val" or "test" with their answers, the same for the same key.

    Raises: ValueError on another split, or if so small puzzles leave none for it.
    """
    if split not in SHARES:
        raise ValueError(f"split must be one of {', '.join(SHARES)}, got {split!r}")
    generator, share = torch.Generator().manual_seed(key), SHARES[split]
    pieces: list[tuple[Tensor, Tensor]] = []
    while sum(len(x) for x, _ in pieces) < count:
        x, y = puzzle.make(count, generator)
        part = digest(x) % 16
        mine = (share.start <= part) & (part < share.stop)
        pieces.append((x[mine], y[mine]))
        if len(pieces) == 64 and not any(len(x) for x, _ in pieces):
            raise ValueError(
                f"with size={puzzle.size} there are so few puzzles that {split} has none: take a larger one"
            )
    x, y = (torch.cat(parts)[:count] for parts in zip(*pieces, strict=True))
    return x, y


def digest(x: Tensor) -> Tensor:
    """A number of 31 bits for each row of tokens (B, T): a polynomial in them, in wrapping 64-bit integers."""
    value = torch.zeros(len(x), dtype=torch.int64)
    for column in x.unbind(1):
        value = (value + column + 1) * 6364136223846793005
    return (value >> 33) & 0x7FFFFFFF


class PuzzleBatches:
    """Training batches by step number: x (batch_size, tokens), y (batch_size, tokens)."""

    def __init__(self, puzzle: Puzzle, batch_size: int, *, seed: int, device: torch.device | str):
        self.puzzle, self.batch_size, self.seed, self.device = puzzle, batch_size, seed, device

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Batch number `step`."""
        x, y = draw(self.puzzle, self.batch_size, "train", stream(self.seed, "puzzles", step))
        return send(x, self.device), send(y, self.device)
