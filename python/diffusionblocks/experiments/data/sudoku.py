"""Sudoku: a solver that counts its guesses, a generator of puzzles with one solution, and their symmetries."""

from __future__ import annotations

import functools
import random

import torch
from torch import Tensor

from ...noise.rng import stream
from .puzzles import Puzzle, in_share

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # rows and columns of a box, by side
POOL = 1024  # puzzles that all others are symmetric to
TRIED = 200  # puzzles made for each one that is hard enough, before giving up
BLANK = 0  # token of an empty cell; digit d is token d + 1


class Rules:
    """The cells of a grid that must differ, and a solver. A state has a bit mask of the digits left to each cell."""

    def __init__(self, size: int):
        rows, columns = BOXES[size]
        self.size, self.cells, self.all = size, size * size, (1 << size) - 1
        places = [divmod(cell, size) for cell in range(self.cells)]
        groups = [("row", r) for r, _ in places], [("column", c) for _, c in places]
        boxes = [("box", r // rows * rows + c // columns) for r, c in places]
        names = list(zip(*groups, boxes, strict=True))  # the three units of each cell
        self.units = [[i for i, own in enumerate(names) if name in own] for name in sorted(set().union(*names))]
        self.peers = [
            [j for j in range(self.cells) if j != i and set(names[i]) & set(names[j])] for i in range(self.cells)
        ]

    def start(self, puzzle: list[int]) -> list[int] | None:
        """Return the state of a puzzle's tokens, propagated; None if they contradict each other."""
        state = [self.all] * self.cells
        for cell, token in enumerate(puzzle):
            if token != BLANK and not self.place(state, cell, 1 << (token - 1)):
                return None
        return state if self.propagate(state) else None

    def place(self, state: list[int], cell: int, digit: int) -> bool:
        """Give a cell its digit (a bit), and cells with one digit left theirs; return False on a contradiction."""
        if not state[cell] & digit:
            return False
        state[cell], waiting = digit, [cell]
        while waiting:
            cell = waiting.pop()
            digit = state[cell]
            for peer in self.peers[cell]:
                if state[peer] & digit:
                    state[peer] ^= digit
                    if not state[peer]:
                        return False
                    if state[peer].bit_count() == 1:
                        waiting.append(peer)
        return True

    def propagate(self, state: list[int]) -> bool:
        """Place digits that have one cell left in a unit, while there are any; return False on a contradiction."""
        again = True
        while again:
            again = False
            for unit in self.units:
                once = twice = 0
                for cell in unit:
                    twice |= once & state[cell]
                    once |= state[cell]
                if once != self.all:
                    return False
                lone = once & ~twice
                for cell in unit:
                    digit = state[cell] & lone
                    if digit and digit != state[cell]:
                        if not self.place(state, cell, digit):
                            return False
                        again = True
        return True

    def solve(self, state: list[int], rng: random.Random | None = None) -> tuple[list[int] | None, int]:
        """Return a solution (None if there is none) and the number of guesses that were made.

        A guess tries the digits left to a cell with the fewest, in order, or in an order that `rng` draws.
        """
        open_cells = [cell for cell, left in enumerate(state) if left.bit_count() > 1]
        if not open_cells:
            return state, 0
        cell, guesses = min(open_cells, key=lambda cell: state[cell].bit_count()), 0
        digits = [1 << d for d in range(self.size) if state[cell] >> d & 1]
        if rng is not None:
            rng.shuffle(digits)
        for digit in digits:
            branch, guesses = state.copy(), guesses + 1
            if self.place(branch, cell, digit) and self.propagate(branch):
                solution, more = self.solve(branch, rng)
                guesses += more
                if solution is not None:
                    return solution, guesses
        return None, guesses

    def generate(self, rng: random.Random) -> tuple[list[int], list[int]]:
        """Draw a puzzle with one solution, which no given can be taken from; return its tokens and the solution's."""
        state, _ = self.solve([self.all] * self.cells, rng)
        assert state is not None
        solution = [left.bit_length() for left in state]
        puzzle = solution.copy()
        for cell in rng.sample(range(self.cells), self.cells):
            token, puzzle[cell] = puzzle[cell], BLANK
            other = self.start(puzzle)
            assert other is not None
            other[cell] &= ~(1 << (token - 1))  # is there a solution with another digit here?
            if other[cell] and self.propagate(other) and self.solve(other)[0] is not None:
                puzzle[cell] = token
        return puzzle, solution


class Sudoku(Puzzle):
    """Sudoku on `size` x `size` cells, 4, 6 or 9: x has the givens, y all digits.

    POOL puzzles with one solution and no given too many, the same in every run, are made when the first is needed. Each
    batch draws from them under random symmetries: other digits, rows and columns in another order.

    Args:
        size: cells along a side.
        guesses: the least number of guesses of the solver, which otherwise places digits that have one cell left, or
            cells that have one digit left.
    """

    def __init__(self, size: int, guesses: int = 0):
        if size not in BOXES:
            raise ValueError(f"size must be one of {', '.join(map(str, BOXES))} for sudoku, got {size}")
        super().__init__(size)
        self.guesses = guesses
        self.vocab_size, self.num_classes, self.tokens = size + 1, size, size * size

    def draw(self, count: int, share: range, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        pool, size = _members(self.size, self.guesses, share), self.size
        both = pool[torch.randint(len(pool), (count,), generator=generator)].view(count, 2, size, size)
        rows, columns = BOXES[size]
        down, across = (_orders(count, size // part, part, generator) for part in (rows, columns))
        both = both.gather(2, down[:, None, :, None].expand_as(both))
        both = both.gather(3, across[:, None, None, :].expand_as(both))
        if rows == columns:
            turned = torch.rand(count, generator=generator) < 0.5
            both = torch.where(turned[:, None, None, None], both.mT, both)
        digits = torch.rand(count, size, generator=generator).argsort(1) + 1
        names = torch.cat([torch.full((count, 1), BLANK), digits], 1)
        x, y = names.gather(1, both.flatten(1)).view(count, 2, -1).unbind(1)
        return x, y - 1

    def ask(self, x: Tensor) -> str:
        return self._grid([str(token) if token else "." for token in x.tolist()])

    def answer(self, x: Tensor, y: Tensor) -> str:
        return self._grid(["?" if digit < 0 else str(digit + 1) for digit in y.tolist()])

    def _grid(self, cells: list[str]) -> str:
        return "\n".join(" ".join(cells[row : row + self.size]) for row in range(0, len(cells), self.size))


@functools.cache
def _pool(size: int, guesses: int) -> Tensor:
    """Return POOL puzzles and their solutions, tokens (POOL, 2, cells) int64.

    Raises: ValueError if next to no puzzle needs so many guesses.
    """
    rules, rng = Rules(size), random.Random(stream(0, "sudoku", size))
    found: list[tuple[list[int], list[int]]] = []
    tried = 0
    while len(found) < POOL:
        puzzle, solution = rules.generate(rng)
        state, tried = rules.start(puzzle), tried + 1
        assert state is not None
        if guesses == 0 or rules.solve(state)[1] >= guesses:
            found.append((puzzle, solution))
        elif tried >= TRIED * (len(found) + 1):
            raise ValueError(f"guesses={guesses} is too many: of {tried} puzzles of size={size} {len(found)} need them")
    return torch.tensor(found)


@functools.cache
def _members(size: int, guesses: int, share: range) -> Tensor:
    """Return the puzzles of the pool that are in a share."""
    pool = _pool(size, guesses)
    return pool[in_share(digest(pool[:, 0], size), share)]


def digest(x: Tensor, size: int) -> Tensor:
    """Return a hash (B,) of Sudokus (B, size²) that all symmetric ones have in common, so that they are in one split.

    The hash of a cell grows out of those of its row, column, box and digit, whatever their order.
    """
    rows, columns = BOXES[size]
    cells = (x != BLANK).long().view(-1, size, size)
    same = (x[:, :, None] == x[:, None, :]) & (x != BLANK)[:, :, None]  # (B, T, T)
    for _ in range(4):
        boxes = cells.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).sum((2, 4))
        box = boxes.repeat_interleave(rows, 1).repeat_interleave(columns, 2)
        digit = (same * cells.flatten(1)[:, None, :]).sum(2).view_as(cells)
        lines = _mixed(cells.sum(1, keepdim=True)) + _mixed(cells.sum(2, keepdim=True))
        cells = _mixed(cells + 3 * lines + 5 * _mixed(box) + 7 * _mixed(digit))
    return (cells.flatten(1).sum(1) >> 33) & 0x7FFFFFFF


def _orders(count: int, bands: int, lines: int, generator: torch.Generator) -> Tensor:
    """Draw orders (count, bands * lines) of lines that keep those of a band together."""
    band = torch.rand(count, bands, 1, generator=generator).argsort(1)
    line = torch.rand(count, bands, lines, generator=generator).argsort(2)
    return (band * lines + line).flatten(1)


def _mixed(value: Tensor) -> Tensor:
    """Scramble 64-bit integers, one by one."""
    value = (value ^ (value >> 29)) * -4658895280553007687
    return (value ^ (value >> 32)) * 6364136223846793005
