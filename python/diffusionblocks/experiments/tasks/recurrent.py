"""Recurrent depth as one diffusion block: the core, applied again and again, denoises at every level."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...blocks import DiffusionBlocks
from ...denoiser import StemHead
from ...noise import edm
from ...noise.information import closed_form_density
from ...noise.partition import Partition, make_partition, step_levels
from ...noise.rng import stream
from ...sampling.sampler import BATCH, Sampler
from ...sampling.samplers import euler
from ...targets.labels import spread_codebook
from ...targets.tokens import TokenTarget
from ..config import Hidden, TrainConfig
from ..data.puzzles import Mazes, Puzzle, PuzzleBatches, Sums, draw
from ..data.sudoku import Sudoku
from ..metrics.bound import accuracy, bound
from ..models.layers import RotaryLayer
from ..models.recurrent import Coda, Prelude, Recurrent, RecurrentConfig, layer_evaluations
from .base import Batches, Metric, Row, Task

WIDTH = 16  # of the codebook
PASSES = (1, 2, 4, 8, 16, 32)
PUZZLES: dict[str, type[Puzzle]] = {"sums": Sums, "mazes": Mazes, "sudoku": Sudoku}


@dataclass(frozen=True)
class RecurrentRun(TrainConfig):
    """A recurrent-depth network that learns to solve puzzles.

    `steps` are those of the ordinary network, trained through time; block-wise training gets as many as `share` of
    their layer evaluations pay for."""

    architecture: ClassVar[str] = "recurrent"

    task: Literal["sums", "mazes", "sudoku"] = "sums"
    """Puzzles: running sums, which cells of a maze water reaches, or Sudoku."""
    size: int = 16
    """Digits of a sum, cells along a side of a maze, or of a Sudoku: 4, 6 or 9."""
    guesses: int = 0
    """The least number of guesses that a solver of the Sudokus needs: 0 takes easy ones, too."""
    out: Path = Path("runs/recurrent-sums")
    blocks: int = 1
    overlap: float = 0.0
    steps: int = 1500
    lr: float = 1e-3
    warmup: float = 0.1
    tune_lr: tuple[float, ...] = (2.5e-4, 5e-4, 1e-3)
    tune_warmup: Hidden[tuple[float, ...]] = (0.1,)
    share: float = 0.1
    """Layer evaluations of block-wise training as a share of the ordinary network's."""
    context: float = 0.1
    """Share of the draws at the highest noise, where the answers must come from the puzzle alone."""
    sampling_steps: int = 16
    evaluated: int = 512
    """Puzzles of a split that are evaluated."""
    model: RecurrentConfig = field(default_factory=RecurrentConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks != 1:
            raise ValueError(f"blocks={self.blocks}: the one core denoises at every level of noise; use blocks=1")
        if self.overlap:
            raise ValueError(f"overlap={self.overlap} must be 0: one core has no neighbours")
        if self.shared == "frozen":
            raise ValueError("shared='frozen' would keep an untrained prelude and coda; use 'shared' or 'per_block'")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share}")
        if self.evaluated < 1:
            raise ValueError(f"evaluated must be at least 1, got {self.evaluated}")
        if self.guesses < 0 or (self.guesses and self.task != "sudoku"):
            raise ValueError(f"guesses={self.guesses} must be 0, or positive for task='sudoku'")
        self.puzzle  # noqa: B018  (raises on a bad size)

    @property
    def puzzle(self) -> Puzzle:
        """The task."""
        return Sudoku(self.size, self.guesses) if self.task == "sudoku" else PUZZLES[self.task](self.size)

    @property
    def block_counts(self) -> range:
        return range(1, 2)

    @cached_property
    def budget(self) -> float:
        """Layer evaluations of the ordinary network's training."""
        return layer_evaluations(self.model, steps=self.steps, seed=self.seed)

    @property
    def total_steps(self) -> int:
        return max(1, round(self.share * self.budget / self.model.evaluated))


