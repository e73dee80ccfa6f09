"""Sudoku: one solution each, nothing to take away, splits that share no puzzle under any symmetry."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from diffusionblocks.experiments.data import sudoku
from diffusionblocks.experiments.data.puzzles import draw
from diffusionblocks.experiments.data.sudoku import BLANK, BOXES, Rules, Sudoku, digest


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(sudoku, "POOL", 64)
    for cached in (sudoku._pool, sudoku._members):
        cached.cache_clear()
    yield
    for cached in (sudoku._pool, sudoku._members):
        cached.cache_clear()


def grids(size: int) -> list[tuple[int, ...]]:
    """All full grids, row by row: by exhaustion, without the solver."""
    rows, columns = BOXES[size]
    found: list[tuple[tuple[int, ...], ...]] = [()]
    for r in range(size):
        grown = []
        for grid in found:
            for row in itertools.permutations(range(1, size + 1)):
                band = [*grid[r // rows * rows :], row]
                boxes = [[line[c] for line in band for c in range(k, k + columns)] for k in range(0, size, columns)]
                if all(len(set(column)) == r + 1 for column in zip(*grid, row, strict=True)) and all(
                    len(set(box)) == len(box) for box in boxes
                ):
                    grown.append((*grid, row))
        found = grown
    return [tuple(itertools.chain(*grid)) for grid in found]


def test_a_puzzle_of_four_has_one_solution_and_no_given_too_many():
    every = grids(4)
    assert len(every) == 288
    rules, rng = Rules(4), random.Random(0)
    for _ in range(10):
        puzzle, solution = rules.generate(rng)
        given = [cell for cell, token in enumerate(puzzle) if token != BLANK]

        def agree(cells, solution=solution):
            return [grid for grid in every if all(grid[cell] == solution[cell] for cell in cells)]

        assert agree(given) == [tuple(solution)]
        assert all(len(agree([c for c in given if c != cell])) > 1 for cell in given)


@pytest.mark.parametrize("size", [4, 6])
def test_answers_keep_the_rules_and_the_givens(size):
    puzzle = Sudoku(size)
    x, y = draw(puzzle, 100, "train", 3)
    rows, columns = BOXES[size]
    grid, whole = y.view(-1, size, size), torch.arange(size)
    boxes = grid.view(-1, size // rows, rows, size // columns, columns).transpose(2, 3).reshape(-1, size, size)
    assert all(bool((unit.sort(-1).values == whole).all()) for unit in (grid, grid.mT, boxes))
    assert bool((x[x > 0] - 1 == y[x > 0]).all()) and len(x.unique(dim=0)) > 90
    assert int(x.max()) == puzzle.vocab_size - 1 and puzzle.num_classes == size
    rules = Rules(size)
    assert [rules.solve(rules.start(row))[0] for row in x[:10].tolist()] == [
        [1 << d for d in row] for row in y[:10].tolist()
    ]


def test_splits_share_no_puzzle_turned_or_relabelled():
    seen = {split: set(digest(draw(Sudoku(6), 300, split, 1)[0], 6).tolist()) for split in ("train", "val", "test")}
    assert not (seen["train"] & seen["val"] or seen["train"] & seen["test"] or seen["val"] & seen["test"])
    pool = sudoku._pool(6, 0)[:, 0]
    assert len(digest(pool, 6).unique()) == 64, "the digest tells those apart that aren't symmetric"
    moved = pool.clone()
    moved[:, 0], moved[:, -1] = pool[:, -1], pool[:, 0]
    changed = moved.ne(pool).any(1)
    assert (digest(moved, 6) == digest(pool, 6))[changed].double().mean() < 0.1, "few are symmetric to what they were"


def test_hard_ones_need_guesses_and_the_solver_counts_them():
    rules, rng = Rules(9), random.Random(1)
    counts = []
    for _ in range(12):
        puzzle, solution = rules.generate(rng)
        found, guesses = rules.solve(rules.start(puzzle))
        assert [digit.bit_length() for digit in found] == solution
        counts.append(guesses)
    assert min(counts) == 0 and max(counts) > 2
    assert rules.start([1, 1] + 79 * [BLANK]) is None, "two of a digit in a row"


def test_what_makes_no_sense_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="size must be one of 4, 6, 9 for sudoku, got 5"):
        Sudoku(5)
    monkeypatch.setattr(sudoku, "TRIED", 5)
    with pytest.raises(ValueError, match="guesses=9 is too many"):
        draw(Sudoku(4, guesses=9), 1, "val", 0)
