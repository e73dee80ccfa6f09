"""Autoregressive language models as diffusion blocks: the next token's embedding is denoised, given those before."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...blocks import DiffusionBlocks
from ...denoiser import StemHead
from ...noise.information import closed_form_density
from ...noise.partition import Partition, make_partition, step_levels
from ...noise.rng import stream
from ...targets.labels import spread_codebook
from ...targets.tokens import TokenTarget
from ..config import Hidden, TrainConfig, check_at_least
from ..data import text
from ..data.vocabulary import from_facts
from ..metrics.bound import bound, cross_entropy
from ..metrics.language import TextOptions, estimates, judged, per_character, write_scores, write_texts
from ..models.causal_lm import CausalHead, CausalLayer, CausalLM, CausalLMConfig, CausalStem
from ..models.generation import Generator, ancestral
from .base import Batches, Metric, Row, Task, parse_options

WRITTEN = 256  # texts that are judged, each as long as a window of training


@dataclass(frozen=True)
class CausalLMRun(TrainConfig):
    """A language model that learns to go on with a text."""

    architecture: ClassVar[str] = "causal_lm"

    text: str = "topics"
    """"topics" (Python's own help), "king-james" (Debian's package bible-kjv), a text file, a folder of .txt files, or
    hub:NAME."""
    tokens: Literal["characters", "bpe"] = "characters"
    """The text's tokens: characters, or byte pairs, as many as --model.vocab-size."""
    length: int = 64
    """Tokens of a training window."""
    out: Path = Path("runs/lm-text")
    blocks: int = 2
    steps: int = 1500
    lr: float = 4e-3
    warmup: float = 0.05
    ema: float = 0.995
    tune_lr: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    tune_warmup: Hidden[tuple[float, ...]] = (0.05,)
    context: float = 0.9
    """Share of the draws at the highest noise, where the answer must come from the tokens before."""
    combine: Literal["mean", "none"] = "mean"
    """How block outputs are combined at inference: "mean" averages logits; "none" uses each block in its own range."""
    evaluated: int = 16384
    """Tokens of a split that are evaluated."""
    model: CausalLMConfig = field(default_factory=CausalLMConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, max(2, self.model.group_size), "length")
        if self.combine not in ("mean", "none"):
            raise ValueError(f"combine must be 'mean' or 'none', got {self.combine!r}")
        if self.model.sees_z and self.combine == "mean":
            raise ValueError("combine='mean' needs blocks that don't look at z; with sees_z use combine='none'")

    @property
    def total_steps(self) -> int:
        """Steps with as many layer evaluations as `steps` end-to-end steps; a noisy stream doubles the tokens."""
        return max(1, round(self.steps * self.blocks / (2 if self.model.sees_z else 1)))


class CausalLMTask(Task):
    """x and y: the tokens. Noisy token i is given the clean ones before it."""

    metric = Metric("bits", "bits per character", higher=False)
    config: CausalLMRun

    @cached_property
    def data(self) -> text.TextData:
        """The splits."""
        c = self.config
        return text.load(c.text, vocab_size=c.model.vocab_size, tokens=c.tokens, stored=self.stored)

    def batches(self, device: torch.device) -> Batches:
        c = self.config
        self.data.check_windows(c.length, 1)
        return text.Windows(self.data.train, c.length, c.batch_size, seed=c.seed, device=device)

    def example(self) -> tuple[Tensor, Tensor]:
        y = torch.zeros(self.config.batch_size, self.config.length, dtype=torch.int64)
        return y, y

    def model(self, partition: Partition | None = None) -> DiffusionBlocks:
        c, model = self.config, self.config.model
        torch.manual_seed(stream(c.seed, "init") % 2**63)
        own = c.shared == "per_block"
        around = [StemHead(CausalStem(model), CausalHead(model)) for _ in range(c.blocks if own else 1)]
        if c.shared == "frozen":
            nn.init.xavier_normal_(around[0].head.linear.weight)  # a head of zeros would pass no gradient to the layers
        target = TokenTarget(spread_codebook(model.vocab_size, model.dim), group_size=model.group_size)
        if partition is None:
            density = closed_form_density(target.table)
            partition = make_partition(density, c.layer_counts, overlap=c.overlap)
        layers = [CausalLayer(model) for _ in range(model.layers)]
        return DiffusionBlocks(
            around if own else around[0],
            layers,
            target,
            partition,
            shared=c.shared,
            context=c.context,
            ensemble=c.combine == "mean",
        )

    def evaluate(self, model: DiffusionBlocks, split: str, *, steps: int | None = None) -> Row:
        """The information bound of the whole chain, and the three estimates on every eighth window."""
        x = self.windows(split, model.device)
        found = bound(model, x, x, count=64, seed=self.config.seed)
        sigmas = step_levels(model.partition, steps or self.config.sampling_steps)
        found |= estimates(model, x[::8], sigmas, seed=self.config.seed)
        return per_character({"bits": found["bound_bits"], **found}, self.data.vocabulary.rate(x))

    def windows(self, split: str, device: torch.device) -> Tensor:
        """The windows of a split that are evaluated."""
        every = text.rows(getattr(self.data, split), self.config.length)
        return every[: max(1, self.config.evaluated // self.config.length)].to(device)

    def sample(self, model: DiffusionBlocks, folder: Path, *, count: int, seed: int, **options: Any) -> list[Path]:
        """samples.txt: `count` texts; with a judge also judge.json, their scores. options: TextOptions'.

        All blocks are on the device at once: every token needs each of them.
        """
        how = parse_options(TextOptions, options, "texts")
        whole = self.model(model.partition).to(model.device)
        whole.load_state_dict(model.state_dict())
        size = self.config.model.group_size
        vocabulary = from_facts(self.facts)
        vocabulary.check(how.prompt)
        prompt = vocabulary.encode(how.prompt).to(model.device).expand(count, -1)
        unread, prompt = prompt.tensor_split([prompt.shape[1] % size], 1)  # whole groups are read, up to its end
        levels = step_levels(whole.partition, how.steps or self.config.sampling_steps)
        generator = Generator(whole, levels, seed=seed, keep=how.keep)
        tokens = generator.generate(prompt, -(-how.length // size) * size)
        asked = tokens[:, : prompt.shape[1] + how.length]
        tokens = torch.cat([unread, asked], 1)
        files = [write_texts(folder, tokens, vocabulary)]
        return [*files, write_scores(folder, self.data, tokens, how.judge)] if how.judge else files

    def network(self) -> nn.Module:
        """The ordinary language model."""
        torch.manual_seed(stream(self.config.seed, "init") % 2**63)
        return CausalLM(self.config.model)

    @torch.no_grad()
    def score(self, network: nn.Module, split: str, device: torch.device) -> Row:
        network.eval()
        x = self.windows(split, device)
        nats = [cross_entropy(network(part), part) * len(part) for part in x.split(64)]
        found: Row = {"bits": sum(nats) / len(x) / math.log(2) * self.data.vocabulary.rate(x)}
        if split == "test":  # the validation split is read for every rate that is tried
            start = torch.zeros(WRITTEN, 0, dtype=torch.int64, device=device)
            written = ancestral(network, start, self.config.length, seed=self.config.seed)
            found |= judged(self.data, written.cpu())
        network.train()
        return found
