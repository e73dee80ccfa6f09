"""Noise densities: distribution function and inverse, and the draws a block is trained on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import dbkernels
from diffusionblocks.noise import density as densities
from diffusionblocks.noise.density import LogNormal, LogUniform, Tabulated, Uniform
from diffusionblocks.noise.partition import make_partition

RANGE = {"sigma_min": 0.01, "sigma_max": 20.0}
FIXED = [
    LogNormal(),
    LogNormal(0.3, 0.8, **RANGE),
    LogUniform(**RANGE),
    Uniform(**RANGE),
    Tabulated((-3.0, -1.0, 0.5, 0.6, 2.0), (0.2, 0.1, 0.0, 3.0)),
]


@st.composite
def any_density(draw):
    low = draw(st.floats(1e-3, 0.5))
    high = low * draw(st.floats(4, 1e4))
    kind = draw(st.sampled_from(["log_normal", "log_uniform", "uniform", "tabulated"]))
    if kind == "log_normal":
        centre = 0.5 * (math.log(low) + math.log(high))
        return LogNormal(centre + draw(st.floats(-1, 1)), draw(st.floats(1, 3)), low, high)
    if kind == "tabulated":
        gaps = draw(st.lists(st.floats(0.05, 1), min_size=1, max_size=12))
        mass = draw(st.lists(st.floats(0, 10), min_size=len(gaps), max_size=len(gaps)))
        assume(sum(mass) > 1e-3)
        edges = [math.log(low)]
        for gap in gaps:
            edges.append(edges[-1] + gap)
        return Tabulated(tuple(edges), tuple(mass))
    return {"log_uniform": LogUniform, "uniform": Uniform}[kind](low, high)


def cdf_by_hand(density, sigma: float) -> float:
    """The distribution function from its definition, one number at a time, in float64."""
    if isinstance(density, LogNormal):
        return 0.5 * math.erfc(-(math.log(sigma) - density.P_mean) / (density.P_std * math.sqrt(2)))
    if isinstance(density, LogUniform):
        return math.log(sigma / density.sigma_min) / math.log(density.sigma_max / density.sigma_min)
    if isinstance(density, Uniform):
        return (sigma - density.sigma_min) / (density.sigma_max - density.sigma_min)
    below, x = 0.0, math.log(sigma)
    for a, b, mass in zip(density.log_edges, density.log_edges[1:], density.mass, strict=False):
        below += mass * min(max((x - a) / (b - a), 0), 1)
    return below / sum(density.mass)


@pytest.mark.parametrize("density", FIXED, ids=lambda d: type(d).__name__)
def test_cdf_is_its_definition(density):
    t = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    sigma = density.sigma_min * (density.sigma_max / density.sigma_min) ** t
    want = [cdf_by_hand(density, s) for s in sigma.tolist()]
    got = density.cdf(sigma)
    assert got.dtype == torch.float64
    # Tabulated gives an empty bin 1e-9 of the mass so that an inverse exists; the others only round.
    assert got.tolist() == pytest.approx(want, abs=1e-8 if isinstance(density, Tabulated) else 1e-14)


@settings(deadline=None)
@given(density=any_density(), q=st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_ppf_inverts_cdf_and_both_rise(density, q):
    ends = density.cdf(torch.tensor([density.sigma_min, density.sigma_max], dtype=torch.float64))
    q = ends[0] + (ends[1] - ends[0]) * torch.tensor(sorted(q), dtype=torch.float64)
    sigma = density.ppf(q)
    # float64's 1e-16, times up to 1e4 where Uniform's sigma_min meets its width, and 1e-14 for erf's inverse.
    assert torch.allclose(density.cdf(sigma), q, rtol=0, atol=1e-11)
    # ppf may stay level where quantiles are closer than its own rounding, it must not turn back beyond that.
    assert bool((sigma[1:] >= sigma[:-1] * (1 - 1e-13)).all())
    clear = q[1:] - q[:-1] > 1e-8
    assert bool((sigma[1:] > sigma[:-1])[clear].all())
    # Up to 5.6 deviations above the mean q is 1 - 1e-8, so its last digit is worth 2e-9 of sigma.
    assert float(sigma[0]) >= density.sigma_min * (1 - 1e-7)
    assert float(sigma[-1]) <= density.sigma_max * (1 + 1e-7)


@settings(deadline=None)
@given(density=any_density(), t=st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_cdf_rises_over_the_range(density, t):
    t = torch.tensor(sorted(t), dtype=torch.float64)
    sigma = density.sigma_min * (density.sigma_max / density.sigma_min) ** t
    q = density.cdf(sigma)
    assert bool((q[1:] >= q[:-1] - 1e-15).all())


@settings(deadline=None, max_examples=60)
@given(
    density=any_density(),
    blocks=st.integers(1, 6),
    overlap=st.sampled_from([0.0, 0.05, 0.5]),
    u=st.lists(st.floats(2.0**-24, 1 - 2.0**-24, width=32), min_size=1, max_size=10),
)
def test_draws_stay_in_the_trained_range_up_to_the_last_uniform(density, blocks, overlap, u):
    try:
        partition = make_partition(density, blocks, blocks, overlap=overlap)
    except ValueError:
        assume(False)  # edges that meet in float32, or an empty range: refused, see test_partition
    ends = [2.0**-24, 1 - 2.0**-24]  # the first and the last uniform the generator can give
    for block in range(blocks):
        sigma = partition.draw(block, torch.tensor([*u, *ends], dtype=torch.float32))
        # The draw is rounded to float32, so compare with the rounded ends.
        low, high = torch.tensor(partition.trained(block), dtype=torch.float32)
        assert sigma.dtype == torch.float32
        assert bool(((sigma >= low) & (sigma <= high)).all())


def test_the_lower_tail_keeps_its_digits():
    density = LogNormal(0.0, 0.5)
    sigma = torch.tensor([0.01, 0.02, 0.05], dtype=torch.float64)  # 9.2 to 6 deviations down: 1e-20 to 1e-9
    want = [cdf_by_hand(density, s) for s in sigma.tolist()]
    # An erfc of x is off by x^2 roundings of x.
    assert density.cdf(sigma).tolist() == pytest.approx(want, rel=1e-13, abs=0)
    assert density.ppf(density.cdf(sigma)).tolist() == pytest.approx(sigma.tolist(), rel=1e-13)


def kolmogorov_smirnov(q: torch.Tensor) -> float:
    """Largest distance between the sample's distribution function and the uniform one."""
    q, n = q.sort().values, len(q)
    rank = torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum(rank[1:] - q, q - rank[:-1]).max())


