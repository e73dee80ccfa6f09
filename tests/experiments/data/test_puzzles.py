"""Puzzles: answers by a solver that shares nothing with the generator, and splits that never meet."""

from __future__ import annotations

from collections import deque

import pytest
import torch

from diffusionblocks.experiments.data.puzzles import BASE, Mazes, PuzzleBatches, Sums, digest, draw


def add_up(x: list[int], size: int) -> list[int]:
    return [sum(x[: i + 1]) % BASE for i in range(size)]


def flood(x: list[int], size: int) -> list[int]:
    (entrance,) = [i for i, cell in enumerate(x) if cell == 2]
    wet, waiting = {entrance}, deque([entrance])
    while waiting:
        row, column = divmod(waiting.popleft(), size)
        for r, c in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
            cell = r * size + c
            if 0 <= r < size and 0 <= c < size and x[cell] != 1 and cell not in wet:
                wet.add(cell)
                waiting.append(cell)
    return [int(i in wet) for i in range(size * size)]


@pytest.mark.parametrize(("task", "solve", "size"), [(Sums, add_up, 9), (Mazes, flood, 6)])
def test_answers_are_those_of_an_independent_solver(task, solve, size):
    puzzle = task(size)
    x, y = draw(puzzle, 200, "train", 5)
    assert x.shape == (200, puzzle.tokens) and y.shape == (200, puzzle.tokens)
    assert int(x.min()) >= 0 and int(x.max()) == puzzle.vocab_size - 1 and int(y.max()) == puzzle.num_classes - 1
    assert [solve(row, size) for row in x.tolist()] == y.tolist()


def test_mazes_are_neither_dry_nor_drowned():
    x, y = draw(Mazes(6), 500, "train", 0)
    share = y.double().mean() / (x != 1).double().mean()
    assert 0.2 < share < 0.8  # of the cells that water could reach


@pytest.mark.parametrize("puzzle", [Sums(5), Mazes(3)], ids=lambda p: type(p).__name__)
def test_splits_never_meet_even_where_there_are_few_puzzles(puzzle):
    seen = {
        split: {tuple(row) for row in draw(puzzle, 500, split, 1)[0].tolist()} for split in ("train", "val", "test")
    }
    assert all(seen.values())
    assert not seen["train"] & seen["val"] and not seen["train"] & seen["test"] and not seen["val"] & seen["test"]


def test_a_split_without_puzzles_is_refused():
    with pytest.raises(ValueError, match="so few puzzles that a split has none: take a larger one"):
        draw(Sums(2), 4, "test", 0)


def test_the_digest_spreads_puzzles_over_the_sixteenths():
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(digest(Sums(12).make(16_000, generator)[0]) % 16, minlength=16)
    assert counts.min() > 800 and counts.max() < 1200  # 1,000 each, standard deviation 31


def test_batches_are_a_function_of_seed_and_step():
    batches = PuzzleBatches(Sums(8), 4, seed=3, device="cpu")
    first, again = batches.batch(2), PuzzleBatches(Sums(8), 4, seed=3, device="cpu").batch(2)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], batches.batch(3)[0])
    assert not torch.equal(first[0], PuzzleBatches(Sums(8), 4, seed=4, device="cpu").batch(2)[0])


def test_puzzles_are_shown_with_what_is_not_known_yet():
    assert Sums(3).ask(torch.tensor([1, 2, 0])) == "1 2 0"
    assert Sums(3).answer(torch.tensor([1, 2, 0]), torch.tensor([1, -1, 0])) == "1 ? 0"
    maze = torch.tensor([2, 0, 1, 0])
    assert Mazes(2).ask(maze) == "Eo\n#o"
    assert Mazes(2).answer(maze, torch.tensor([1, -1, 0, 0])) == "~?\n#o"


@pytest.mark.parametrize("task", [Sums, Mazes])
def test_what_cannot_be_drawn_is_refused(task):
    with pytest.raises(ValueError, match="size must be at least 2"):
        task(1)
    with pytest.raises(ValueError, match="split must be one of val, test, train"):
        draw(task(3), 4, "validation", 0)
