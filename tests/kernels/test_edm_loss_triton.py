"""edm_loss's Triton kernels without a GPU, interpreted and compiled ahead of time; and on one."""

import pytest
import torch

pytest.importorskip("triton")
import aot
from dbkernels import edm_loss, edm_loss_reference
from dbkernels.triton.edm_loss import (
    BLOCK,
    BY_ELEMENT,
    BY_GROUP,
    PARTIAL,
    READ,
    SCALED,
    STEPS,
    edm_loss_kernel,
    layout,
    scale_kernel,
    total_kernel,
)
from interpreter import run_interpreted
from numerics import EPSILON
from test_edm_loss import DTYPES, REDUCTIONS, SHAPES, S, example, graded, wide
from test_edm_loss_scaled import check_scaled_rounding

# dtype of F, of z and y, the source of the noise, elements that share a level, and instructions an element, prologue
# included. At 9.6 instructions a byte an H100's arithmetic and memory take the same time: 153 an element in float32 and
# 76 in bfloat16 (115 and 57 with z drawn again, which is 40 of them; a coefficient for each four elements is 20).
COMMON = [
    ("fp32", "fp32", READ, BLOCK, 24), ("fp32", "fp32", READ, 4, 48), ("fp32", "fp32", BY_GROUP, BLOCK, 70),
    ("bf16", "bf16", READ, BLOCK, 28), ("bf16", "bf16", BY_GROUP, 4, 95), ("bf16", "fp32", READ, BLOCK, 28),
    ("fp32", "fp32", SCALED, BLOCK, 24), ("bf16", "bf16", SCALED, BLOCK, 28), ("bf16", "bf16", SCALED, 4, 53),
]  # fmt: skip
# What odd shapes take; all gradients in float64 need the most registers.
RARE = [
    ("fp64", "fp64", READ, 1), ("fp64", "fp64", BY_GROUP, 1), ("fp64", "fp64", BY_ELEMENT, 1),
    ("fp16", "fp16", READ, 1), ("fp32", "fp32", BY_ELEMENT, 4), ("bf16", "bf16", BY_ELEMENT, BLOCK),
    ("fp64", "fp64", SCALED, 1), ("fp16", "fp16", SCALED, 1),
]  # fmt: skip
SHORTEST = 15  # a stub is shorter


def built(F, y, draw, unit, arch, *, every, whole=False, sizes="i32"):
    """Return instructions per element. every: all gradients, not F's alone; whole: a loss of each element."""
    wide = "fp64" if F == "fp64" else "fp32"
    kept = [f"*{'fp32' if dtype == 'fp16' else dtype}:16" for dtype in (F, y, y)]
    inputs = [f"*{dtype}:16" for dtype in (F, y, y, wide, wide)]
    per_row = sizes if draw == BY_ELEMENT else f"{sizes}:16"
    address = ["*i64:16", "*i64:16", "i32", "i32", "i32", "fp64"]
    numbers = [per_row, "i32", sizes, "fp64", "fp64", "fp64"]
    constants = dict(
        DRAW=draw, UNIT=unit, ELEMENTWISE=whole, WANT_F=True, WANT_Z=every and draw in (READ, SCALED), WANT_Y=every
    )
    constants |= dict(ROW_AXIS=1, GIVEN=False, SEED_AT=every, OFFSET_AT=every, ROUNDS=10, BLOCK=BLOCK)
    report = aot.report(edm_loss_kernel, [*inputs, *kept, *address, *numbers], constants, arch)
    assert report.spilled_bytes == 0, report.spilled_bytes
    return report.instructions / (BLOCK / 128)


def test_interpreted():
    run_interpreted("interpreted_edm_loss.py")


@pytest.mark.parametrize(
    "F,y,draw,unit,longest,arch", [*((*case, 90) for case in COMMON), *((*case, 80) for case in COMMON[::4])]
)
def test_compiles_within_its_budget(F, y, draw, unit, longest, arch):
    assert SHORTEST < built(F, y, draw, unit, arch, every=False) <= longest


