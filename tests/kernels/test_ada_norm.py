"""ada_layer_norm and ada_rms_norm: against float64, their gradients, torch.library's checks, layouts, compile."""

import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st

import dbkernels
from dbkernels.ada_norm import _backward, _forward
from numerics import EPSILON, assert_as_good_as_eager

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(2, 5, 24), (3, 70, 17), (4, 9, 384), (1, 2, 4096), (6, 33), (2, 3, 4, 8)]
NORMS = {False: dbkernels.ada_layer_norm, True: dbkernels.ada_rms_norm}


def eager(x, shift, scale, weight, bias, eps, rms):
    """The op as one writes it with PyTorch's own norms, at x's dtype."""
    shape = x.shape[-1:]
    out = functional.rms_norm(x, shape, weight, eps) if rms else functional.layer_norm(x, shape, weight, bias, eps)
    return out if scale is None else out * (1 + scale) + shift


def assert_good(ours, theirs, exact, dtype):
    """By output and gradient. In float64 the exact value is itself computed in float64, some tens of roundings away."""
    for a, b, c in zip((ours[0], *ours[1]), (theirs[0], *theirs[1]), (exact[0], *exact[1]), strict=True):
        if dtype == torch.float64:
            assert (a - c).abs().max() <= 64 * EPSILON[dtype] * c.abs().max()
        else:
            assert_as_good_as_eager(a, b, c, dtype)


def example(shape, dtype, per_token=False, affine=True, rms=False):
    x = (torch.randn(shape) * 2 + 0.5).to(dtype)
    rows = shape if per_token else (shape[0], *[1] * (len(shape) - 2), shape[-1])
    shift, scale = (torch.randn(rows).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(shape[-1]).to(dtype) for _ in range(2)) if affine else (None, None)
    return x, shift, scale, weight, None if rms else bias


def call(rms, x, shift, scale, weight, bias, eps=1e-6):
    affine = dict(weight=weight) if rms else dict(weight=weight, bias=bias)
    return NORMS[rms](x, shift, scale, **affine, eps=eps)


def gradients(op, tensors, grad):
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in tensors]
    out = op(*leaves)
    given = [leaf for leaf in leaves if leaf is not None]
    return out.detach(), torch.autograd.grad(out, given, grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_against_float64(dtype, shape, rms, per_token):
    tensors = example(shape, dtype, per_token, affine=shape[-1] != 384, rms=rms)
    grad = torch.randn(shape).to(dtype)
    ours = gradients(lambda *t: call(rms, *t), tensors, grad)
    theirs = gradients(lambda *t: eager(*t, 1e-6, rms), tensors, grad)
    wide = [t if t is None else t.double() for t in tensors]
    exact = gradients(lambda *t: dbkernels._modulation.definition(*t, 1e-6, rms), wide, grad.double())
    assert_good(ours, theirs, exact, dtype)


def test_a_large_mean_does_not_drown_the_variance():
    """E[x²] − E[x]² would have no digit left."""
    x = torch.randn(4, 64, 256) + 3000
    out, exact = dbkernels.ada_layer_norm(x), functional.layer_norm(x.double(), (256,), eps=1e-6)
    # x itself is rounded to 3000·2^-24 = 2e-4 of a standard deviation; the mean's rounding is as large
    assert (out.double() - exact).abs().max() < 1e-3


@pytest.mark.kernels
@given(
    shape=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    dim=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    rms=st.booleans(),
    per_token=st.booleans(),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "chunked"]),
)
@settings(max_examples=100, deadline=None)
def test_any_shape_and_stride(shape, dim, dtype, rms, per_token, layout):
    torch.manual_seed(dim)
    x, shift, scale, weight, bias = example((*shape, dim), dtype, per_token, rms=rms)
    if layout == "transposed":
        x = x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "sliced":
        x = torch.cat([x, x], -1)[..., :dim]
    if layout == "chunked":  # as they come from one linear layer: rows far apart
        shift, scale = torch.cat([shift, scale], -1).chunk(2, -1)
    ours = call(rms, x, shift, scale, weight, bias)
    exact = dbkernels._modulation.definition(x, shift, scale, weight, bias, 1e-6, rms)
    assert ours.shape == x.shape and ours.dtype == dtype and ours.is_contiguous()
    # A row of one or two nearly equal elements divides by almost nothing, so rounding of the mean shows: absolute 1e-3.
    slack = 2 * EPSILON[dtype] + (1e-12 if dtype == torch.float64 else 1e-3)
    assert ((ours.double() - exact.double()).abs() <= slack * (1 + exact.double().abs())).all()


