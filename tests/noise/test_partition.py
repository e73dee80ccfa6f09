"""Who owns which noise: one convention, asserted here. Block 0 is at the input and owns the highest noise."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from diffusionblocks.noise.density import LogNormal, LogUniform, Tabulated, Uniform
from diffusionblocks.noise.information import closed_form_density
from diffusionblocks.noise.partition import Partition, equal_mass_edges, make_partition, spread_layers, step_levels
from diffusionblocks.targets.labels import spread_codebook

CODEBOOK = closed_form_density(spread_codebook(10, 16))
DENSITIES = [
    LogNormal(),
    LogNormal(0.0, 1.0, 0.01, 20.0),
    LogUniform(),
    Uniform(),
    Tabulated((-4.0, -2.0, 0.0, 1.0, 3.0), (0.3, 0.0, 5.0, 0.1)),
    CODEBOOK,
]
densities = st.one_of(st.sampled_from(DENSITIES), st.builds(LogNormal, st.floats(-2, 1), st.floats(0.8, 2)))


def quantile_edge(q: float) -> float:
    """The published constants' edge below which a share q of the cut log-normal lies, by bisection."""

    def cdf(sigma: float) -> float:
        return 0.5 * math.erfc(-(math.log(sigma) + 1.2) / (1.2 * math.sqrt(2)))

    wanted = cdf(0.002) + q * (cdf(80) - cdf(0.002))
    low, high = 0.002, 80.0
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if cdf(middle) < wanted else (low, middle)
    return low


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 6, 8])
def test_equal_probability_edges_are_the_closed_form(blocks):
    want = [80.0, *(quantile_edge(1 - b / blocks) for b in range(1, blocks)), 0.002]
    assert equal_mass_edges(LogNormal(), blocks) == pytest.approx(want, rel=1e-9)  # erf and its inverse round


def test_published_edges_of_three_blocks():
    edges = make_partition(LogNormal(), 12, 3).edges
    assert edges[1] == pytest.approx(0.505, abs=5e-4)  # as printed, three digits
    assert edges[2] == pytest.approx(0.18, abs=5e-3)


def test_block_0_owns_the_highest_noise_and_the_last_the_lowest():
    partition = make_partition(LogNormal(), 12, 3)
    assert [partition.owned(b) for b in range(3)] == [
        (partition.edges[1], partition.edges[0]),
        (partition.edges[2], partition.edges[1]),
        (partition.edges[3], partition.edges[2]),
    ]
    assert partition.owned(0).high == partition.sigma_max == 80.0
    assert partition.owned(2).low == partition.sigma_min == pytest.approx(0.002, rel=2**-24)
    # Training, evaluation and sampling agree.
    assert partition.block_of(torch.tensor([80.0, 1.0, 0.3, 0.01])).tolist() == [0, 0, 1, 2]
    u = torch.full((1,), 0.5)
    assert [int(partition.block_of(partition.draw(b, u))) for b in range(3)] == [0, 1, 2]
    assert [int(partition.block_of(s)) for s in step_levels(partition, 3)[:-1]] == [0, 1, 2]


@pytest.mark.parametrize("kind", ["probability", "uniform", "log_uniform"])
@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
def test_the_partitions_cut_what_they_say(kind, blocks):
    density = LogNormal(sigma_min=0.02, sigma_max=20)
    edges = torch.tensor(make_partition(density, 6, blocks, by=kind).edges, dtype=torch.float64)
    measure = {"probability": density.cdf, "uniform": lambda s: s, "log_uniform": torch.log}[kind](edges)
    pieces = measure[:-1] - measure[1:]
    assert torch.allclose(pieces, pieces.mean().expand(blocks), rtol=1e-4)  # edges are rounded to float32
    assert edges[0] == 20


def test_explicit_edges_and_layer_counts():
    partition = make_partition(LogNormal(), [1, 4, 2], edges=[10, 2, 0.5, 0.1])
    assert partition.layers == (1, 4, 2)
    assert partition.edges == pytest.approx((10, 2, 0.5, 0.1), rel=2**-24)
    assert make_partition(LogNormal(), 7, edges=[10, 2, 0.5, 0.1]).layers == (3, 2, 2)


