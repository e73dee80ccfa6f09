"""Evaluate language models in blocks: three estimates of the code length, and a judge of generated text."""

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

from ...blocks import DiffusionBlocks
from ...noise.rng import stream
from ...sampling.decoding import filtered
from ...sampling.sampler import Sampler
from ..data.text import TextData, rows
from ..data.vocabulary import Vocabulary
from . import pretrained
from .ngram import NGram

BIT = 1 / math.log(2)
SEPARATOR = "\n\n----\n\n"  # between texts
NGRAM = "ngram"  # the judge that the training text itself makes
ORDER = 5  # characters of the judge's context: the best on the validation split of "topics"


@torch.no_grad()
def estimates(
    model: DiffusionBlocks, x: Tensor, sigmas: Sequence[float], *, draws: int = 8, seed: int = 0, batch: int = 64
) -> dict[str, float]:
    """Estimate three achievable code lengths of the sampling trajectory, in bits per token.

    Noise is drawn independently of the tokens: given the noise, each step's distribution is normalised. None of the
    three is the sampler's own likelihood or the information bound.

    Args:
        model: The model.
        x: tokens (B, N), both condition and target.
        sigmas: falling noise levels, the last 0.
        draws: trajectories per token.
        seed: of the noise.
        batch: sequences evaluated at once.

    Returns:
        first_bits: after the first step, by block 0 (for an ensemble, all blocks).
        last_bits: after the last step, averaged over draws; at least mixture_bits.
        mixture_bits: of the mean over draws of the last step's distributions.
    """
    firsts, lasts = [], []
    readers = [Sampler(model, part) for part in x.split(batch)]
    for draw in range(draws):
        pairs = [_log_likelihoods(read, sigmas, stream(seed, "estimates", draw, i)) for i, read in enumerate(readers)]
        firsts.append(torch.cat([first for first, _ in pairs]))
        lasts.append(torch.cat([last for _, last in pairs]))
    last = torch.stack(lasts).double()  # (draws, B, N)
    return {
        "first_bits": -float(torch.stack(firsts).double().mean()) * BIT,
        "last_bits": -float(last.mean()) * BIT,
        "mixture_bits": -float((torch.logsumexp(last, 0) - math.log(draws)).mean()) * BIT,
    }


def _log_likelihoods(read: Sampler, sigmas: Sequence[float], key: int) -> tuple[Tensor, Tensor]:
    """Return ln p of the reader's tokens (B, N) after the first and after the last step, for one draw of noise."""
    x, width = read.x, read.model.target.table.shape[1]
    z = sigmas[0] * dbkernels.philox_normal((*x.shape, width), seed=key, device=x.device)
    logs: list[Tensor] = []
    for sigma, below in itertools.pairwise(sigmas):
        output = read(z, sigma)
        z = read.model.target.advance(z, output, sigma, below, seed=key, step=0)
        logs.append(-functional.cross_entropy(output.raw.flatten(0, 1), x.flatten(), reduction="none").view(x.shape))
    return logs[0], logs[-1]


@dataclass(frozen=True)
class TextOptions:
    """Options of text sampling.

    Attributes:
        prompt: text to continue.
        length: tokens to generate.
        steps: denoising steps; None takes the config's.
        judge: "ngram", or a pretrained network that computes MAUVE, see `pretrained.mauve`.
        temperature: divisor of the logits.
        top_k: keep the top_k likeliest tokens.
        top_p: keep the fewest likeliest tokens whose probabilities reach top_p.
    """

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
        """Filter logits (..., V) by temperature, top_k and top_p."""
        return filtered(logits, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


def write_texts(folder: Path, samples: Tensor, vocabulary: Vocabulary) -> Path:
    """Write tokens (B, N) as text to samples.txt; return the file."""
    file = folder / "samples.txt"
    file.write_text(SEPARATOR.join(vocabulary.decode(sample) for sample in samples) + "\n", encoding="utf-8")
    return file


def write_scores(folder: Path, data: TextData, samples: Tensor, judge: str) -> Path:
    """Write the scores of tokens (B, N) to judge.json; return the file.

    judge: "ngram", or a pretrained network that adds "mauve", see `pretrained.mauve`.
    """
    scores = judged(data, samples.cpu())
    if judge != NGRAM:
        texts = [data.decode(sample) for sample in samples]
        real = [data.decode(row) for row in _spread(data.test, *samples.shape)]
        scores["mauve"] = pretrained.mauve(texts, real, judge, device=samples.device)
    file = folder / "judge.json"
    file.write_text(json.dumps(scores, indent=1) + "\n")
    return file


def judged(data: TextData, samples: Tensor) -> dict[str, Any]:
    """Score generated tokens (B, N), and as many windows of the test text, by an n-gram model of the training text.

    Returns:
        judge_bits, judge_test_bits: bits per character, the logarithm of the generative perplexity.
        distinct_2, distinct_2_test: share of distinct pairs of characters, since loops are likely under the judge too.
    """
    judge = _judge(data.decode(data.train), data.vocabulary.characters)
    parts = {"": samples, "_test": _real(data, samples)}
    texts = {name: [data.decode(row) for row in part] for name, part in parts.items()}
    bits = {f"judge{k}_bits": sum(map(judge.bits, written)) / len(written) for k, written in texts.items()}
    return bits | {f"distinct_2{name}": distinct_2(written) for name, written in texts.items()}


def distinct_2(texts: Sequence[str]) -> float:
    """Return the share of distinct pairs of characters in texts."""
    pairs = [pair for text in texts for pair in itertools.pairwise(text)]
    return len(set(pairs)) / max(1, len(pairs))


def per_character(found: dict[str, Any], rate: float) -> dict[str, Any]:
    """Return a split's scores in bits per character, of bits per token. rate: tokens per character."""
    scale = {list: lambda value: [rate * v for v in value], float: lambda value: rate * value}
    return {name: value if name == "levels" else scale[type(value)](value) for name, value in found.items()}


def _real(data: TextData, samples: Tensor) -> Tensor:
    """Return windows of the test text, as many and as long as the samples if it is long enough."""
    return rows(data.test, min(samples.shape[1], len(data.test)))[: len(samples)]


def _spread(tokens: Tensor, count: int, length: int) -> Tensor:
    """Return `count` evenly spread windows (count, length) of tokens (N,), overlapping if the text is short."""
    windows = tokens.unfold(0, min(length, len(tokens)), 1)
    return windows[torch.linspace(0, len(windows) - 1, count).round().long()]


@functools.lru_cache(maxsize=1)
def _judge(train: str, vocab_size: int) -> NGram:
    """Return the n-gram model of a training text, counted once per process."""
    return NGram(train, order=ORDER, vocab_size=vocab_size)
