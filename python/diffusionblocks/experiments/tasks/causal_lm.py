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
from ...denoiser import Ends
from ...noise.information import closed_form_density
from ...noise.partition import Partition, make_partition, step_levels
from ...noise.rng import stream
from ...sampling.sampler import Walker
from ...targets.labels import spread_codebook
from ...targets.tokens import TokenTarget
from ..config import TrainConfig, check_at_least
from ..data import text
from ..metrics.bound import bound, cross_entropy
from ..metrics.language import TextOptions, estimates, judged, write_texts
from ..models.causal_lm import Carry, CausalHead, CausalLayer, CausalLM, CausalLMConfig, CausalStem
from ..models.generation import Generator, ancestral
from ..session import Batches
from .base import Adapter, Metric, Row, taken

WRITTEN = 256  # texts that are judged, each as long as a window of training


@dataclass(frozen=True)
class CausalLMRun(TrainConfig):
    """A language model that learns to go on with a text."""

    architecture: ClassVar[str] = "causal_lm"

    text: str = "topics"
    """"topics" (Python's help, embedded), a file, a folder of .txt files, or hub:NAME."""
    length: int = 64
    """Tokens of a training window."""
    out: Path = Path("runs/lm-text")
    blocks: int = 2
    steps: int = 1500
    lr: float = 4e-3
    warmup: float = 0.05
    ema: float = 0.995
    tune_lr: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    tune_warmup: tuple[float, ...] = (0.05,)
    context: float = 0.9
    """Share of the draws at the highest noise, where the answer must come from the tokens before."""
    combine: Literal["mean", "carry", "none"] = "mean"
    """How blocks work together: by the "mean" of their logits when they are read, while each is trained alone; by a
    "carry" of what those before made of the clean tokens, without gradient, in training too: the depth of all, at the
    price of forward passes and of independence; or not at all."""
    evaluated: int = 16384
    """Tokens of a split that are evaluated."""
    model: CausalLMConfig = field(default_factory=CausalLMConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, max(2, self.model.group_size), "length")
        if self.model.sees_z and self.combine == "mean":
            raise ValueError("combine='mean' needs blocks that don't look at z; with sees_z use 'none' or 'carry'")

    @property
    def total_steps(self) -> int:
        """As many layer evaluations as `steps` end-to-end steps: a forward pass alone counts a third, and block b
        takes b of them for what it is given; a noisy stream doubles the tokens."""
        carrying = (self.blocks - 1) / 6 if self.combine == "carry" else 0
        return max(1, round(self.steps * self.blocks / (1 + carrying) / (2 if self.model.sees_z else 1)))


class CausalLMAdapter(Adapter):
    """x and y: the tokens. Noisy token i is given the clean ones before it."""

    metric = Metric("bits", "bits a character", higher=False)
    config: CausalLMRun

    @cached_property
    def data(self) -> text.TextData:
        """The splits."""
        return text.load(self.config.text, symbols=self.config.model.symbols)

    def batches(self, device: torch.device) -> Batches:
        c = self.config
        self.data.check_windows(c.length, 1)
        return text.Windows(self.data.train, c.length, c.batch_size, seed=c.seed, device=device)

    def example(self) -> tuple[Tensor, Tensor]:
        y = torch.zeros(self.config.batch_size, self.config.length, dtype=torch.int64)
        return y, y

    def blocks(self, partition: Partition | None = None) -> DiffusionBlocks:
        c, model = self.config, self.config.model
        torch.manual_seed(stream(c.seed, "init") % 2**63)
        own = c.shared == "per_block"
        ends = [Ends(CausalStem(model), CausalHead(model)) for _ in range(c.blocks if own else 1)]
        if c.shared == "frozen":
            nn.init.xavier_normal_(ends[0].head.linear.weight)  # a head of zeros would pass no gradient to the layers
        target = TokenTarget(spread_codebook(model.symbols, model.dim), group_size=model.group_size)
        if partition is None:
            density = closed_form_density(target.table)
            partition = make_partition(density, c.layer_counts, overlap=c.overlap)
        layers = [CausalLayer(model) for _ in range(model.layers)]
        carries = [Carry(model) for _ in range(c.blocks - 1)] if c.combine == "carry" else []
        return DiffusionBlocks(
            ends if own else ends[0],
            layers,
            target,
            partition,
            shared=c.shared,
            context=c.context,
            carries=carries,
            ensemble=c.combine == "mean",
        )

    def evaluate(self, walker: Walker, split: str, *, steps: int | None = None) -> Row:
        """The information bound of the whole chain, and the three estimates on every eighth window."""
        x = self.windows(split, walker.device)
        found = bound(walker, x, x, count=64, seed=self.config.seed)
        sigmas = step_levels(walker.model.partition, steps or self.config.walk_steps)
        return {"bits": found["bound_bits"], **found, **estimates(walker, x[::8], sigmas, seed=self.config.seed)}

    def windows(self, split: str, device: torch.device) -> Tensor:
        """The windows of a split that are evaluated."""
        every = text.rows(getattr(self.data, split), self.config.length)
        return every[: max(1, self.config.evaluated // self.config.length)].to(device)

    def sample(self, walker: Walker, folder: Path, *, count: int, seed: int, **options: Any) -> list[Path]:
        """samples.txt: `count` texts; judge.json: what they are worth. options: TextOptions'.

        All blocks are on the device at once: every token needs each of them.
        """
        how = taken(TextOptions, options, "texts")
        model = self.blocks(walker.model.partition).to(walker.device)
        model.load_state_dict(walker.weights())
        size = self.config.model.group_size
        prompt = text.encode(how.prompt, self.data.alphabet).to(walker.device).expand(count, -1)
        unread, prompt = prompt.tensor_split([prompt.shape[1] % size], 1)  # whole groups are read, up to its end
        levels = step_levels(model.partition, how.steps or self.config.walk_steps)
        generator = Generator(model, levels, seed=seed, keep=how.keep)
        tokens = generator.generate(prompt, -(-how.length // size) * size)
        asked = tokens[:, : prompt.shape[1] + how.length]
        return write_texts(folder, self.data, torch.cat([unread, asked], 1), how.judge)

    def network(self) -> nn.Module:
        """The ordinary language model."""
        torch.manual_seed(stream(self.config.seed, "init") % 2**63)
        return CausalLM(self.config.model)

    @torch.no_grad()
    def score(self, network: nn.Module, split: str, device: torch.device) -> Row:
        network.eval()
        x = self.windows(split, device)
        nats = [cross_entropy(network(part), part) * len(part) for part in x.split(64)]
        found: Row = {"bits": sum(nats) / len(x) / math.log(2)}
        if split == "test":  # the validation split is read for every rate that is tried
            start = torch.zeros(WRITTEN, 0, dtype=torch.int64, device=device)
            written = ancestral(network, start, self.config.length, seed=self.config.seed)
            found |= judged(self.data, written.cpu())
        network.train()
        return found