@pytest.mark.parametrize("density", FIXED, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("block", [0, 1, 2])
def test_draws_follow_the_truncated_law(density, block):
    partition = make_partition(density, 3, 3)
    n = 20_000
    sigma = partition.draw(block, dbkernels.philox_uniform(n, seed=11 + block)).double()
    low, high = (cdf_by_hand(density, level) for level in partition.trained(block))
    q = torch.tensor([(cdf_by_hand(density, s) - low) / (high - low) for s in sigma.tolist()]).double()
    # A right sampler passes 1.95 / sqrt(n) with probability .999 (Kolmogorov's law); the seeds are fixed.
    assert kolmogorov_smirnov(q) < 1.95 / math.sqrt(n)
    # Positive control: the law without the cut fails the same test.
    assert kolmogorov_smirnov(torch.tensor([cdf_by_hand(density, s) for s in sigma.tolist()])) > 0.05


def test_an_empty_bin_keeps_an_inverse_and_gets_almost_no_draws():
    density = Tabulated((-2.0, -1.0, 1.0, 2.0), (1.0, 0.0, 1.0))
    q = density.cdf(torch.tensor([math.exp(-1), math.exp(1)], dtype=torch.float64))
    assert 0 < float(q[1] - q[0]) < 1e-8
    middle = density.ppf(q.mean())
    assert float(middle) == pytest.approx(1, rel=1e-5)  # the middle of the bin; 1e-9 of slope costs 1e-7


@settings(deadline=None)
@given(density=any_density())
def test_dict_and_back_is_the_same_density(density):
    import json

    assert densities.from_dict(json.loads(json.dumps(densities.to_dict(density)))) == density


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: LogNormal(P_std=0), "P_std"),
        (lambda: LogNormal(P_std=math.nan), "P_std"),
        (lambda: LogNormal(P_mean=math.inf), "P_mean"),
        (lambda: LogNormal(sigma_min=0), "sigma_min"),
        (lambda: LogUniform(2, 1), "sigma_min"),
        (lambda: Uniform(1, math.nan), "sigma_max"),
        (lambda: Tabulated((0.0, 1.0), (1.0, 2.0)), "edges"),
        (lambda: Tabulated((0.0, 0.0), (1.0,)), "log_edges"),
        (lambda: Tabulated((1.0, 0.0), (1.0,)), "log_edges"),
        (lambda: Tabulated((0.0, math.nan), (1.0,)), "log_edges"),
        (lambda: Tabulated((0.0, math.inf), (1.0,)), "log_edges"),
        (lambda: Tabulated((0.0, 1.0), (-1.0,)), "mass"),
        (lambda: Tabulated((0.0, 1.0), (0.0,)), "mass"),
        (lambda: Tabulated((0.0, 1.0), (math.nan,)), "mass"),
        (lambda: densities.from_dict({"kind": "cauchy"}), "cauchy"),
        (lambda: densities.from_dict({}), "None"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, name):
    with pytest.raises(ValueError, match=name):
        call()
