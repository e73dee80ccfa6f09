"""The Triton kernels of inject_noise from a table without a GPU: interpreted, and compiled ahead of time."""

import pytest
import torch

pytest.importorskip("triton")
import dbkernels
from interpreter import run_interpreted
from numerics import pairs
from test_inject_noise_table import example

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def test_interpreted():
    run_interpreted("interpreted_inject_noise_table.py")


@pytest.mark.parametrize(("width", "stored", "arch"), pairs([64, 197, 4096], list(DTYPES), [90, 80]))
def test_compiles_without_spills(arch, width, stored):
    """What 16 elements a thread may cost (4 of float64, each six times as much): 60 instructions each for the noise,
    as in the dense kernel, and 35 for the rows; 130 where a row may begin anywhere, as each element is then loaded by
    itself. A stub is shorter than 400."""
    import aot
    from dbkernels.triton.inject_noise_table import inject_noise_table_kernel, tile_of

    wide = "fp64" if stored == "fp64" else "fp32"
    rows, groups = tile_of(width, DTYPES[stored])
    whole = "i32:16" if width % 16 == 0 else "i32"
    pointers = ["*i64:16", f"*{stored}:16", f"*{wide}:16", f"*{stored}:16", "*i64:16", "*i64:16"]
    signature = [*pointers, "i32", "i32", "i32", "fp64", "i32", "i32", whole, "i32", "fp64"]
    constants = dict(NORMALIZE=True, SCALED=True, ALIGNED=width % 4 == 0, GIVEN=False, SEED_AT=arch == 90)
    constants |= dict(OFFSET_AT=arch == 90, ROUNDS=10, ROWS=rows, GROUPS=groups)
    built = aot.report(inject_noise_table_kernel, signature, constants, arch)
    assert built.spilled_bytes == 0
    longest = (95 if width % 16 == 0 else 190) * 16 * (1.5 if stored == "fp64" else 1)
    assert 400 < built.instructions <= longest, built.instructions


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("stored", DTYPES)
def test_the_gradients_sums_compile_without_spills(arch, stored):
    import aot
    from dbkernels.triton.inject_noise_table import SUM_COLUMNS, SUM_ROWS, row_sums_kernel

    wide = "fp64" if stored == "fp64" else "fp32"
    signature = [f"*{stored}:16", "*i64:16", "*i64:16", f"*{wide}:16", f"*{wide}:16", "i32:16", "i32", "i32", "fp64"]
    constants = {"SCALED": True, "ROWS": SUM_ROWS, "COLUMNS": SUM_COLUMNS}
    built = aot.report(row_sums_kernel, signature, constants, arch)
    assert built.spilled_bytes == 0 and 100 < built.instructions < 1000, built.instructions


@pytest.mark.gpu
def test_gpu_other_forms_are_the_same():
    """32-bit indices, a level that is a number, levels of another dtype, strides."""
    indices, table, sigma = example((4, 6), (4,), 9, 40, torch.float32, "cuda")
    expected = dbkernels.inject_noise((indices, table), sigma, seed=3)
    strided = table.t().contiguous().t()
    assert torch.equal(dbkernels.inject_noise((indices.int(), strided), sigma.double(), seed=3), expected)
    level = torch.tensor(0.25, device="cuda")
    assert torch.equal(*(dbkernels.inject_noise((indices, table), s, sigma_data=0.5, seed=3) for s in (0.25, level)))