@pytest.mark.parametrize("F,y,draw,unit,arch", [*((*case, 90) for case in RARE), *((*case, 80) for case in RARE[2:4])])
def test_compiles_without_spills(F, y, draw, unit, arch):
    assert SHORTEST < built(F, y, draw, unit, arch, every=True, whole=unit == 1)


def test_compiles_for_more_than_32_bits_of_elements():
    for draw, unit in ((READ, BLOCK), (BY_GROUP, 4)):
        assert SHORTEST < built("bf16", "bf16", draw, unit, 90, every=False, sizes="i64")


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("x,by", [("fp32", "fp32"), ("bf16", "fp32"), ("fp64", "fp64")])
def test_scaling_compiles(x, by, arch):
    for elementwise, per_row in ((False, "i64:16"), (True, "i32:16")):
        signature = [f"*{x}:16", f"*{by}:16", per_row, "fp64", "fp64"]
        constants = dict(ROW_AXIS=1, ELEMENTWISE=elementwise, STEPS=STEPS, BLOCK=BLOCK)
        report = aot.report(scale_kernel, signature, constants, arch)
        assert report.spilled_bytes == 0 and 80 < report.instructions < 700, report.instructions


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_the_sum_of_partial_sums_compiles(dtype, arch):
    signature = [f"*{dtype}:16", f"*{dtype}:16", "i32"]
    report = aot.report(total_kernel, signature, dict(BLOCK=PARTIAL), arch)
    assert report.spilled_bytes == 0 and 50 < report.instructions < 400, report.instructions