class Beliefs(TokenTarget):
    """Tokens of which the network is shown not z but what z says: the mean of the codebook under p(token | z).

    The posterior needs no more of z than that, so a network that reads it need not be told the level.
    """

    def inputs(self, z: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """D by Bayes' rule from z (B, N, d) alone, of unit mean square where certain, and c_noise (B, N)."""
        levels, table = self.level_per_point(sigma, z).float(), self.table.float()
        seen = (self.evidence(z) / levels.square().unsqueeze(-1)).softmax(-1) @ table
        return seen / self.sigma_data, edm.precondition(levels, self.sigma_data).c_noise


class RecurrentTask(Task):
    """x: puzzles. y: their answers, all denoised at once, each at a noise level of its own."""

    metric = Metric("accuracy", "accuracy %")
    config: RecurrentRun

    def batches(self, device: torch.device) -> Batches:
        c = self.config
        for split in ("val", "test"):
            self.puzzles(split, device)  # a size with too few puzzles for all splits says so before training
        return PuzzleBatches(c.puzzle, c.batch_size, seed=c.seed, device=device)

    def example(self) -> tuple[Tensor, Tensor]:
        count, puzzle = self.config.batch_size, self.config.puzzle
        x = torch.zeros(count, puzzle.tokens, dtype=torch.int64)
        return x, torch.zeros(count, puzzle.tokens, dtype=torch.int64)

    def model(self, partition: Partition | None = None) -> DiffusionBlocks:
        c, puzzle = self.config, self.config.puzzle
        torch.manual_seed(stream(c.seed, "init") % 2**63)
        target = Beliefs(spread_codebook(puzzle.num_classes, WIDTH))
        around = StemHead(Prelude(c.model, puzzle, WIDTH), Coda(c.model, puzzle))
        partition = partition or make_partition(closed_form_density(target.table), c.model.layers, 1)
        layers = [RotaryLayer(c.model, conditioned=False) for _ in range(c.model.layers)]
        own = c.shared == "per_block"
        return DiffusionBlocks(
            [around] if own else around, layers, target, partition, shared=c.shared, context=c.context
        )

    def evaluate(self, model: DiffusionBlocks, split: str, *, steps: int | None = None) -> Row:
        """Accuracy by number of passes, along one trajectory, and the information bound."""
        x, y = self.puzzles(split, model.device)
        steps = steps or self.config.sampling_steps
        paths = {passes: self.trajectory(model, x, passes) for passes in {*PASSES, steps}}
        path, last = paths[steps], {passes: paths[passes][-1]["logits"] for passes in PASSES}
        rows = [{k: step[k] for k in ("step", "sigma", "block")} | solved(step["logits"], y) for step in path]
        return {
            **solved(path[-1]["logits"], y),
            "passes": [{"passes": passes, **solved(logits, y)} for passes, logits in last.items()],
            "layer_evaluations": float(self.config.total_steps * self.config.model.evaluated),
            "trajectory": rows,
            **bound(model, x, y, seed=self.config.seed),
        }

    def trajectory(self, model: DiffusionBlocks, x: Tensor, passes: int) -> list[Row]:
        """Each pass's number, level, block and logits (B, N, K), from no belief (z = 0) down to no noise."""
        target, read = model.target, Sampler(model, x)
        rows: list[Row] = []

        def denoise(z: Tensor, sigma: float) -> Tensor:
            output = read(z, sigma)
            rows.append({"step": len(rows), "sigma": sigma, "block": 0, "logits": output.raw})
            return output.denoised

        z = torch.zeros(len(x), self.config.puzzle.tokens, target.table.shape[1], device=x.device)
        euler(denoise, z, step_levels(model.partition, passes, kind="probability"))
        return rows

    def sample(self, model: DiffusionBlocks, folder: Path, *, count: int, seed: int, **options: Any) -> list[Path]:
        """puzzles.txt: test puzzles with the answers after each pass, "?" where none has half the probability.

        options: steps.
        """
        steps = options.pop("steps", None) or self.config.sampling_steps
        if options:
            raise ValueError(f"puzzles take no {', '.join(options)}; leave it out")
        puzzle = self.config.puzzle
        x, y = (t.to(model.device) for t in draw(puzzle, count, "test", stream(seed, "sample")))
        path = self.trajectory(model, x, steps)
        guesses = [step["logits"].softmax(-1).max(-1) for step in path]
        lines = []
        for i in range(count):
            lines += [f"puzzle {i}", puzzle.ask(x[i])]
            for number, (sure, guess) in enumerate(guesses, 1):
                lines += [f"pass {number}", puzzle.answer(x[i], torch.where(sure[i] > 0.5, guess[i], -1))]
            lines += ["right", puzzle.answer(x[i], y[i]), ""]
        file = folder / "puzzles.txt"
        file.write_text("\n".join(lines) + "\n")
        return [file]

    def network(self) -> nn.Module:
        """The ordinary recurrent network, trained through time."""
        torch.manual_seed(stream(self.config.seed, "init") % 2**63)
        return Recurrent(self.config.model, self.config.puzzle)

    @torch.no_grad()
    def score(self, network: nn.Module, split: str, device: torch.device) -> Row:
        """Accuracy by number of passes."""
        x, y = self.puzzles(split, device)
        network.eval()

        def after(passes: int) -> Row:
            return solved(torch.cat([network(part, passes) for part in x.split(BATCH)]), y)

        rows = {passes: after(passes) for passes in {*PASSES, self.config.sampling_steps}}
        row = {
            **rows[self.config.sampling_steps],
            "passes": [{"passes": passes, **rows[passes]} for passes in PASSES],
            "layer_evaluations": self.config.budget,
        }
        network.train()
        return row

    def puzzles(self, split: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """The puzzles of "val" or "test", the same for every seed, and their answers."""
        assert split in ("val", "test")
        x, y = draw(self.config.puzzle, self.config.evaluated, split, stream(0, "held out"))  # type: ignore[arg-type]
        return x.to(device), y.to(device)


def solved(logits: Tensor, y: Tensor) -> Row:
    """Percent of answers that are right, and of puzzles with no wrong answer. logits: (B, N, K); y: (B, N)."""
    exact = (logits.argmax(-1) == y).all(-1).double().mean() * 100
    return {"accuracy": accuracy(logits, y), "exact": float(exact)}
