"""The cross-entropy rows' kernels without a GPU: interpreted, and compiled ahead of time."""

import re
import shutil

import pytest

pytest.importorskip("triton")
from interpreter import run_interpreted


def test_interpreted():
    run_interpreted("interpreted_cross_entropy_rows.py")


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler for the fake driver")
def test_few_rows_launch_few_kernels():
    from fake_gpu import run_faked

    run_faked("faked_cross_entropy.py")


def compiled(kernel, logits, out, constants, arch, warps, width="i32:16"):
    import aot
    from dbkernels.triton import cross_entropy_rows as kernels

    middle = ["i32"] if kernel == "columns_kernel" else []
    last = [] if kernel == "columns_kernel" else ["i32", "i32"]
    pointers = [f"*{logits}:16", "*i64:16", f"*{logits}:16", f"*{logits}:16"]
    pointers += [f"*{logits}:16"] if kernel == "columns_kernel" else []
    signature = [*pointers, f"*{out}:16", *middle, "i32:16", "i32:16", width, *last]
    overlap = dict(OVERLAP=out != logits)
    built = aot.report(getattr(kernels, kernel), signature, constants | overlap, arch, warps)
    assert built.spilled_bytes == 0 and 100 < built.instructions < 8000, built.instructions
    return built


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("out", ["fp32", "bf16", "fp16", "fp64"])
def test_rows_compile_without_spills(out, arch):
    built = compiled(
        "rows_kernel",
        "fp64" if out == "fp64" else "fp32",
        out,
        dict(GRADIENT=True, FEW=0, MEAN=False, BLOCK=4096),
        arch,
        8,
    )
    check_accesses(built, out)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("out", ["bf16", "fp16"])
def test_columns_compile_without_spills(out, arch):
    check_accesses(compiled("columns_kernel", "fp32", out, dict(BLOCK=2048), arch, 4), out)


def check_accesses(built, out):
    """Logits are read 16 bytes at a time; where halves are written over them, a barrier comes before each write."""
    assert len(re.findall(r"LDG\.E\S*\.128", built.sass)) >= 4
    writes = [line for line in built.sass.splitlines() if re.search(r"STG\.E\S*\.(64|128)|BAR\.SYNC", line)]
    assert any("STG" in line for line in writes)
    if out in ("bf16", "fp16"):
        first = next(i for i, line in enumerate(writes) if "STG" in line)
        assert "BAR.SYNC" in writes[first - 1]


def test_narrow_rows_and_marks_compile():
    import aot
    from dbkernels.triton.cross_entropy_rows import mark_kernel

    for width in ("i32", "i32:16"):
        compiled("rows_kernel", "fp32", "bf16", dict(GRADIENT=True, FEW=1024, MEAN=True, BLOCK=256), 90, 8, width)
    signature = ["*i64:16", "*fp32:16", "*i64:16", "*fp32:16", "i32", "i32:16", "i32:16"]
    built = aot.report(mark_kernel, signature, dict(WEIGHTED=True, MEAN=True, BLOCK=1024), 90, 4)
    assert built.spilled_bytes == 0 and 100 < built.instructions < 4000
