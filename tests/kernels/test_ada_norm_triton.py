"""The modulated norms' Triton kernels without a GPU: interpreted, compiled ahead of time, launched on a fake one."""

import re
import shutil

import pytest
import torch

from interpreter import run_interpreted

pytest.importorskip("triton")
SHORTEST = 100  # instructions; a stub has fewer
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


@pytest.mark.parametrize("script", ["interpreted_ada_norm.py", "interpreted_norm_plans.py"])
def test_interpreted(script):
    run_interpreted(script)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler for the fake driver")
def test_launches_and_functions_on_a_fake_gpu():
    from fake_gpu import run_faked

    print(run_faked("faked_ada_norm.py"))


def inputs(shape, dtype, full):
    """The leanest variant, or the fullest: what lies between has fewer registers than the fullest. Chunks of one tensor
    are what a model modulates by."""
    from dbkernels.triton.ada_norm_launch import Inputs

    samples, _, dim = shape
    x = torch.empty(shape, dtype=dtype, device="meta")
    vector = torch.empty(dim, dtype=dtype, device="meta") if full else None
    chunk = torch.empty(samples, 1, 6 * dim, dtype=dtype, device="meta")[..., :dim] if full else None
    return Inputs(x, x if full else None, chunk, chunk, chunk, vector, vector)


def plans(shape, dtype, full, rms=False):
    """Forward and backward plans, as the op makes them; on a meta device nothing is compiled."""
    from dbkernels.triton.ada_norm_launch import Backward, Forward, Wanted

    given = inputs(shape, dtype, full)
    likes = [None if t is None else (t.shape, t.dtype) for t in given[2:]]
    grad_h = given.x if full else None
    backward = Backward(given.x, grad_h, given, rms, shape[0] * shape[1], given.x.shape, Wanted(*likes))
    return Forward(given, 1e-6, rms, given.x.shape, joint=True), backward


def compiled(launch, pointers, arch, number="i32"):
    """Compile a prepared launch as Triton would at its first call: no spills, not a stub."""
    import aot

    options = dict(launch.constants)
    warps = options.pop("num_warps")
    limits = {"maxnreg": options.pop("maxnreg")} if "maxnreg" in options else {}
    numbers = [number + (":16" if n % 16 == 0 else "") for n in launch.numbers]
    built = aot.report(launch.kernel, [*pointers, *numbers], options, arch, warps, **limits)
    assert built.spilled_bytes == 0, (launch.constants, arch, built.spilled_bytes)
    assert built.instructions > SHORTEST, (launch.constants, arch, built.instructions)
    return built


def pointers(dtype, tensors, singles, results, sums=()):
    tensor, single = f"*{NAMES[dtype]}:16", "*fp64:16" if dtype == torch.float64 else "*fp32:16"
    return [tensor] * tensors + [single] * singles + [tensor] * results + [tensor if s else single for s in sums]


def forward_pointers(dtype):
    return pointers(dtype, 9, 2, 0)


def backward_pointers(dtype, backward):
    return pointers(dtype, 7, 2, 2, [not backward.two] * 3 if backward.fused else ())


def count(built, instruction):
    return len(re.findall(rf"\b{instruction}", built.sass))


BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("dim", "dtype"), [(384, BFLOAT16), (768, BFLOAT16), (1024, BFLOAT16), (4096, BFLOAT16), (1024, FLOAT32)]
)
@pytest.mark.parametrize("full", [False, True])
def test_rows_move_by_16_bytes(dim, dtype, full):
    """The statistics alone are read and written one by one. And as many programs run at a time as was reckoned with."""
    from dbkernels.triton.ada_norm_tiles import backward_tile

    forward, backward = plans((64, 1024, dim), dtype, full)
    built = compiled(forward.launch, forward_pointers(dtype), 90)
    assert count(built, "LDG") == count(built, r"LDG\.E\.128")
    assert count(built, "STG") - count(built, r"STG\.E\.128") <= 2 * forward.launch.constants["CHUNKS"]
    assert count(built, r"STG\.E\.128") >= dim * dtype.itemsize // 16 // (32 * forward.launch.constants["num_warps"])

    built = compiled(backward.main, backward_pointers(dtype, backward), 90)
    assert count(built, "LDG") - count(built, r"LDG\.E\.128") == 4  # mean and rstd, of these rows and the next
    assert built.registers <= backward_tile(dim, 1024, dtype, full)[1]


