"""Counting the information about a discrete target: closed form, online estimate, likelihood bound.

For y from a finite set, z = y + sigma eps and a denoised estimate D, the information that falls between two noise
levels is 1/2 the integral of E|y - D|^2 d(1/sigma^2), in nats.
Source: Guo, Shamai, Verdu 2005; Kong, Brekelmans, Ver Steeg 2023, "Information-theoretic diffusion".
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .density import Tabulated

BINS = 64
ROWS = 256  # of a codebook that its noise is computed from: the time goes with their number


def prior_error(table: Tensor, sigmas: Tensor, *, draws: int = 2048, seed: int = 0) -> Tensor:
    """E|y - D|^2 of the best denoiser that sees z alone: D is the exact posterior mean over a uniform codebook.

    table: (K, d) target embeddings. sigmas: (T,). Returns (T,) float64, on the CPU.
    The expectation over noise is a mean over `draws` fixed normal draws, spread evenly over the K classes.
    """
    table = _coordinates(table)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(draws) % len(table)
    eps = torch.randn(draws, table.shape[1], generator=generator, dtype=torch.float64)
    clean = table[labels]
    return torch.stack([_error_at(table, clean, eps, s) for s in sigmas.double().cpu()])


def _coordinates(table: Tensor) -> Tensor:
    """The codebook in a basis of its own span: noise outside it says nothing and need not be drawn."""
    U, S, _ = torch.linalg.svd(table.detach().double().cpu(), full_matrices=False)
    return U * S


def _error_at(table: Tensor, clean: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    z = clean + sigma * eps
    logits = (z @ table.T - table.square().sum(-1) / 2) / sigma.square()
    return (logits.softmax(-1) @ table - clean).square().sum(-1).mean()


def closed_form_density(table: Tensor, *, tail: float = 1e-3) -> Tabulated:
    """The density of information over ln sigma for a codebook when nothing else is known, as training noise.

    table: (K, d). The range is cut where less than `tail` of the information lies beyond either end; both ends follow
    from the closed form alone, so the same codebook always gets the same range. More than ROWS rows are read by ROWS of
    them: sigma, where K random points are told apart, goes with 1 / sqrt(ln K), so the noise is shifted by that.
    Raises: ValueError if the codebook has fewer than two rows or two equal rows.
    """
    _check_table(table)
    shift, draws = 0.0, 2048
    if (rows := len(table)) > ROWS:
        draws = 2 * ROWS
        table, shift = table[torch.linspace(0, rows - 1, ROWS).long()], math.log(math.log(ROWS) / math.log(rows)) / 2
    values = table.detach().double().cpu().contiguous()
    return _computed_density(values.numpy().tobytes(), len(values), tail, shift, draws)


@functools.lru_cache(maxsize=32)
def _computed_density(values: bytes, rows: int, tail: float, shift: float, draws: int) -> Tabulated:
    """Return closed_form_density of float64 rows; models of one codebook are often made in turn."""
    table = torch.frombuffer(bytearray(values), dtype=torch.float64).view(rows, -1)
    scale = float(torch.pdist(table).median())  # of one distance, where there are two rows
    log_edges = torch.linspace(math.log(scale / 100), math.log(scale * 100), 129, dtype=torch.float64)
    centres = (log_edges[1:] + log_edges[:-1]) / 2
    share = _information(prior_error(table, centres.exp(), draws=draws), centres)
    kept = _inner(share / share.sum(), tail)
    cut = torch.linspace(float(log_edges[kept[0]]), float(log_edges[kept[1] + 1]), BINS + 1, dtype=torch.float64)
    centres = (cut[1:] + cut[:-1]) / 2
    mass = _information(prior_error(table, centres.exp(), draws=draws), centres)
    return Tabulated(tuple((cut + shift).tolist()), tuple(mass.tolist()))


def _information(error: Tensor, log_sigma: Tensor) -> Tensor:
    """Nats per unit of ln sigma: d(1/sigma^2)/2 = sigma^-2 d ln sigma."""
    return error * (-2 * log_sigma).exp()


def _inner(share: Tensor, tail: float) -> tuple[int, int]:
    """First and last bin to keep so that at most `tail` of the mass is cut off at each end."""
    below, above = share.cumsum(0), share.flip(0).cumsum(0).flip(0)
    return int((below > tail).nonzero()[0]), int((above > tail).nonzero()[-1])


def _check_table(table: Tensor) -> None:
    if table.dim() != 2 or len(table) < 2:
        raise ValueError(f"the codebook must be (K, d) with K >= 2, got {tuple(table.shape)}")
    if len(torch.unique(table.detach(), dim=0)) < len(table):
        raise ValueError("two rows of the codebook are equal: those labels can never be told apart")


class InformationMeter:
    """Where the model still has information to gain: E|y - D|^2 by noise level, gathered while training.

    Holds, per bin of `prior`, a decayed sum of errors and of draws; `update` stays on the device. `density()` is what
    the next draws should follow: half the measured information, half the closed form: no level starves.
    Compare Dieleman et al. 2022, "Continuous diffusion for categorical data" (time warping).
    """

    def __init__(self, prior: Tabulated, *, decay: float = 0.998, device: torch.device | str = "cpu"):
        self.prior, self.decay = prior, decay
        self.log_edges = torch.tensor(prior.log_edges, dtype=torch.float64, device=device)
        self.sums = torch.zeros(2, len(prior.mass), dtype=torch.float64, device=device)

    def update(self, sigma: Tensor, error: Tensor) -> None:
        """Add a batch. sigma, error: (B,), error = |y - D|^2 per sample."""
        bins = torch.bucketize(sigma.double().log(), self.log_edges[1:-1])
        # a product with one-hot rows, as adding by index is not deterministic on GPUs
        member = (bins.unsqueeze(-1) == torch.arange(self.sums.shape[1], device=bins.device)).double()
        added = torch.stack([error.detach().double() @ member, member.sum(0)])
        self.sums.copy_(self.decay * self.sums + added)  # in place: a CUDA graph writes there

    def density(self) -> Tabulated:
        """The measured density mixed with the prior. Bins without draws follow the prior, scaled alike."""
        edges, (errors, draws) = self.log_edges.cpu(), self.sums.cpu()
        centres = (edges[1:] + edges[:-1]) / 2
        prior = torch.tensor(self.prior.mass, dtype=torch.float64)
        known = draws > 0
        if not known.any():
            return self.prior
        mean_error = errors / torch.where(known, draws, 1)  # not clamped: decay makes both tiny, the ratio stays
        measured = torch.where(known, _information(mean_error, centres) * (edges[1:] - edges[:-1]), 0)
        scale = measured.sum() / prior[known].sum()
        measured = torch.where(known, measured, prior * scale)
        if measured.sum() <= 0:
            return self.prior
        mixed = measured / measured.sum() + prior / prior.sum()
        return Tabulated(self.prior.log_edges, tuple(mixed.tolist()))


@dataclass(frozen=True)
class Bound:
    """A likelihood bound read at falling noise levels, in nats; it is flat where the model is consistent.

    sigmas: falling. bound: E[-ln p(y|x)] <= bound[i], whichever level it is read at. cross_entropy, error: what was
    measured at each level. regret: per block, how much the bound rises over the levels it owns.
    """

    sigmas: tuple[float, ...]
    bound: tuple[float, ...]
    cross_entropy: tuple[float, ...]
    error: tuple[float, ...]
    regret: tuple[float, ...]


def information_bound(
    sigmas: Sequence[float], cross_entropy: Sequence[float], error: Sequence[float], owners: Sequence[int]
) -> Bound:
    """Cross-entropy at sigma_1 plus half the integral of E|y - D|^2 d(1/sigma^2) down to sigma_1, at every level.

    sigmas: falling, T of them; error: E|y - D|^2; owners: the block that owns each level. Between two levels the error
    is taken as exponential in 1/sigma^2, as the exact one nearly is; above sigmas[0] as constant.
    Raises: ValueError if lengths differ or the levels don't fall. Source: Kong et al. 2023; docs/method.md.
    """
    if not len(sigmas) == len(cross_entropy) == len(error) == len(owners) > 0:
        raise ValueError("sigmas, cross_entropy, error and owners must have the same, positive length")
    if any(a <= b for a, b in itertools.pairwise(sigmas)):
        raise ValueError("sigmas must fall strictly")
    snr = [1 / s**2 for s in sigmas]
    spent, bound = error[0] * snr[0] / 2, []
    for i in range(len(sigmas)):
        if i:
            spent += _logarithmic_mean(error[i], error[i - 1]) * (snr[i] - snr[i - 1]) / 2
        bound.append(cross_entropy[i] + spent)
    rises = [0.0] * (max(owners) + 1)
    for i in range(1, len(bound)):
        rises[owners[i]] += bound[i] - bound[i - 1]
    return Bound(tuple(sigmas), tuple(bound), tuple(cross_entropy), tuple(error), tuple(rises))


def _logarithmic_mean(a: float, b: float) -> float:
    """The mean of an exponential that runs from a to b."""
    if min(a, b) <= 0 or math.isclose(a, b):
        return (a + b) / 2
    return (a - b) / math.log(a / b)
