"""The Triton kernels of sample_sigma and philox_uniform without a GPU: interpreted, and compiled ahead of time."""

import pytest

pytest.importorskip("triton")
import aot
from interpreter import run_interpreted

ADDRESS = ["*i64:16", "*i64:16", "i32", "i32", "i32"]


def test_interpreted():
    run_interpreted("interpreted_sample_sigma.py")


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("numel", ["i32", "i64"])  # i64: past 2^31 elements
def test_compile_without_spills(arch, numel):
    """Shortest: a stub is shorter. Longest: ten Philox rounds are 60 instructions a group; a level is some 200 of
    float64, twice a thread; a uniform is three, four times four a thread."""
    from dbkernels.triton.philox_uniform import GROUPS, philox_uniform_kernel
    from dbkernels.triton.sample_sigma import GROUPS as FEW
    from dbkernels.triton.sample_sigma import sample_sigma_kernel

    at = dict(SEED_AT=arch == 90, OFFSET_AT=arch == 90)
    uniform = aot.report(philox_uniform_kernel, ["*fp32:16", *ADDRESS, numel], {**at, "GROUPS": GROUPS}, arch)
    assert uniform.spilled_bytes == 0 and 150 < uniform.instructions < 500, uniform.instructions
    signature = ["*fp32:16", *ADDRESS, numel, *["fp64"] * 7]
    sigma = aot.report(sample_sigma_kernel, signature, {**at, "GROUPS": FEW}, arch)
    assert sigma.spilled_bytes == 0 and 300 < sigma.instructions < 1000, sigma.instructions
    assert "DFMA" in sigma.sass, "float64 was lost on the way"
