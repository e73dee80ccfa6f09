"""total_norm by every backend: against float64, layouts, repeatable bits, not-finite values, torch.library's checks."""

import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dbkernels
from fake_gpu import run_faked
from interpreter import run_interpreted
from numerics import EPSILON

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FORMS = [dbkernels.total_norm, dbkernels.total_norm_reference]


def exact(tensors):
    return math.sqrt(math.fsum(x * x for tensor in tensors for x in tensor.double().flatten().tolist()))


def assert_exact(norm, tensors):
    """Squares of n values in float64 err by at most n/2 of its units; the norm is then rounded once."""
    count = sum(tensor.numel() for tensor in tensors)
    allowed = EPSILON[norm.dtype] / 2 + count * EPSILON[torch.float64]
    assert norm.dim() == 0 and norm.item() == pytest.approx(exact(tensors), rel=allowed)


@pytest.mark.parametrize("form", FORMS)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 40), max_size=3), st.sampled_from(FLOATS), st.booleans()),
        min_size=1, max_size=6,
    )
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_any_shapes_dtypes_and_strides(form, kinds):
    tensors = [torch.randn(shape).to(dtype) for shape, dtype, _ in kinds]
    tensors = [x.transpose(0, -1) if strided and x.dim() > 1 else x for x, (_, _, strided) in zip(tensors, kinds)]  # noqa: B905
    norm = form(tensors)
    assert norm.dtype == (torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32)
    assert_exact(norm, tensors)


@pytest.mark.parametrize("form", FORMS)
def test_many_elements_and_gaps_between_them(form, monkeypatch):
    monkeypatch.setattr("dbkernels._pieces.PIECE", 1000)
    tensors = [torch.randn(9000, 7)[::2], torch.randn(300, 50).bfloat16().t()[3:], torch.randn(1).expand(5)]
    assert_exact(form(tensors), tensors)


def test_is_the_optimizers_norm_to_the_bit():
    for dtype in FLOATS:
        grads = [torch.randn(shape).to(dtype) for shape in [(300, 70), (5,), (20_000,)]]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        state = [[torch.zeros(g.shape, dtype=wide) for g in grads] for _ in range(2)]
        params = [torch.zeros_like(g) for g in grads]
        norm = dbkernels.adamw_ema_step(params, grads, *state, None, step=1, lr=0.0)
        assert torch.equal(dbkernels.total_norm(grads), norm) and norm.dtype == wide


def test_nothing_is_zero():
    assert torch.equal(dbkernels.total_norm([]), torch.tensor(0.0))
    for form in FORMS:
        assert torch.equal(form([torch.empty(0), torch.empty(3, 0)]), torch.tensor(0.0))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_makes_the_norm_bad(form, dtype, value):
    tensors = [torch.ones(20_000), torch.ones(17, dtype=dtype)]
    tensors[1][16] = value
    assert not form(tensors).isfinite()


@pytest.mark.parametrize("form", FORMS)
def test_squares_may_overflow_float32(form):
    assert form([torch.full((4,), 1e30)]).item() == pytest.approx(2e30, rel=1e-6)
    assert form([torch.full((4,), 3e38)]).isinf()  # the norm itself doesn't fit


def test_repeats_bit_for_bit_whatever_the_threads():
    tensors = [torch.randn(300, 700), torch.randn(5).double(), torch.randn(9999).half()]
    threads, norms = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            norms.append(dbkernels.total_norm(tensors))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(norms[0], norms[1]) and torch.equal(norms[0], norms[2])


def test_leaves_no_graph_and_no_trace():
    weight = torch.nn.Parameter(torch.ones(3))
    version = weight._version
    assert not dbkernels.total_norm([weight]).requires_grad and weight._version == version


def test_opcheck_and_whole_compilation():
    tensors = [torch.randn(4, 3), torch.randn(3, 4).t().bfloat16(), torch.randn(2).double()]
    torch.library.opcheck(torch.ops.dbkernels.total_norm.default, (tensors,))
    torch.library.opcheck(torch.ops.dbkernels.total_norm.default, (tensors[:2],))
    compiled = torch.compile(dbkernels.total_norm, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tensors), dbkernels.total_norm(tensors))


@pytest.mark.parametrize(
    "tensors,error,words",
    [
        ([None], TypeError, r"tensors\[0\] must be a tensor, got NoneType"),
        ([torch.ones(1), 2.0], TypeError, r"tensors\[1\] must be a tensor, got float"),
        ([torch.ones(1, dtype=torch.int32)], TypeError, r"tensors\[0\] must be float16.*int32"),
        ([torch.ones(1, dtype=torch.complex64)], TypeError, r"tensors\[0\] must be float16.*complex64"),
        ([torch.ones(2).to_sparse()], TypeError, r"tensors\[0\] must be dense.*to_dense"),
        ([torch.ones(1), torch.ones(1, device="meta")], ValueError, r"tensors\[1\] is on meta, tensors\[0\] on cpu"),
    ],
)
def test_errors_name_the_tensor(tensors, error, words):
    with pytest.raises(error, match=words):
        dbkernels.total_norm(tensors)


def test_triton_interpreted():
    pytest.importorskip("triton")
    run_interpreted("interpreted_total_norm.py")


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler for the fake driver")
def test_triton_launches():
    pytest.importorskip("triton")
    run_faked("faked_total_norm.py")


@pytest.mark.parametrize(
    "dtype,loads,arch", [("fp32", 2, 90), ("fp32", 2, 80), ("bf16", 1, 90), ("fp16", 1, 90), ("fp64", 4, 90)]
)
def test_triton_compiles_to_wide_loads(dtype, loads, arch):
    pytest.importorskip("triton")
    import triton.language as tl

    import aot
    from dbkernels.triton.total_norm import BLOCK, CHUNK, squares_kernel

    types = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32, "fp64": tl.float64}
    constants = dict(TYPE=types[dtype], WIDE=types["fp64" if dtype == "fp64" else "fp32"], CHUNK=CHUNK, BLOCK=BLOCK)
    signature = ["*i64:16", "*fp64:16", "i32", "i32"]  # table, sums, tensors, place
    report = aot.report(squares_kernel, signature, constants, arch, stages=1)
    assert report.spilled_bytes == 0 and report.registers <= 96 and 200 < report.instructions < 800
    found = report.sass.count("LDG.E.128")
    assert found and found % loads == 0, found


@pytest.mark.parametrize("state", ["fp32", "fp64"])
def test_triton_finish_compiles(state):
    pytest.importorskip("triton")
    import aot
    from dbkernels.triton.total_norm import norm_kernel

    report = aot.report(norm_kernel, ["*fp64:16", f"*{state}:16", "i32"], dict(BLOCK=1024), 90, stages=1)
    assert report.spilled_bytes == 0 and 60 < report.instructions < 400, report.instructions


@pytest.mark.gpu
@pytest.mark.smoke
def test_gpu_agrees_without_a_host_sync():
    tensors = [torch.randn(1000, 333), torch.randn(64, 9).bfloat16().t(), torch.randn(7).half(), torch.empty(0)]
    tensors += [torch.randn(9) for _ in range(300)]  # more than the kernels look at together
    there = [tensor.cuda() for tensor in tensors]
    dbkernels.total_norm(there)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        norms = [dbkernels.total_norm(there) for _ in range(2)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_exact(norms[0].cpu(), tensors)
    assert torch.equal(*norms)
    there[2][3] = float("nan")
    assert dbkernels.total_norm(there).isnan()
