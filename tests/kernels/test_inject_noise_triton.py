"""inject_noise's Triton kernel without a GPU: interpreted, and compiled ahead of time for every launch there
is."""

import itertools

import pytest

pytest.importorskip("triton")
from interpreter import run_interpreted

# What 16 elements a thread may cost, prologue included: at 40 to 79 instructions an element, memory and
# arithmetic take the same time on an H100 (the row's kind of noise level adds a division).
LONGEST = {0: 60 * 16, 1: 60 * 16, 2: 75 * 16, 3: 110 * 16}
SHORTEST = 400  # a stub is shorter


def test_interpreted():
    run_interpreted("interpreted_inject_noise.py")


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_compiles_without_spills(arch, mode):
    import aot
    from dbkernels.triton.inject_noise import GROUPS, inject_noise_kernel

    # Without c_in a kernel is the scaled one less a few instructions: once a dtype is enough.
    variants = itertools.product(("fp16", "bf16", "fp32", "fp64"), (False, True) if mode == 0 else (True,))
    for dtype, scaled in variants:
        wide = "fp64" if dtype == "fp64" else "fp32"
        signature = [
            f"*{dtype}:16",
            f"*{wide}:16",
            f"*{dtype}:16",
            "i32:16",
            "i32",
            "fp64",
            "i32",
            "i32",
            "i32",
        ]
        constants = {"SCALED": scaled, "MODE": mode, "GROUPS": GROUPS}
        built = aot.report(inject_noise_kernel, signature, constants, arch)
        assert built.spilled_bytes == 0, (dtype, scaled, built.spilled_bytes)
        assert built.instructions > SHORTEST, (dtype, scaled, built.instructions)
        if dtype != "fp64":
            assert built.instructions <= LONGEST[mode], (dtype, scaled, built.instructions)


def test_compiles_for_more_than_32_bits_of_elements():
    import aot
    from dbkernels.triton.inject_noise import GROUPS, inject_noise_kernel

    signature = ["*bf16:16", "*fp32:16", "*bf16:16", "i64:16", "i64", "fp64", "i32", "i32", "i32"]
    for mode in (0, 3):
        constants = {"SCALED": True, "MODE": mode, "GROUPS": GROUPS}
        assert aot.report(inject_noise_kernel, signature, constants, 90).spilled_bytes == 0


@pytest.mark.parametrize(
    "numel,levels,mode,inner",
    [
        (2**33, 1, 0, 1),
        (8 * 2048, 8, 1, 1),
        (2**35, 2**3, 1, 2**32 // 2048),
        (6 * 4, 6, 2, 1),
        (2**31 * 2 + 8, 2, 3, 2**31 + 4),
        (15, 3, 3, 5),
    ],
)
def test_how_a_level_is_found(numel, levels, mode, inner):
    """By arithmetic, past 2^31 elements too: every element's level is the one its row has."""
    from dbkernels.triton.inject_noise import GROUPS, mode_of

    assert mode_of(numel, levels) == (mode, inner)
    assert GROUPS == 512
    for element in {0, numel // 2, numel // levels - 1, numel // levels % numel, numel - 1}:
        unit = {0: numel, 1: 4 * GROUPS, 2: 4, 3: 1}[mode]
        assert element // unit // inner == element // (numel // levels)
