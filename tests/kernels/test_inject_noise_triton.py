"""inject_noise's Triton kernel without a GPU: interpreted, and compiled ahead of time for every launch there
is."""

import re

import pytest

pytest.importorskip("triton")
import aot
from dbkernels.triton.inject_noise import (
    GIVEN,
    GROUPS,
    PER_ELEMENT,
    PER_GROUP,
    PER_ROW,
    inject_noise_kernel,
    mode_of,
)
from interpreter import run_interpreted
from numerics import pairs

# Instructions an element, prologue included, of 16 a thread. An H100 issues 132 SMs x 4 schedulers x 32 lanes x 1.755
# GHz = 29.6e12 a second, and a copy moves 751e9 bfloat16 elements: 39 an element take the same time. At 51.5 it was
# measured at 473e9 elements a second, 82 % of what could be issued; so 47.5 predict .68 of a copy, 44 .73.
LONGEST = {GIVEN: 48, PER_ROW: 48, PER_GROUP: 63, PER_ELEMENT: 95}
SHORTEST = 25  # a stub is shorter


def built(mode, dtype, arch, *, scaled=True, at=False, rounds=10, noisy=True, sizes="i32"):
    wide = "fp64" if dtype == "fp64" else "fp32"
    pointers = [f"*{dtype}:16", f"*{wide}:16", f"*{dtype}:16", "*i64:16", "*i64:16"]
    signature = [*pointers, "i32", "i32", "i32", "fp64", f"{sizes}:16", sizes, "fp64"]
    constants = dict(CLEAN=True, NOISY=noisy, SCALED=scaled, MODE=mode, SEED_AT=at, OFFSET_AT=at, ROUNDS=rounds)
    report = aot.report(inject_noise_kernel, signature, {**constants, "GROUPS": GROUPS}, arch)
    assert report.spilled_bytes == 0, (dtype, scaled, report.spilled_bytes)
    return report


def test_interpreted():
    run_interpreted("interpreted_inject_noise.py")


@pytest.mark.parametrize(
    ("mode", "dtype", "arch"),
    pairs([GIVEN, PER_ROW, PER_GROUP, PER_ELEMENT], ["bf16", "fp16", "fp32", "fp64"], [90, 80]),
)
def test_compiles_without_spills(mode, dtype, arch):
    instructions = built(mode, dtype, arch).instructions / 16
    assert instructions > SHORTEST
    if dtype != "fp64":
        assert instructions <= LONGEST[mode] + 2, (dtype, instructions)  # 2: c_in


@pytest.mark.parametrize("rounds,longest", [(10, 48), (7, 44.5)])
def test_instructions_of_a_normal(rounds, longest):
    """What limits half types. A round is two wide multiplications of 64-bit results, which hold one of two arithmetic
    pipes for twice as long as others: they take less of it than the float32 instructions take of both."""
    report = built(PER_ROW, "bf16", 90, scaled=False, rounds=rounds)
    assert report.instructions / 16 <= longest
    wide = len(re.findall(r"IMAD\.(?:WIDE|HI)", report.sass))
    assert 2 * rounds * 4 - 12 <= wide <= 2 * rounds * 4 + 8, wide  # 4 groups a thread
    assert built(PER_ROW, "bf16", 90, scaled=False, rounds=rounds, at=True).instructions / 16 <= longest + 1


@pytest.mark.parametrize("arch", [80, 90])
def test_c_in_alone_is_a_copy(arch):
    for dtype in ("bf16", "fp32"):
        report = built(PER_ROW, dtype, arch, noisy=False)
        assert report.instructions / 16 < 10 and "LDG.E.128" in report.sass and "STG.E.128" in report.sass


def test_compiles_for_more_than_32_bits_of_elements():
    for mode in (PER_ROW, PER_ELEMENT):
        built(mode, "bf16", 90, sizes="i64")


@pytest.mark.parametrize(
    "numel,levels,mode,inner,grid",
    [
        (2**33, 0, GIVEN, 1, (2**22, 1)),
        (2**33, 1, PER_ROW, 1, (2**22, 1)),
        (8 * 2048, 8, PER_ROW, 1, (1, 8)),
        (2**35, 2**3, PER_ROW, 1, (2**21, 8)),
        (2**16 * 2048, 2**16, PER_GROUP, 512, (2**16, 1)),
        (6 * 4, 6, PER_GROUP, 1, (1, 1)),
        (2**31 * 2 + 8, 2, PER_ELEMENT, 2**31 + 4, (2**21 + 1, 1)),
        (15, 3, PER_ELEMENT, 5, (1, 1)),
    ],
)
def test_how_a_level_is_found(numel, levels, mode, inner, grid):
    """By arithmetic, past 2^31 elements too: every element's level is the one its row has."""
    assert mode_of(numel, levels) == (mode, inner, grid)
    assert GROUPS == 512 and grid[1] <= 65535
    levels = max(1, levels)
    for element in {0, numel // 2, numel // levels - 1, numel // levels % numel, numel - 1}:
        unit = {GIVEN: numel, PER_ROW: 4 * GROUPS * grid[0], PER_GROUP: 4, PER_ELEMENT: 1}[mode]
        assert element // unit // inner == element // (numel // levels)
