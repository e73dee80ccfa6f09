"""What a language model in blocks is worth: three estimates of its code length, and a judge of what it writes."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

import dbkernels

from ...noise.rng import stream
from ...sampling.decoding import distinct_2, filtered
from ...sampling.sampler import Walker
from ..data.text import TextData, rows
from . import pretrained
from .bound import LabelReader
from .ngram import NGram

BIT = 1 / math.log(2)
ORDER = 5  # characters of the judge's context: the best on the embedded text's validation split


@torch.no_grad()
def estimates(
    walker: Walker, x: Tensor, sigmas: Sequence[float], *, draws: int = 8, seed: int = 0, batch: int = 64
) -> dict[str, float]:
    """Bits a token of three models that the walk makes, each a code length that can be achieved.

    x: tokens (B, N), which are given and predicted. sigmas: the walk's falling levels, the last 0. Noise is drawn
    independently of the tokens, so that given the noise each step's distribution is normalised.
    first_bits: after the first step, which is block 0 (with all others, in an ensemble). last_bits: after the last
    step, mean over draws: at least the mixture's. mixture_bits: of the mean of the last steps' distributions over the
    draws. None is the sampler's own likelihood, nor the information bound.
    """
    first, last = [], []
    readers = [LabelReader(walker, part) for part in x.split(batch)]
    for draw in range(draws):
        logs = [_walk(read, sigmas, stream(seed, "estimates", draw, i)) for i, read in enumerate(readers)]
        first.append(torch.cat([a for a, _ in logs]))
        last.append(torch.cat([b for _, b in logs]))
    ends = torch.stack(last)
    return {
        "first_bits": -float(torch.stack(first).double().mean()) * BIT,
        "last_bits": -float(ends.double().mean()) * BIT,
        "mixture_bits": -float((torch.logsumexp(ends.double(), 0) - math.log(draws)).mean()) * BIT,
    }


def _walk(read: LabelReader, sigmas: Sequence[float], key: int) -> tuple[Tensor, Tensor]:
    """ln p of the reader's tokens (B, N) after the first and after the last step, given one draw of noise."""
    x, width = read.x, read.walker.model.target.table.shape[1]
    z = sigmas[0] * dbkernels.philox_normal((*x.shape, width), seed=key, device=x.device)
    logs: list[Tensor] = []
    for sigma, below in itertools.pairwise(sigmas):
        output = read(z, sigma)
        r = below / sigma
        z = r * z + (1 - r) * output.denoised
        logs.append(-functional.cross_entropy(output.raw.flatten(0, 1), x.flatten(), reduction="none").view(x.shape))
    return logs[0], logs[-1]


@dataclass(frozen=True)
class TextOptions:
    """What can be asked for of texts that are made: their beginning, their length in characters, how tokens are drawn,
    steps of the walk if not the config's, and a pretrained network that judges them besides, see `pretrained.mauve`."""

    prompt: str = ""
    length: int = 256
    steps: int | None = None
    judge: str | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.length < 2:
            raise ValueError(f"length must be at least 2, got {self.length}")

    def keep(self, logits: Tensor) -> Tensor:
        """What is kept of logits (..., V)."""
        return filtered(logits, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


def write_texts(folder: Path, data: TextData, samples: Tensor, judge: str | None = None) -> list[Path]:
    """samples.txt with the text of tokens (B, N), and judge.json about it; returns the files.

    judge: a pretrained network that judges them besides, see `pretrained.mauve`.
    """
    texts = [data.decode(sample) for sample in samples]
    verdict = judged(data, samples.cpu())
    if judge:
        real = [data.decode(row) for row in _spread(data.test, *samples.shape)]
        verdict["mauve"] = pretrained.mauve(texts, real, judge, device=samples.device)
    files = {"samples.txt": "\n\n----\n\n".join(texts), "judge.json": json.dumps(verdict, indent=1)}
    for name, content in files.items():
        (folder / name).write_text(content + "\n", encoding="utf-8")
    return [folder / name for name in files]


def judged(data: TextData, samples: Tensor) -> dict[str, Any]:
    """How likely generated tokens (B, N) are to an n-gram model of the training text, and how varied they are, since
    loops are likely too; and the same for as many windows of the test text, where it has them.

    judge_bits: bits a character, the logarithm of the generative perplexity. distinct_2: share of different pairs.
    """
    judge = _judge(data.decode(data.train), len(data.alphabet))
    both = {"": samples, "_test": _real(data, samples)}
    bits = {f"judge{k}_bits": sum(judge.bits(data.decode(row)) for row in part) / len(part) for k, part in both.items()}
    return bits | {f"distinct_2{k}": distinct_2(part) for k, part in both.items()}


def _real(data: TextData, samples: Tensor) -> Tensor:
    """As many windows of the test text as there are samples, as long, where it has them."""
    return rows(data.test, min(samples.shape[1], len(data.test)))[: len(samples)]


def _spread(tokens: Tensor, count: int, length: int) -> Tensor:
    """`count` windows of tokens (N,), evenly spread, overlapping where there is too little text: (count, length)."""
    windows = tokens.unfold(0, min(length, len(tokens)), 1)
    return windows[torch.linspace(0, len(windows) - 1, count).round().long()]


@functools.lru_cache(maxsize=1)
def _judge(train: str, symbols: int) -> NGram:
    """The judge of a training text, read once a process."""
    return NGram(train, order=ORDER, symbols=symbols)