@given(layers=st.integers(1, 100), data=st.data())
def test_layers_are_spread_and_none_is_dropped(layers, data):
    counts = spread_layers(layers, data.draw(st.integers(1, layers)))
    assert sum(counts) == layers
    assert max(counts) - min(counts) <= 1
    assert sorted(counts, reverse=True) == list(counts)


@pytest.mark.parametrize("overlap", [0.0, 0.05, 0.1, 0.7])
def test_overlap_widens_in_log_sigma_and_is_cut_at_the_ends(overlap):
    partition = make_partition(LogNormal(), 12, 4, overlap=overlap)
    for block in range(4):
        low, high = (math.log(s) for s in partition.owned(block))
        margin = overlap * (high - low)
        got_low, got_high = (math.log(s) for s in partition.trained(block))
        assert got_low == pytest.approx(max(low - margin, math.log(partition.sigma_min)), abs=1e-12)
        assert got_high == pytest.approx(min(high + margin, math.log(80)), abs=1e-12)
        # Ownership is by the unwidened edges.
        assert int(partition.block_of(math.exp((low + high) / 2))) == block


@settings(deadline=None, max_examples=200)
@given(density=densities, blocks=st.integers(1, 8), t=st.floats(0, 1))
def test_owner_is_the_same_for_every_dtype_even_at_edges(density, blocks, t):
    partition = make_partition(density, 8, blocks)
    inside = math.exp(math.log(partition.sigma_min) * (1 - t) + math.log(partition.sigma_max) * t)
    around = [math.nextafter(e, way) for e in partition.edges for way in (0, math.inf)]
    levels = [inside, *around, *partition.edges, 2 * partition.sigma_max, partition.sigma_min / 2]
    for level in levels:
        rounded = torch.tensor(level, dtype=torch.float32)
        owners = {
            int(partition.block_of(level)),
            int(partition.block_of(torch.tensor(level, dtype=torch.float64))),
            int(partition.block_of(rounded)),
            int(partition.block_of(rounded.double())),
            int(partition.block_of(float(rounded))),
        }
        assert len(owners) == 1, (level, owners)
    # An edge belongs to the block below it: a step that starts there is that block's.
    assert [int(partition.block_of(e)) for e in partition.edges[:-1]] == list(range(blocks))
    assert int(partition.block_of(partition.sigma_min)) == blocks - 1


def test_owner_keeps_shape():
    partition = make_partition(LogNormal(), 12, 3)
    owners = partition.block_of(torch.full((2, 3), 0.3))
    assert owners.shape == (2, 3) and owners.dtype == torch.int64
    assert partition.block_of(0.3).shape == ()


@settings(deadline=None, max_examples=300)
@given(
    density=densities,
    blocks=st.integers(1, 8),
    steps=st.integers(1, 60),
    kind=st.sampled_from(["karras", "probability"]),
    by=st.sampled_from(["probability", "log_uniform", "uniform"]),
)
def test_every_block_runs_and_levels_fall_for_every_number_of_steps(density, blocks, steps, kind, by):
    assume(steps >= blocks)
    try:
        partition = make_partition(density, 8, blocks, by=by)
    except ValueError as error:
        assume("no mass" not in str(error))
        raise
    check_levels(partition, steps, kind)


@pytest.mark.parametrize("kind", ["karras", "probability"])
@pytest.mark.parametrize("blocks", range(1, 9))
def test_every_block_runs_with_the_published_constants(kind, blocks):
    # B = 3 with 4 levels and B = 6 with 7 are where the published code never ran a block.
    for steps in range(blocks, 61):
        check_levels(make_partition(LogNormal(), 8, blocks), steps, kind)


def check_levels(partition: Partition, steps: int, kind: str) -> None:
    levels = step_levels(partition, steps, kind=kind)
    assert len(levels) == steps + 1
    assert levels[0] == partition.sigma_max and levels[-1] == 0
    assert all(a > b for a, b in itertools.pairwise(levels)), levels
    owners = partition.block_of(torch.tensor(levels[:-1])).tolist()
    assert set(owners) == set(range(partition.blocks)), (levels, partition.edges)
    assert owners == sorted(owners)  # from the input's block down, never back
    assert owners == [int(partition.block_of(level)) for level in levels[:-1]]