@pytest.mark.parametrize(("arch", "dtype"), [(80, BFLOAT16), (90, torch.float16), (90, FLOAT32)])
@pytest.mark.parametrize("full", [False, True])
def test_compiles_without_spills(arch, dtype, full):
    # A gated forward pass wider than 8192 with all five vectors spills some 200 bytes to the L1 cache
    for shape in [(64, 197, 64), (16, 256, 1152), (2, 64, 8192 if full else 16384)]:
        forward, backward = plans(shape, dtype, full, rms=not full)
        compiled(forward.launch, forward_pointers(dtype), arch)
        compiled(backward.main, backward_pointers(dtype, backward), arch)
        if backward.sums is not None:
            compiled(backward.sums, pointers(dtype, 4, 2, 0, [not backward.two] * 3), arch)


@pytest.mark.parametrize("full", [False, True])
def test_the_sums_kernel_compiles(full):
    _, backward = plans((64, 1024, 1024), torch.bfloat16, full)
    if backward.two:
        compiled(backward.add, ["*fp32:16", *["*bf16:16"] * 8], 90)
    assert backward.two == full


def test_float64_and_strides_beyond_32_bits_compile():
    """The fullest backward pass in float64, behind a gate, spills ten words with Triton 3.6."""
    forward, _ = plans((16, 256, 1024), torch.float64, True)
    compiled(forward.launch, forward_pointers(torch.float64), 90, "i64")
    _, backward = plans((16, 256, 1024), torch.float64, False)
    compiled(backward.main, backward_pointers(torch.float64, backward), 90, "i64")


@pytest.mark.parametrize("dim", [1, 17, 64, 384, 768, 1024, 1100, 4096, 16383, 16384])
@pytest.mark.parametrize(("samples", "inner"), [(1, 1), (64, 197), (2**20, 1), (1, 2**24), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tiles_cover_every_row_once(dim, samples, inner, dtype):
    """By arithmetic, past 2^31 elements too."""
    from dbkernels.triton import ada_norm_tiles as tiles

    tile = tiles.forward_tile(dim, inner, dtype)
    steps, programs = tiles.forward_programs(samples, inner, tile)
    check_tile(dim, tile)
    assert (programs - 1) * steps * tile.rows < inner <= programs * steps * tile.rows
    assert samples * programs < 2**31  # a launch's first dimension
    for gated in (False, True):
        tile, registers = tiles.backward_tile(dim, inner, dtype, gated)
        steps, programs = tiles.backward_programs(samples, inner, tile, registers)
        if tile.lanes <= tiles.WIDEST:
            check_tile(dim, tile)
            assert (programs - 1) * steps * tile.rows < inner <= programs * steps * tile.rows
            assert samples * programs < 2**31
    rows, programs = tiles.wide_programs(samples, inner)
    assert (programs - 1) * rows < inner <= programs * rows


def check_tile(dim, tile):
    assert tile.columns * tile.chunks >= dim and tile.rows * tile.lanes == 32 * tile.warps <= 1024


@pytest.mark.parametrize("shape", [(64, 1024, 1024), (32, 2048, 768), (128, 197, 384), (16, 1024, 4096)])
def test_partial_sums_are_few(shape):
    """Written and read in float32, they move at most a twentieth of what x, grad and dx do in bfloat16."""
    samples, inner, dim = shape
    from dbkernels.triton.ada_norm_tiles import backward_programs, backward_tile

    tile, registers = backward_tile(dim, inner, torch.bfloat16, False)
    _, programs = backward_programs(samples, inner, tile, registers)
    assert 2 * 2 * 4 * samples * programs * dim <= 0.05 * 3 * 2 * samples * inner * dim
