"""Counting information: totals known in closed form, the bound for exact and for bad denoisers, the meter."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from diffusionblocks.noise import information
from diffusionblocks.noise.density import Tabulated
from diffusionblocks.noise.information import InformationMeter, closed_form_density, information_bound, prior_error
from diffusionblocks.noise.partition import make_partition, step_levels
from diffusionblocks.targets.labels import spread_codebook


def pair(sigmas: torch.Tensor, trust: torch.Tensor | float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and E|y - D|^2 for y = +1 or -1 and z = y + sigma eps, by quadrature, per level.

    trust: factor on the log-odds, per level; 1 is the exact posterior, 0 a denoiser that ignores z.
    """
    eps = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    density = torch.exp(-eps.square() / 2) / math.sqrt(2 * math.pi) * (eps[1] - eps[0])
    sigma = sigmas.double().unsqueeze(-1)
    # By symmetry y = +1 stands for both.
    log_odds = 2 * (1 + sigma * eps) / sigma**2 * torch.as_tensor(trust).double().reshape(-1, 1)
    cross_entropy = (density * torch.nn.functional.softplus(-log_odds)).sum(-1)
    return cross_entropy, (density * (torch.tanh(log_odds / 2) - 1).square()).sum(-1)


@pytest.mark.parametrize("classes", [2, 10])
def test_total_information_is_log_classes(classes):
    table = 3 * spread_codebook(classes, classes)
    log_sigma = torch.linspace(math.log(3 / 60), math.log(3 * 60), 31, dtype=torch.float64)
    error = prior_error(table, log_sigma.exp(), draws=65_536)
    # d(1/sigma^2) / 2 = sigma^-2 d ln sigma.
    total = torch.trapezoid(error * (-2 * log_sigma).exp(), log_sigma)
    # The standard error at this many draws is at most .8 % (measured over seeds); the seed is fixed.
    assert float(total) == pytest.approx(math.log(classes), rel=0.01)


def test_prior_error_of_a_pair_is_the_quadrature():
    sigmas = torch.tensor([0.2, 0.5, 1.0, 3.0])
    got = prior_error(torch.tensor([[1.0], [-1.0]]), sigmas, draws=40_000)
    want = pair(sigmas)[1].tolist()
    # The standard error of 40,000 draws of a squared error between 0 and 4 is at most .01.
    assert got.tolist() == pytest.approx(want, abs=0.02)


def test_prior_error_is_deterministic_and_leaves_the_global_generator_alone():
    table, sigmas = spread_codebook(10, 8), torch.tensor([0.3, 1.0])
    torch.manual_seed(0)
    first = prior_error(table, sigmas)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))
    assert torch.equal(first, prior_error(table, sigmas))


@pytest.mark.parametrize("classes", [2, 10])
def test_closed_form_density_covers_all_but_the_tails(classes):
    table = spread_codebook(classes, classes)
    density = closed_form_density(table, tail=1e-3)
    log_sigma = torch.linspace(math.log(1e-2), math.log(1e3), 301, dtype=torch.float64)
    share = prior_error(table, log_sigma.exp()) * (-2 * log_sigma).exp()
    share = share / share.sum()
    below = float(share[log_sigma < density.log_edges[0]].sum())
    above = float(share[log_sigma > density.log_edges[-1]].sum())
    # The cut is on a grid of 257 edges over four decades: what lies beyond is under the tail, not equal.
    assert below <= 1.05e-3 and above <= 1.1e-3
    assert above > 1e-4  # and the range isn't simply everything
    middle = share.cumsum(0) - share / 2  # the mass below each level, half of its own step included
    inside = (log_sigma >= density.log_edges[0]) & (log_sigma <= density.log_edges[-1])
    # 64 bins, constant within a bin: half a bin of a slope of .04 a bin; plus the tails.
    assert torch.allclose(density.cdf(log_sigma.exp())[inside], middle[inside], atol=0.01)


