"""Masked diffusion language models: whole windows of text are denoised at once, from all masks to none."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...blocks import DiffusionBlocks
from ...convert.layers import partition_for
from ...denoiser import StemHead
from ...noise.partition import Partition, step_levels
from ...noise.rng import stream
from ...targets.masked import MaskedTarget
from ..config import Hidden, TrainConfig, check_at_least
from ..data.text import TextData, Windows, load, rows
from ..data.vocabulary import Vocabulary, from_facts
from ..metrics import masked_diffusion
from ..metrics.language import TextOptions, per_character, write_scores, write_texts
from ..models.masked_lm import Head, MaskedLMConfig, Stem, layers
from .base import Batches, Metric, Row, Task, parse_options

MASK = "\u2591"  # how a mask is shown, and written in a prompt


@dataclass(frozen=True)
class MaskedLMRun(TrainConfig):
    """A masked diffusion model of text."""

    architecture: ClassVar[str] = "masked_lm"

    text: str = "topics"
    """"topics" (Python's own help), "king-james" (Debian's package bible-kjv), a text file, a folder of .txt files, or
    hub:NAME."""
    tokens: Literal["characters", "bpe"] = "characters"
    """The text's tokens: characters, or byte pairs, as many as --model.vocab-size."""
    length: int = 64
    """Tokens of a window."""
    out: Path = Path("runs/mdlm-text")
    overlap: float = 0.0
    batch_size: int = 16
    lr: float = 1e-2
    sampling_steps: int = 64
    levels: int = 12
    """Levels of masking at which each window of text is evaluated; their mean is the bound."""
    tune_lr: tuple[float, ...] = (5e-3, 1e-2, 2e-2)
    tune_warmup: Hidden[tuple[float, ...]] = (0.2,)
    model: MaskedLMConfig = field(default_factory=MaskedLMConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 2, "length")
        if self.overlap:
            raise ValueError(f"overlap={self.overlap} must be 0: widening by logarithms means nothing near t = 0")
        if self.levels < self.blocks:
            raise ValueError(f"levels={self.levels} must be at least blocks={self.blocks}: every block must be read")

    def in_blocks(self, blocks: int, **changes: Any) -> TrainConfig:
        return super().in_blocks(blocks, **{"levels": max(blocks, self.levels), **changes})


class UnconditionalWindows(Windows):
    """Windows of a text as targets, nothing given: x is (batch_size, 0)."""

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        _, y = super().batch(step)
        return masked_diffusion.given(y), y


class MaskedLMTask(Task):
    """x: nothing, (B, 0). y: windows of text, (B, N)."""

    metric = Metric("bits", "bits per character", higher=False)
    config: MaskedLMRun

    @cached_property
    def data(self) -> TextData:
        """The splits."""
        c = self.config
        return load(c.text, vocab_size=c.model.vocab_size, tokens=c.tokens, stored=self.stored)

    def batches(self, device: torch.device) -> Batches:
        c = self.config
        self.data.check_windows(c.length, 2)
        return UnconditionalWindows(self.data.train, c.length, c.batch_size, seed=c.seed, device=device)

    def example(self) -> tuple[Tensor, Tensor]:
        y = torch.zeros(self.config.batch_size, self.config.length, dtype=torch.int64)
        return masked_diffusion.given(y), y

    def model(self, partition: Partition | None = None) -> DiffusionBlocks:
        c = self.config
        torch.manual_seed(stream(c.seed, "init") % 2**63)
        copies = [StemHead(Stem(c.model), Head(c.model)) for _ in range(c.blocks if c.shared == "per_block" else 1)]
        if c.shared == "frozen":
            nn.init.xavier_normal_(copies[0].head.weight)  # a head of zeros would pass no gradient to the layers
        target = MaskedTarget(c.model.vocab_size)
        partition = partition or partition_for(target, c.layer_counts)
        return DiffusionBlocks(copies, layers(c.model), target, partition, shared=c.shared)

    def evaluate(self, model: DiffusionBlocks, split: str, *, steps: int | None = None) -> Row:
        """The bound, and what a model of single tokens reaches. steps: times a window is read at."""
        tokens = self.windows(split).to(model.device)
        found = masked_diffusion.bound(model, tokens, levels=steps or self.config.levels, seed=self.config.seed)
        unigram = masked_diffusion.unigram_bits(self.data.train, self.windows(split), self.config.model.vocab_size)
        return per_character({**found, "unigram": unigram}, self.data.vocabulary.rate(tokens))

    def sample(self, model: DiffusionBlocks, folder: Path, *, count: int, seed: int, **options: Any) -> list[Path]:
        """samples.txt, trajectory.txt, the first as each block leaves it, and with a judge judge.json, their scores.

        options: TextOptions', where the prompt stays but for its masks and the length, a window's by default, counts
        it.
        """
        how = parse_options(TextOptions, {"length": self.config.length} | options, "texts")
        levels = step_levels(model.partition, how.steps or self.config.sampling_steps, kind="probability")
        start = self.start(how.prompt, how.length).to(model.device).expand(count, -1)
        steps = list(masked_diffusion.generate(model, levels, start, seed=seed, keep=how.keep))
        left = {step.block: step for step in steps}  # the last of each block
        drafts = [f"after block {b}, its last step from t = {s.t:.2f}\n{self.show(s.z[0])}" for b, s in left.items()]
        trajectory = folder / "trajectory.txt"
        trajectory.write_text("\n\n".join(drafts) + "\n", encoding="utf-8")
        files = [write_texts(folder, steps[-1].z, self.vocabulary), trajectory]
        return [*files, write_scores(folder, self.data, steps[-1].z, how.judge)] if how.judge else files

    def windows(self, split: str) -> Tensor:
        """A whole split in windows that don't overlap."""
        return rows(getattr(self.data, split), self.config.length)

    def start(self, prompt: str, length: int) -> Tensor:
        """Tokens (N,) of a prompt, each MASK in it a place to fill, and masks behind it.

        Raises: ValueError if the prompt is longer than that.
        """
        vocabulary, mask_id = self.vocabulary, self.config.model.vocab_size
        vocabulary.check(prompt.replace(MASK, ""))
        pieces = [vocabulary.encode(piece) for piece in prompt.split(MASK)]
        tokens = torch.cat([pieces[0], *(torch.cat([torch.tensor([mask_id]), piece]) for piece in pieces[1:])])
        if len(tokens) > length:
            raise ValueError(f"the prompt's {len(tokens)} tokens don't fit in length={length}; give more")
        return torch.cat([tokens, torch.full((length - len(tokens),), mask_id)])

    def show(self, tokens: Tensor) -> str:
        """The text of tokens with masks, (N,)."""
        runs = itertools.groupby(tokens.tolist(), lambda token: token == self.config.model.vocab_size)
        parts = ((hidden, list(run)) for hidden, run in runs)
        return "".join(
            MASK * len(run) if hidden else self.vocabulary.decode(torch.tensor(run)) for hidden, run in parts
        )

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokens' meaning, which a run stores."""
        return from_facts(self.facts)
