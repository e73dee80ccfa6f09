"""The modulated norms' Triton kernels without a GPU: interpreted, and compiled ahead of time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
WIDTHS = [64, 384, 1024, 4096, 16384]
SHORTEST = 100  # a stub is shorter


def test_interpreted():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{HERE}:{HERE.parents[1]}"}
    environment.pop("DBKERNELS_BACKEND", None)
    run = subprocess.run(
        [sys.executable, str(HERE / "interpreted_ada_norm.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0 and "interpreted: ok" in run.stdout, run.stdout + run.stderr


def check(kernel, pointers, numbers, constants, warps, arch):
    import aot

    built = aot.report(kernel, [*pointers, *numbers], constants, arch, warps)
    assert built.spilled_bytes == 0, (constants, arch, built.spilled_bytes)
    assert built.instructions > SHORTEST, (constants, arch, built.instructions)


# The leanest variant and the fullest one: what lies between has fewer registers than the fullest.
VARIANTS = [dict(rms=True, full=False), dict(rms=False, full=True)]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dim", WIDTHS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_compiles_without_spills(arch, dim, variant):
    from dbkernels.triton.ada_norm import forward_kernel, layout

    rms, full = variant["rms"], variant["full"]
    for dtype in ("bf16", "fp16", "fp32") if dim == 1024 else ("bf16", "fp32"):
        rows, block, warps = layout(dim, 256, 8)
        tensor, number = f"*{dtype}:16", ["i32:16"] * 7 + ["i32", "i32", "i32:16", "fp32"]
        constants = dict(RMS=rms, GATED=full, SHIFT=full, SCALE=full, WEIGHT=full, BIAS=full, ROWS=rows, BLOCK=block)
        check(forward_kernel, [tensor] * 9 + ["*fp32:16"] * 2, number, constants, warps, arch)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dim", WIDTHS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_backward_compiles_without_spills(arch, dim, variant):
    from dbkernels.triton.ada_norm import FUSED, backward_kernel, layout
    from dbkernels.triton.ada_norm_wide import CHUNK, COLUMNS, sums_kernel, wide_backward_kernel

    rms, full = variant["rms"], variant["full"]
    flags = dict(RMS=rms, GATED=full, GRAD_H=full, SCALE=full, WEIGHT=full)
    for dtype in ("bf16", "fp16", "fp32") if dim == 1024 else ("bf16", "fp32"):
        rows, block, warps = layout(dim, 256, 4)
        tensor, single = f"*{dtype}:16", "*fp32:16"
        pointers = [tensor] * 7 + [single] * 2 + [tensor] * 2
        if block <= FUSED:
            numbers = ["i32:16"] * 10 + ["i32", "i32", "i32", "i32:16"]
            constants = dict(flags, STEPS=8, ROWS=rows, BLOCK=block)
            check(backward_kernel, [*pointers, single], numbers, constants, warps, arch)
            continue
        numbers = ["i32:16"] * 10 + ["i32", "i32:16"]
        check(wide_backward_kernel, pointers, numbers, dict(flags, CHUNK=CHUNK), 8, arch)
        numbers = ["i32:16"] * 6 + ["i32", "i32", "i32", "i32:16"]
        constants = dict(RMS=rms, GATED=full, STEPS=8, BLOCK=COLUMNS)
        check(sums_kernel, [tensor] * 4 + [single] * 3, numbers, constants, 4, arch)


def test_float64_and_strides_beyond_32_bits_compile():
    from dbkernels.triton.ada_norm import backward_kernel, forward_kernel, layout

    rows, block, warps = layout(1024, 256, 8)
    constants = dict(RMS=False, GATED=True, SHIFT=True, SCALE=True, WEIGHT=True, BIAS=True, ROWS=rows, BLOCK=block)
    numbers = ["i64:16"] * 7 + ["i64", "i64", "i32:16", "fp32"]
    check(forward_kernel, ["*fp64:16"] * 11, numbers, constants, warps, 90)
    rows, block, warps = layout(1024, 256, 4)
    constants = dict(RMS=False, GATED=True, GRAD_H=True, SCALE=True, WEIGHT=True, STEPS=8, ROWS=rows, BLOCK=block)
    numbers = ["i64:16"] * 10 + ["i32", "i64", "i32", "i32:16"]
    check(backward_kernel, ["*fp64:16"] * 12, numbers, constants, warps, 90)


@pytest.mark.parametrize("dim", [1, 17, 64, 384, 1024, 4096, 16384])
@pytest.mark.parametrize(("samples", "inner"), [(1, 1), (64, 197), (2**20, 1), (1, 2**24), (3, 5)])
def test_tiles_cover_every_row_once(dim, samples, inner):
    """By arithmetic, past 2^31 elements too."""
    from dbkernels.triton.ada_norm import layout, tiling

    rows, block, warps = layout(dim, inner, 4)
    steps, tiles = tiling(samples, inner, rows)
    assert block >= dim and rows * block <= max(1024, block) and 1 <= warps <= 32
    assert (tiles - 1) * steps * rows < inner <= tiles * steps * rows
    assert samples * tiles < 2**31  # a launch's first dimension
