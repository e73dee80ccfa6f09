"""The generator: published vectors, addressing, statistics, and agreement of every build."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dbkernels
from dbkernels import philox
from numerics import ulps

# Random123's known-answer vectors for philox4x32-10: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
WORD = st.integers(0, 2**32 - 1)
needs_compiled = pytest.mark.skipif(dbkernels.compiled() is None, reason="the compiled library isn't here")


@pytest.mark.parametrize("counter,key,result", KNOWN)
def test_known_answers(counter, key, result):
    assert tuple(int(word) for word in philox.philox_4x32(counter, key)) == result


@needs_compiled
@pytest.mark.parametrize("counter,key,result", KNOWN)
def test_known_answers_compiled(counter, key, result):
    from dbkernels import _C

    assert _C.philox4x32(*counter, *key) == result


@needs_compiled
@given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))
@settings(max_examples=200, deadline=None)
def test_reference_and_compiled_agree_on_every_word(counter, key):
    from dbkernels import _C

    assert tuple(int(word) for word in philox.philox_4x32(counter, key)) == _C.philox4x32(*counter, *key)


@pytest.mark.parametrize("group", [0, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**40 + 3])
def test_counter_beyond_32_bits(group):
    """Elements past 2^31 and 2^34, by arithmetic on their group numbers: the high word takes the carry."""
    seed, offset = 2**63 + 12345, 7
    words = philox.random_words(torch.tensor([group]), seed, offset, philox.NORMAL_STREAM)
    by_hand = philox.philox_4x32((group % 2**32, group // 2**32, offset, 0), (seed % 2**32, seed // 2**32))
    assert [int(w) for w in words] == [int(w) for w in by_hand]
    if dbkernels.compiled() is not None:
        from dbkernels import _C

        expected = torch.cat([*philox.box_muller(*words[:2]), *philox.box_muller(*words[2:])])
        assert ulps(torch.tensor(_C.normals(group, seed, offset)), expected).max() <= 2


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(1, 300))
@settings(max_examples=30, deadline=None)
def test_uniform_is_open_and_a_prefix_of_longer_draws(seed, offset, numel):
    draw = dbkernels.philox_uniform(numel, seed=seed, offset=offset)
    assert draw.min() > 0 and draw.max() < 1
    longer = dbkernels.philox_uniform((2, 200), seed=seed, offset=offset).flatten()
    assert torch.equal(draw, longer[:numel])


def test_uniform_extreme_words():
    """The largest and smallest words stay inside (0, 1), exactly."""
    for word, value in ((0, 2.0**-24), (0xFFFFFFFF, 1 - 2.0**-24)):
        assert (float(word >> 9) + 0.5) * 2.0**-23 == value
        assert torch.tensor(value, dtype=torch.float32).item() == value


def test_box_muller_extremes():
    """u = 1 gives exactly 0, the smallest u gives the farthest tail, and quarter turns are exact."""
    top, zero = torch.tensor([0xFFFFFFFF]), torch.tensor([0])
    assert philox.box_muller(top, zero)[0].item() == 0.0
    tail = philox.box_muller(zero, zero)[0].item()
    assert tail == pytest.approx(math.sqrt(2 * 33 * math.log(2)), rel=1e-7)
    quarter = philox.box_muller(zero, torch.tensor([1 << 30]))
    assert quarter[0].item() == 0.0 and quarter[1].item() == pytest.approx(tail)


@needs_compiled
def test_normals_within_two_ulp_of_the_definition():
    """2: the logarithm is off by at most 0.9 ulp (halved by the root), sin and cos 0.8, root and product 0.5
    each."""
    numel = 2_000_003
    ours = dbkernels.philox_normal(numel, seed=77, offset=3)
    assert ulps(ours, philox.normal_reference((numel,), seed=77, offset=3)).max() <= 2


def test_statistics():
    """Moments and tails of a million normals, each within five standard errors of N(0, 1)'s."""
    n = 1_000_000
    x = dbkernels.philox_normal(n, seed=20, offset=1).double()
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / n)
    for level in (1.0, 2.0, 3.0, 4.0):
        p = math.erfc(level / math.sqrt(2))
        assert abs((x.abs() > level).double().mean() - p) < 5 * math.sqrt(p / n)
    for lag in (1, 2, 3, 4, 5, 8, 64):
        assert abs((x[:-lag] * x[lag:]).mean()) < 5 / math.sqrt(n)


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_kolmogorov_smirnov(kind):
    """The largest gap between the empirical and the true distribution; 1.95/sqrt(n) is its 99.9 % point."""
    n = 200_000
    if kind == "normal":
        u = torch.special.ndtr(dbkernels.philox_normal(n, seed=3).double())
    else:
        u = dbkernels.philox_uniform(n, seed=3).double()
    u = u.sort().values
    steps = torch.arange(n, dtype=torch.float64) / n
    gap = torch.maximum((u - steps).abs().max(), (steps + 1 / n - u).abs().max())
    assert gap < 1.95 / math.sqrt(n)


def test_seeds_offsets_and_streams_are_unrelated():
    """Changing one bit of seed or offset, or the stream, leaves no correlation (five standard errors)."""
    n = 200_000
    base = dbkernels.philox_normal(n, seed=1, offset=0)
    others = [dbkernels.philox_normal(n, seed=s, offset=o) for s, o in ((2, 0), (1, 1), (1 + 2**32, 0), (1 + 2**63, 0))]
    others.append(torch.special.ndtri(dbkernels.philox_uniform(n, seed=1, offset=0).double()).float())
    for other in others:
        assert abs((base * other).mean()) < 5 / math.sqrt(n)


@pytest.mark.parametrize(
    "arguments,error,words",
    [
        (dict(seed=-1), ValueError, "seed"),
        (dict(seed=2**64), ValueError, "seed"),
        (dict(seed=1.0), TypeError, "seed"),
        (dict(seed=True), TypeError, "seed"),
        (dict(seed=1, offset=2**32), ValueError, "offset"),
        (dict(seed=1, offset="3"), TypeError, "offset"),
    ],
)
def test_bad_addresses(arguments, error, words):
    with pytest.raises(error, match=words):
        dbkernels.philox_uniform(4, **arguments)


def test_negative_size():
    with pytest.raises(ValueError, match="shape"):
        dbkernels.philox_uniform((2, -1), seed=0)


def test_uniform_compiles_without_baking_the_seed_in():
    compiled = torch.compile(dbkernels.philox_uniform, fullgraph=True, backend="aot_eager")
    for step in range(2, 8):
        expected = dbkernels.philox_uniform((5, 3), seed=1000 + step, offset=step)
        assert torch.equal(compiled((5, 3), seed=1000 + step, offset=step), expected)


@pytest.mark.gpu
@pytest.mark.smoke
def test_gpu_agrees():
    for draw, limit in ((dbkernels.philox_uniform, 0), (dbkernels.philox_normal, 2)):
        here = draw(1_000_003, seed=2**63 + 5, offset=9)
        there = draw(1_000_003, seed=2**63 + 5, offset=9, device="cuda").cpu()
        assert ulps(here, there).max() <= 2 * limit  # each within `limit` of the definition