@pytest.mark.parametrize("kind", ["karras", "probability"])
@pytest.mark.parametrize("edges", [(1.0, 0.5, 0.1), (200.0, 3.0, 0.001)])
def test_levels_keep_to_explicit_edges_narrower_or_wider_than_the_density(kind, edges):
    partition = make_partition(LogNormal(), 4, edges=edges)
    for steps in range(2, 40):
        check_levels(partition, steps, kind)


def test_levels_that_visit_every_block_already_are_left_as_they_are():
    partition = make_partition(LogNormal(), 12, 3)
    want = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    assert step_levels(partition, 18)[:-1] == pytest.approx(want, rel=2**-23)  # rounded to float32


def test_a_skipped_block_starts_from_its_upper_edge():
    partition = make_partition(LogNormal(), 12, 3)
    levels = step_levels(partition, 3)  # rho = 7: 80, 2.5, .002: nothing for block 1
    assert levels[1] == partition.edges[1]


DEFAULT = LogNormal()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: make_partition(DEFAULT, 3, 4), "blocks"),  # B > L
        (lambda: make_partition(DEFAULT, 3, 0), "blocks"),
        (lambda: make_partition(DEFAULT, [], None), "blocks"),
        (lambda: make_partition(DEFAULT, [2, 2], 3), "blocks"),
        (lambda: make_partition(DEFAULT, [2, 0]), "layers"),
        (lambda: make_partition(DEFAULT, [2, 2], edges=[3, 1]), "edges"),
        (lambda: make_partition(DEFAULT, 4, by="noise"), "by"),
        (lambda: make_partition(DEFAULT, 4, 2, overlap=-0.1), "overlap"),
        (lambda: make_partition(DEFAULT, 4, 2, overlap=math.nan), "overlap"),
        (lambda: equal_mass_edges(DEFAULT, 0), "blocks"),
        *[
            (lambda e=e: make_partition(DEFAULT, 4, edges=e), "edges")
            for e in ([1, 1, 0.5], [1, 2, 3], [3, 1, 0], [3, 1, -1], [3, math.nan, 1], [math.inf, 2, 1])
        ],
        (lambda: Partition(DEFAULT, (1.0,), ()), "edges"),
        (lambda: Partition(DEFAULT, (), ()), "edges"),
        (lambda: make_partition(LogNormal(0, 0.1), 4, 2, by="uniform"), "density"),
        (lambda: make_partition(Tabulated((0.0, 1.0), (1.0,)), 4, edges=[80, 5, 0.1]), "density"),
        (lambda: spread_layers(2, 3), "blocks"),
        (lambda: step_levels(make_partition(DEFAULT, 6, 3), 2), "steps"),
        (lambda: step_levels(make_partition(DEFAULT, 6, 3), 5, kind="linear"), "kind"),
        (lambda: step_levels(make_partition(DEFAULT, 6, 3), 5, rho=0), "rho"),
        *[
            (lambda b=b, f=f: getattr(make_partition(DEFAULT, 6, 3), f)(b), "block")
            for b in (-1, 3)
            for f in ("owned", "trained", "check_block")
        ],
    ],
)
def test_bad_arguments_are_refused_by_name(call, name):
    with pytest.raises(ValueError, match=name):
        call()


@pytest.mark.parametrize(("deviations", "draws"), [(7.5, False), (6.5, True)])
def test_a_range_of_a_few_hundred_float64_quantiles_is_refused(deviations, draws):
    """Above 7.5 standard deviations lie some 140 steps of float64 below 1: the draws would be a few levels."""
    top, edge = (math.exp(-1.2 + 1.2 * z) for z in (8.0, deviations))
    density = LogNormal(-1.2, 1.2, 0.002, top)
    if draws:
        partition = Partition(density, (top, edge, 0.002), (1, 1), overlap=0.0)
        assert len(partition.draw(0, torch.linspace(0.01, 0.99, 50)).unique()) == 50
    else:
        with pytest.raises(ValueError, match=r"no mass between .* to block 0"):
            Partition(density, (top, edge, 0.002), (1, 1), overlap=0.0)