def test_noise_of_a_large_codebook_is_that_of_some_of_its_rows_shifted(monkeypatch):
    table = torch.nn.functional.normalize(torch.randn(96, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    exact = closed_form_density(table)
    monkeypatch.setattr(information, "ROWS", 24)
    centre = []
    for density in (exact, closed_form_density(table)):
        edges, mass = torch.tensor(density.log_edges), torch.tensor(density.mass)
        centre.append(float(((edges[1:] + edges[:-1]) / 2 * mass).sum() / mass.sum()))
    # of so few rows; without the shift they are .14 apart
    assert centre[1] == pytest.approx(centre[0], abs=0.06)


def test_closed_form_density_scales_with_the_codebook():
    table = spread_codebook(4, 4)
    one, four = closed_form_density(table), closed_form_density(4 * table)
    shift = [b - a for a, b in zip(one.log_edges, four.log_edges, strict=True)]
    assert shift == pytest.approx([math.log(4)] * len(shift), abs=1e-9)
    assert closed_form_density(table) == one


SIGMAS = [10 ** (1.5 - 3 * i / 400) for i in range(401)]  # 31.6 to .0316, fine enough for the trapezium rule


def owner(sigma: float) -> int:
    return 0 if sigma > 1.5 else 1 if sigma > 0.4 else 2


OWNERS = [owner(s) for s in SIGMAS]


def bound_of(bad: int | None = None):
    """The bound of an exact posterior, but for block `bad`, which ignores z."""
    trust = torch.tensor([0.0 if b == bad else 1.0 for b in OWNERS])
    cross_entropy, error = pair(torch.tensor(SIGMAS, dtype=torch.float64), trust)
    return information_bound(SIGMAS, cross_entropy.tolist(), error.tolist(), OWNERS)


def test_bound_is_flat_and_log_two_for_the_exact_posterior_wherever_it_is_read():
    bound = bound_of()
    # The trapezium rule on steps of 1.7 % errs by 1e-4, the constant error above the first level by 1e-6.
    assert list(bound.bound) == pytest.approx([math.log(2)] * len(SIGMAS), abs=3e-4)
    assert list(bound.regret) == pytest.approx([0, 0, 0], abs=3e-4)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_regret_lands_on_the_bad_block(bad):
    bound, exact = bound_of(bad), bound_of()
    assert all(b >= math.log(2) - 3e-4 for b in bound.bound)  # still a bound
    assert bound.regret[bad] > 0.05
    # Blocks above are as consistent as before; those below pay nothing more (they may win some back).
    assert list(bound.regret[:bad]) == pytest.approx(list(exact.regret[:bad]), abs=1e-12)
    assert all(r < 3e-4 for r in bound.regret[bad + 1 :])
    # What a bad level costs is kept: the chain's bound, read at the lowest level, shows it.
    assert bound.bound[-1] > math.log(2) + 0.03


def test_bound_by_hand_for_three_levels():
    bound = information_bound([2.0, 1.0, 0.5], [0.7, 0.5, 0.2], [1.0, 0.6, 0.2], [0, 1, 1])
    first = 0.7 + 1.0 * 0.25 / 2
    # between levels the error is exponential in 1/sigma^2: its mean is (a - b) / ln(a/b)
    between = [(1.0 - 0.6) / math.log(1.0 / 0.6), (0.6 - 0.2) / math.log(0.6 / 0.2)]
    second = 0.5 + 1.0 * 0.25 / 2 + between[0] * 0.75 / 2
    third = 0.2 + 1.0 * 0.25 / 2 + between[0] * 0.75 / 2 + between[1] * 3 / 2
    assert bound.bound == pytest.approx((first, second, third), abs=1e-12)
    assert bound.regret == pytest.approx((0.0, third - first), abs=1e-12)


@pytest.mark.parametrize(
    "arguments",
    [
        ([], [], [], []),
        ([1.0], [1.0], [1.0], []),
        ([1.0, 2.0], [1.0] * 2, [1.0] * 2, [0, 0]),
        ([1.0, 1.0], [1.0] * 2, [1.0] * 2, [0, 0]),
    ],
)
def test_a_bound_of_levels_that_do_not_fit_is_refused(arguments):
    with pytest.raises(ValueError, match="sigmas"):
        information_bound(*arguments)


def flat_prior(bins: int = 16) -> Tabulated:
    return Tabulated(tuple(torch.linspace(-3, 2, bins + 1).tolist()), (1.0,) * bins)


def true_error(sigma: torch.Tensor) -> torch.Tensor:
    return sigma.square() * torch.exp(-2 * (sigma.log() + 0.5).square())  # information peaks at ln sigma = -.5


def fill(meter: InformationMeter, batches: int, density=None, noise: float = 0.3) -> InformationMeter:
    partition = make_partition(density or meter.prior, 1, 1)
    for step in range(batches):
        u, v = torch.rand(2, 256, generator=torch.Generator().manual_seed(step)).clamp(min=1e-6).unbind()
        sigma = partition.draw(0, u)
        jitter = 1 + noise * (2 * v - 1)
        meter.update(sigma, true_error(sigma) * jitter)
    return meter


def normalised(density: Tabulated) -> torch.Tensor:
    mass = torch.tensor(density.mass, dtype=torch.float64)
    return mass / mass.sum()


@pytest.mark.parametrize("drawn_from", ["prior", "elsewhere"])
def test_meter_finds_the_information_whatever_it_was_drawn_from(drawn_from):
    prior = flat_prior()
    other = Tabulated(prior.log_edges, tuple(float(1 + i) for i in range(16)))
    density = fill(InformationMeter(prior), 150, None if drawn_from == "prior" else other).density()
    centres = torch.tensor(prior.log_edges).unfold(0, 2, 1).mean(1).double()
    truth = torch.exp(-2 * (centres + 0.5).square())
    measured = 2 * normalised(density) - 1 / 16  # half of the mixture is the prior
    # A bin is read at its centre and its draws lie anywhere within .31 of it: their mean sigma^2 is off by up
    # to a fifth at the flank of the peak, 1.5 % of the mass.
    assert torch.allclose(measured, truth / truth.sum(), atol=0.015)


def test_meter_counts_mass_and_not_height_in_bins_of_unequal_width():
    edges = (-3.0, -2.0, -1.9, 0.0, 0.1, 2.0)
    widths = [b - a for a, b in itertools.pairwise(edges)]
    meter = InformationMeter(Tabulated(edges, tuple(widths)))
    centres = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(edges)])
    meter.update(centres.exp(), centres.exp().square())  # one nat per unit of ln sigma everywhere: the prior's own law
    assert torch.allclose(normalised(meter.density()), torch.tensor(widths).double() / 5, atol=1e-6)


