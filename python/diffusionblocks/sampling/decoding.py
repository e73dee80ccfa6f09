"""From logits to tokens: temperature, top-k, top-p, mixtures over noise draws, bridges, and distinct-2.

They mean something where a distribution isn't one-hot already: at the first steps of a walk, or in a mixture over draws
of the noise. At the last step z has told the answer, and no temperature changes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import dbkernels

Filter = Callable[[Tensor], Tensor]


def filtered(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Divide logits (..., V) by the temperature, up to a constant of each row; set all to -inf but the top_k likeliest
    words and the fewest likeliest whose probabilities reach top_p. Of equally likely words the first are kept.

    Raises: ValueError if temperature isn't positive, top_k isn't at least 1 or top_p isn't in (0, 1].
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be positive: for the likeliest word take argmax")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in (0, 1]")
    logits = logits.float()
    # The largest becomes 0, which no temperature makes infinite; what rounds to 0 in float32 would make it NaN.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, torch.finfo(torch.float32).tiny)
    if top_k is not None and top_k < logits.shape[-1]:
        order = logits.sort(dim=-1, descending=True, stable=True).indices
        logits = logits.scatter(-1, order[..., top_k:], -torch.inf)
    if top_p is not None and top_p < 1:
        falling, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        beyond = falling.cumsum(-1) - falling >= top_p  # what is likelier reaches top_p already
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    return logits


def draw(logits: Tensor, *, seed: int, offset: int = 0) -> Tensor:
    """Draw tokens (...) from softmax(logits), (..., V), by the Gumbel trick and random numbers by address: the same on
    every device for the same (seed, offset). Words are drawn down to probabilities of 2^-47."""
    coarse, fine = dbkernels.philox_uniform((2, *logits.shape), seed=seed, offset=offset, device=logits.device).double()
    # Uniforms are odd multiples of 2^-24: a second one fills the gap around the first. With one alone the exponential
    # had no value below 2^-24, so a word of smaller probability could win no race.
    uniform = coarse + (fine - 0.5) * 2.0**-23
    exponential = -torch.log1p(-uniform)
    return (logits.double() - exponential.log()).argmax(-1)


def mixture(logits: Tensor) -> Tensor:
    """Log-probabilities (..., V) of the mean over draws of the distributions of logits (draws, ..., V): a valid model,
    whose cross-entropy is an achievable code length."""
    return torch.logsumexp(logits.float().log_softmax(-1), 0) - math.log(len(logits))


def bridge(logits: Tensor, table: Tensor, how: str = "mean", *, seed: int = 0, offset: int = 0) -> Tensor:
    """The denoised estimate (..., e) between two steps, from logits (..., V) and embeddings (V, e).

    how: "mean", softmax(logits)·E; "argmax", the likeliest word's embedding; "sample", that of a drawn word.
    Raises: ValueError on another `how`.
    """
    if how == "mean":
        return logits.float().softmax(-1).to(table.dtype) @ table
    if how == "argmax":
        return table[logits.argmax(-1)]
    if how == "sample":
        return table[draw(logits, seed=seed, offset=offset)]
    raise ValueError(f'how must be "mean", "argmax" or "sample", got {how!r}')


def distinct_2(tokens: Tensor) -> float:
    """Share of distinct pairs of neighbours among all in tokens (B, N): near 0 for loops, which generative perplexity
    rewards. Print it beside.

    Raises: ValueError without two neighbours.
    """
    if tokens.dim() != 2 or tokens.shape[1] < 2 or len(tokens) == 0:
        raise ValueError(f"tokens must be (B >= 1, N >= 2), got {tuple(tokens.shape)}")
    pairs = torch.stack([tokens[:, :-1], tokens[:, 1:]], -1).reshape(-1, 2)
    return len(pairs.unique(dim=0)) / len(pairs)