def test_modulation_in_every_shape_it_may_have():
    x = torch.randn(4, 5, 8)
    shift, scale = torch.randn(2, 4, 1, 8)
    expected = dbkernels.ada_layer_norm(x, shift, scale)
    assert torch.equal(dbkernels.ada_layer_norm(x, shift.squeeze(1), scale.squeeze(1)), expected)
    assert torch.equal(dbkernels.ada_layer_norm(x, shift.expand(x.shape), scale.expand(x.shape)), expected)
    one = dbkernels.ada_layer_norm(x, shift[:1], scale[:1])
    assert torch.equal(one[0], expected[0]) and not torch.equal(one[1], expected[1])
    assert torch.equal(
        dbkernels.ada_layer_norm(x.unsqueeze(1), shift.squeeze(1), scale.squeeze(1)).squeeze(1), expected
    )
    assert torch.equal(dbkernels.ada_layer_norm(x, None, scale), dbkernels.ada_layer_norm(x, 0 * shift, scale))


def test_mixed_dtypes_as_under_autocast():
    x = torch.randn(3, 4, 16, requires_grad=True)
    shift, scale = torch.randn(2, 3, 1, 16).bfloat16().requires_grad_().unbind()
    with torch.autocast("cpu", torch.bfloat16):
        out = dbkernels.ada_layer_norm(x, shift, scale)
    assert out.dtype == torch.float32
    torch.testing.assert_close(
        out, eager(x, shift.float(), scale.float(), None, None, 1e-6, False), rtol=1e-5, atol=1e-5
    )
    for grad, leaf in zip(torch.autograd.grad(out.sum(), (x, shift, scale)), (x, shift, scale), strict=True):
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape


def test_nan_and_infinity_stay_in_their_row():
    x = torch.randn(2, 4, 8)
    x[0, 1, 2], x[1, 3, 0] = float("nan"), float("inf")
    bad = ~dbkernels.ada_layer_norm(x).isfinite().all(-1)
    assert bad.tolist() == [[False, True, False, False], [False, False, False, True]]


@pytest.mark.parametrize("shape", [(0, 3, 8), (3, 0, 8)])
def test_empty(shape):
    x, shift, scale, weight, bias = example(shape, torch.float32)
    out, grads = gradients(lambda *t: call(False, *t), (x, shift, scale, weight, bias), torch.zeros(shape))
    assert out.shape == shape and all(grad.abs().sum() == 0 for grad in grads)


@pytest.mark.parametrize("rms", [False, True])
def test_repeats_bit_for_bit_whatever_the_threads(rms):
    tensors, grad = example((5, 300, 96), torch.float32, rms=rms), torch.randn(5, 300, 96)
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out, grads = gradients(lambda *t: call(rms, *t), tensors, grad)
            runs.append([out, *grads])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_gradcheck(rms, per_token):
    tensors = [t for t in example((2, 3, 5), torch.float64, per_token, rms=rms) if t is not None]
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: call(rms, *t, *([None] if rms else [])), leaves)
    assert torch.autograd.gradcheck(
        lambda *t: dbkernels._modulation.definition(*t, *([None] if rms else []), 1e-6, rms), leaves
    )


def test_the_backward_definition_is_the_kernels():
    """Every device without a kernel runs it; poisoned memory would show what a kernel leaves unwritten."""
    x, grad = torch.randn(2, 3, 70, 17)
    scale, weight = torch.randn(3, 1, 17), torch.randn(17)
    for rms in (False, True):
        _, mean, rstd = _forward(x, None, scale, weight, None, 1e-6, rms)
        poison = torch.full_like(x, float("nan"))  # freed at once: the op's outputs are likely to take its place
        del poison
        ours = torch.ops.dbkernels.ada_norm_backward(grad, x, scale, weight, mean, rstd)
        for a, b in zip(ours, _backward(grad, x, scale, weight, mean, rstd), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_only_the_gradients_that_are_wanted():
    x, shift, scale, weight, bias = example((2, 3, 8), torch.float32)
    scale.requires_grad_()
    out = call(False, x, shift, scale, weight, bias)
    (grad,) = torch.autograd.grad(out.sum(), scale)
    assert grad.shape == scale.shape


@pytest.mark.parametrize("rms", [False, True])
def test_one_dimension(rms):
    x, shift, scale, weight, bias = (
        t if t is None else t.flatten() for t in example((1, 1, 24), torch.float64, rms=rms)
    )
    ours = gradients(lambda *t: call(rms, *t), (x, shift, scale, weight, bias), torch.ones(24, dtype=torch.float64))
    exact = gradients(lambda *t: eager(*t, 1e-6, rms), (x, shift, scale, weight, bias), torch.ones_like(x))
    for a, b in zip((ours[0], *ours[1]), (exact[0], *exact[1]), strict=True):
        assert a.shape == (24,)
        torch.testing.assert_close(a, b)


@pytest.mark.kernels
def test_saves_its_inputs_and_two_numbers_a_row():
    x, shift, scale, _, _ = example((8, 64, 32), torch.float32)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.data_ptr(), t.nbytes) and t, lambda t: t
    ):
        dbkernels.ada_layer_norm(x.requires_grad_(), shift.requires_grad_(), scale.requires_grad_())
    assert sum(saved.values()) == x.nbytes + scale.nbytes + 2 * 4 * 8 * 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rms", [False, True])