@pytest.mark.parametrize(
    "shape,levels,reduction,rows,unit",
    [
        ((2**17, 2**17), (), "mean", 1, BLOCK),
        ((8, 2**31), (), "sample", 8, BLOCK),
        ((8, 2**31), (8,), "mean", 8, BLOCK),
        ((4, 2**20, 4096), (4, 2**20), "sample", 2**22, BLOCK),
        ((4, 2**22, 768), (4, 2**22), "sample", 4, 4),
        ((4, 2**22, 768), (4, 2**22), "none", 1, 4),
        ((4, 2**22, 767), (4, 2**22), "mean", 1, 1),
        ((5,), (5,), "sample", 5, BLOCK),
    ],
)
def test_every_element_finds_its_level_and_sample(shape, levels, reduction, rows, unit):
    """By arithmetic, past 2^31 elements too, as the kernel does it: 64 bits once a program, 32 within it."""
    shape, levels = torch.Size(shape), torch.Size(levels)
    found, step, per_level, shared = layout(shape, levels, reduction)
    numel, count = shape.numel(), levels.numel()
    assert (found, shared) == (rows, unit) and per_level == numel // count
    per_row = numel // rows
    for element in {0, numel // 2, numel // count - 1, (numel // count) % numel, numel - 5, numel - 1}:
        row, within = divmod(element, per_row)
        first = row * per_row + within // BLOCK * BLOCK
        if unit == BLOCK:
            level = row * step
        else:
            level, narrow = first // per_level, first % per_level + (element - first) // unit * unit
            assert narrow < 2**31
            level += narrow // per_level
        assert level == element // (numel // count)
        if reduction == "sample":
            assert row * shape[0] // rows == element // (numel // shape[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape,levels", SHAPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("source", ["read", "scaled", "drawn"])
def test_gpu_against_float64(dtype, shape, levels, reduction, source):
    drawn, scaled = source == "drawn", source == "scaled"
    F, z, y, sigma = example(shape, levels, dtype, "cuda", scaled)
    given = dict(z=None, seed=2**63 + 11, offset=2) if drawn else dict(z=z, z_scaled=scaled)
    ours = graded(lambda F, y: edm_loss(F, y=y, sigma=sigma, sigma_data=S, reduction=reduction, **given), F, y)
    address = (2**63 + 11, 2) if drawn else (0, 0)
    wide_z = None if drawn else z.double()
    exact = graded(
        lambda F, y: edm_loss_reference(F, wide_z, y, sigma.double(), S, reduction, *address, z_scaled=scaled),
        F.double(), y.double(),
    )  # fmt: skip
    for a, b, own in zip((ours[0], *ours[1]), (exact[0], *exact[1]), (wide(dtype), dtype, dtype), strict=True):
        unit = 16 * EPSILON[torch.float32] + (0 if own == torch.float64 else EPSILON[own])
        assert a.dtype == own and ((a.double() - b).abs() <= unit * b.abs().max()).all()


@pytest.mark.gpu
@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", ["read", "scaled", "drawn"])
def test_gpu_forward_and_backward(dtype, source):
    test_gpu_against_float64(dtype, (64, 197, 24), (64,), "sample", source)
    test_gpu_against_float64(dtype, (5, 3, 7), (5, 3), "mean", source)


@pytest.mark.gpu
def test_gpu_a_scaled_z_costs_its_own_rounding_alone():
    """Normals, quotients and the reciprocal root may be 2 ulp off each, but both kernels have one c_in."""
    check_scaled_rounding("cuda", 20)


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("samples", [3, 64, 70_000])
def test_gpu_an_expected_upstream_gradient_changes_no_bit(reduction, samples):
    """That of a mean over the losses, 1/3 for one: what was kept comes back; another is applied."""
    F, z, y, sigma = example((samples, 5, 8), (samples,), torch.float32, "cuda")
    F.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = edm_loss(F, z, y, sigma, sigma_data=S, reduction=reduction, weight=0.25)
    kept = max(saved, key=torch.Tensor.numel)
    before = kept.clone()
    (grad,) = torch.autograd.grad(loss.mean(), F)
    assert grad.data_ptr() == kept.data_ptr() and torch.equal(grad, before)
    other = edm_loss(F, z, y, sigma, sigma_data=S, reduction=reduction, weight=0.25)
    (twice,) = torch.autograd.grad(2 * other.mean(), F)
    assert torch.equal(twice, 2 * before)


@pytest.mark.gpu
def test_gpu_forms_of_the_level_and_strides():
    F, z, y, sigma = example((33, 65, 32), (33,), torch.float32, "cuda")
    expected = edm_loss(F, z, y, sigma, sigma_data=S)
    strided = F.transpose(0, 2).contiguous().transpose(0, 2)
    for other in (sigma.double(), sigma.view(33, 1, 1), torch.stack((sigma, sigma), 1)[:, 0]):
        assert torch.equal(edm_loss(strided, z, y, other, sigma_data=S), expected)
    level = torch.tensor(0.25, device="cuda")
    assert torch.equal(edm_loss(F, z, y, 0.25, sigma_data=S), edm_loss(F, z, y, level, sigma_data=S))
    empty = edm_loss(F[:0], z[:0], y[:0], 0.25, sigma_data=S)
    assert empty.isnan() and edm_loss(F[:0], z[:0], y[:0], 0.25, sigma_data=S, reduction="sum") == 0


@pytest.mark.gpu
def test_gpu_repeats_and_keeps_what_a_retained_graph_needs():
    F, z, y, sigma = example((33, 65, 32), (33,), torch.float32, "cuda")
    F.requires_grad_()
    losses = [edm_loss(F, z, y, sigma, sigma_data=S, reduction="sample") for _ in range(2)]
    assert torch.equal(*losses)
    upstream = torch.randn(33, device="cuda")
    (first,) = torch.autograd.grad(losses[0], F, upstream, retain_graph=True)
    expected = first.clone()
    first.zero_()
    assert torch.equal(torch.autograd.grad(losses[0], F, upstream)[0], expected)