def test_meter_starves_no_bin():
    prior = flat_prior()
    meter = InformationMeter(prior)
    for _ in range(50):  # everything is learned: no error anywhere but in one bin
        meter.update(torch.full((64,), math.exp(-2.9)), torch.full((64,), 10.0))
        meter.update(torch.linspace(-2.5, 1.9, 64).exp(), torch.zeros(64))
    assert float(normalised(meter.density()).min()) >= 0.5 / 16 - 1e-12
    levels = step_levels(make_partition(meter.density(), 8, 8), 20, kind="probability")
    assert all(a > b for a, b in itertools.pairwise(levels))


def test_meter_without_draws_or_without_error_is_the_prior():
    meter = InformationMeter(flat_prior())
    assert meter.density() == meter.prior
    meter.update(torch.linspace(-2.9, 1.9, 64).exp(), torch.zeros(64))
    assert meter.density() == meter.prior


def test_bins_without_draws_follow_the_prior():
    prior = Tabulated((0.0, 1.0, 2.0, 3.0), (1.0, 2.0, 3.0))
    meter = InformationMeter(prior)
    centres = torch.tensor([0.5, 1.5])
    meter.update(centres.exp(), 7 * torch.tensor([1.0, 2.0]) * (2 * centres).exp())  # seven times the prior
    assert normalised(meter.density()).tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6], rel=1e-6)


def test_what_a_bin_showed_outlives_any_number_of_batches_elsewhere():
    # Blocks trained one after the other: the second's visit must not erase what the first measured.
    meter = fill(InformationMeter(flat_prior(), decay=0.9), 100)
    before = normalised(meter.density())
    elsewhere = torch.full((4,), math.exp(-2.9))
    for _ in range(400):  # 0.9^400 = 5e-19 of a draw is left: as 0.998 leaves after 21,000
        meter.update(elsewhere, true_error(elsewhere))
    after = normalised(meter.density())
    assert torch.allclose(after[1:], before[1:], atol=2e-3)  # bin 0, of 2e-4 of the mass, now reads one level of it


def test_meter_forgets_an_error_that_has_gone():
    meter = InformationMeter(flat_prior(), decay=0.9)
    sigma = torch.linspace(-2.9, 1.9, 64).exp()
    meter.update(sigma, 100 * sigma.square())
    for _ in range(300):
        meter.update(sigma, true_error(sigma))
    fresh = InformationMeter(flat_prior(), decay=0.9)
    fresh.update(sigma, true_error(sigma))
    # 0.9^300 = 2e-14 of an error 1e2 times too large.
    assert torch.allclose(normalised(meter.density()), normalised(fresh.density()), atol=1e-9)


def test_meter_is_deterministic_and_ignores_the_order_within_a_batch():
    first, second = (fill(InformationMeter(flat_prior()), 20) for _ in range(2))
    assert torch.equal(first.sums, second.sums) and first.density() == second.density()
    meter = InformationMeter(flat_prior())
    meter.update(torch.tensor([1.0]), torch.tensor([2.0], requires_grad=True))  # holds on to no graph
    assert not meter.sums.requires_grad


@pytest.mark.parametrize(
    "table", [torch.zeros(3), torch.ones(1, 4), torch.ones(2, 4), torch.tensor([[1.0], [2.0], [1.0]])]
)
def test_a_codebook_that_cannot_be_told_apart_is_refused(table):
    with pytest.raises(ValueError, match="codebook"):
        closed_form_density(table)