def test_opcheck(dtype, rms):
    x, shift, scale, weight, bias = example((2, 3, 8), dtype, rms=rms)
    torch.library.opcheck(torch.ops.dbkernels.ada_norm.default, (x, shift, scale, weight, bias, 1e-6, rms))
    _, mean, rstd = _forward(x, shift, scale, weight, bias, 1e-6, rms)
    torch.library.opcheck(torch.ops.dbkernels.ada_norm_backward.default, (x, x, scale, weight, mean, rstd))


@pytest.mark.kernels
def test_compiles_whole_and_once(compile_counter):
    compiled = torch.compile(lambda *t: dbkernels.ada_layer_norm(*t).square(), fullgraph=True, backend=compile_counter)
    for _ in range(4):
        x, shift, scale, _, _ = example((4, 5, 8), torch.float32)
        leaves = [t.requires_grad_() for t in (x, shift, scale)]
        ours, expected = compiled(*leaves), dbkernels.ada_layer_norm(*leaves).square()
        assert torch.equal(ours, expected)
        for a, b in zip(
            torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
        ):
            assert torch.equal(a, b)
    assert compile_counter.frame_count == 1


def test_meta():
    out = dbkernels.ada_layer_norm(torch.empty(2, 3, 8, device="meta"), *torch.empty(2, 2, 1, 8, device="meta"))
    assert out.shape == (2, 3, 8) and out.device.type == "meta"


X = torch.randn(4, 3, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(x=[1.0]), TypeError, r"x must be a torch\.Tensor"),
        (dict(x=X.int()), TypeError, "x must be float16"),
        (dict(x=torch.randn(())), ValueError, r"x must be \(\.\.\., D\)"),
        (dict(x=torch.empty(1, 16385)), ValueError, "D from 1 to 16384"),
        (dict(x=X, shift=torch.ones(3, 8)), ValueError, r"shift has shape \(3, 8\)"),
        (dict(x=X, scale=torch.ones(4, 2, 8)), ValueError, r"scale has shape \(4, 2, 8\)"),
        (dict(x=X, scale=2.0), TypeError, "scale must be a floating tensor"),
        (dict(x=X, scale=torch.ones(4, 8, device="meta")), ValueError, "scale is on meta"),
        (dict(x=X, weight=torch.ones(7)), ValueError, r"weight must be \(8,\)"),
        (dict(x=X, bias=torch.ones(8).int()), TypeError, "bias must be a floating"),
        (dict(x=X, eps=-1.0), ValueError, r"eps=-1\.0"),
        (dict(x=X, eps="1"), TypeError, "eps must be a float"),
    ],
)
def test_errors_name_the_argument(arguments, error, words):
    with pytest.raises(error, match=words):
        dbkernels.ada_layer_norm(**arguments)


GPU_SHAPES = [*SHAPES, (3, 5000, 64), (2, 7, 16384), pytest.param((64, 197, 384), marks=pytest.mark.smoke)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GPU_SHAPES)
@pytest.mark.parametrize("rms", [False, True])
def test_gpu_against_float64(dtype, shape, rms):
    tensors = [t if t is None else t.cuda() for t in example(shape, dtype, rms=rms)]
    grad = torch.randn(shape, device="cuda").to(dtype)
    ours = gradients(lambda *t: call(rms, *t), tensors, grad)
    theirs = gradients(lambda *t: eager(*t, 1e-6, rms), tensors, grad)
    wide = [t if t is None else t.double() for t in tensors]
    exact = gradients(lambda *t: dbkernels._modulation.definition(*t, 1e-6, rms), wide, grad.double())
    assert_good(ours, theirs, exact, dtype)
    again = gradients(lambda *t: call(rms, *t), tensors, grad)
    assert all(torch.equal(a, b) for a, b in zip((ours[0], *ours[1]), (again[0], *again[1]), strict=True))
