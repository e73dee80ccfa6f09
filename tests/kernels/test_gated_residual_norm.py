"""gated_residual_norm: against float64, all its gradients, torch.library's checks, layouts, compile."""

import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st

import dbkernels
from dbkernels import gated_residual_norm_reference
from dbkernels.gated_residual_norm import _backward, _forward
from numerics import EPSILON, assert_as_good_as_eager

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(2, 5, 24), (3, 70, 17), (4, 9, 384), (1, 2, 4096), (6, 33)]


def eager(x, branch, gate, shift, scale, weight, bias, rms):
    """As one writes it with PyTorch's own norms, at x's dtype."""
    h, shape = x + gate * branch, x.shape[-1:]
    out = functional.rms_norm(h, shape, weight, 1e-6) if rms else functional.layer_norm(h, shape, weight, bias, 1e-6)
    return h, out * (1 + scale) + shift


def example(shape, dtype, per_token=False, affine=True, rms=False):
    x, branch = (torch.randn(shape).to(dtype) for _ in range(2))
    rows = shape if per_token else (shape[0], *[1] * (len(shape) - 2), shape[-1])
    gate, shift, scale = (torch.randn(rows).to(dtype) for _ in range(3))
    weight, bias = (torch.randn(shape[-1]).to(dtype) for _ in range(2)) if affine else (None, None)
    return x, branch, gate, shift, scale, weight, None if rms else bias


def call(rms, x, branch, gate, shift, scale, weight, bias):
    norm = "rms" if rms else "layer"
    return dbkernels.gated_residual_norm(x, branch, gate, shift, scale, weight=weight, bias=bias, norm=norm)


def gradients(op, tensors, grads):
    """Both outputs and the gradients of all that is given; grads of None say that an output isn't used."""
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in tensors]
    outs = op(*leaves)
    used = [i for i, grad in enumerate(grads) if grad is not None]
    given = [leaf for leaf in leaves if leaf is not None]
    found = torch.autograd.grad([outs[i] for i in used], given, [grads[i] for i in used], allow_unused=True)
    zeros = [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(found, given, strict=True)]
    return *(out.detach() for out in outs), *zeros


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_against_float64(dtype, shape, rms, per_token):
    tensors = example(shape, dtype, per_token, affine=shape[-1] != 384, rms=rms)
    grads = [torch.randn(shape).to(dtype) for _ in range(2)]
    ours = gradients(lambda *t: call(rms, *t), tensors, grads)
    theirs = gradients(lambda *t: eager(*t, rms), tensors, grads)
    wide = [t if t is None else t.double() for t in tensors]
    exact = gradients(lambda *t: gated_residual_norm_reference(*t, 1e-6, rms), wide, [grad.double() for grad in grads])
    for a, b, c in zip(ours, theirs, exact, strict=True):
        if dtype == torch.float64:  # the exact value is itself computed in float64, some tens of roundings away
            assert (a - c).abs().max() <= 64 * EPSILON[dtype] * c.abs().max()
        else:
            assert_as_good_as_eager(a, b, c, dtype)


@pytest.mark.parametrize("unused", [0, 1])
def test_an_output_that_is_not_used(unused):
    tensors = example((2, 5, 8), torch.float64)
    grads = [torch.randn(2, 5, 8, dtype=torch.float64) for _ in range(2)]
    grads[unused] = None
    ours = gradients(lambda *t: call(False, *t), tensors, grads)
    exact = gradients(lambda *t: gated_residual_norm_reference(*t, 1e-6, False), tensors, grads)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.kernels
@given(
    shape=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    dim=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    rms=st.booleans(),
    per_token=st.booleans(),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "chunked"]),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_and_stride(shape, dim, dtype, rms, per_token, layout):
    torch.manual_seed(dim)
    x, branch, gate, shift, scale, weight, bias = example((*shape, dim), dtype, per_token, rms=rms)
    if layout == "transposed":
        x, branch = (t.movedim(0, -1).contiguous().movedim(-1, 0) for t in (x, branch))
    if layout == "sliced":
        x, branch = torch.cat([x, x], -1)[..., :dim], torch.cat([branch, branch], -1)[..., dim:]
    if layout == "chunked":
        gate, shift, scale = torch.cat([gate, shift, scale], -1).chunk(3, -1)
    h, out = call(rms, x, branch, gate, shift, scale, weight, bias)
    exact, _ = gated_residual_norm_reference(x, branch, gate, shift, scale, weight, bias, 1e-6, rms)
    after = dbkernels._modulation.definition(h, shift, scale, weight, bias, 1e-6, rms)
    assert h.shape == out.shape == x.shape and h.is_contiguous() and out.is_contiguous()
    slack = 2 * EPSILON[dtype]
    assert ((h.double() - exact.double()).abs() <= slack * (1 + exact.double().abs())).all()
    # From the h that was stored. A row of nearly equal elements divides by almost nothing, so rounding shows: 1e-3.
    slack += 1e-12 if dtype == torch.float64 else 1e-3
    assert ((out.double() - after.double()).abs() <= slack * (1 + after.double().abs())).all()


def test_a_branch_of_another_dtype_is_cast():
    x, branch, gate, shift, scale, _, _ = example((2, 3, 8), torch.float32)
    branch = branch.bfloat16().requires_grad_()
    h, out = dbkernels.gated_residual_norm(x, branch, gate, shift, scale)
    assert h.dtype == out.dtype == torch.float32
    (grad,) = torch.autograd.grad(h.sum() + out.sum(), branch)
    assert grad.dtype == torch.bfloat16


def test_repeats_bit_for_bit_whatever_the_threads():
    tensors, grads = example((5, 300, 96), torch.float32), [torch.randn(5, 300, 96) for _ in range(2)]
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append(gradients(lambda *t: call(False, *t), tensors, grads))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("rms", [False, True])
def test_gradcheck(rms):
    leaves = [t.requires_grad_() for t in example((2, 3, 5), torch.float64, rms=rms) if t is not None]
    none = [None] if rms else []
    assert torch.autograd.gradcheck(lambda *t: call(rms, *t, *none), leaves)
    assert torch.autograd.gradcheck(lambda *t: gated_residual_norm_reference(*t, *none, 1e-6, rms), leaves)


@pytest.mark.parametrize("rms", [False, True])
def test_second_derivatives(rms):
    leaves = [t.requires_grad_() for t in example((2, 3, 5), torch.float64, rms=rms) if t is not None]
    assert torch.autograd.gradgradcheck(lambda *t: call(rms, *t, *([None] if rms else [])), leaves)


def test_transforms_of_torch_func():
    """They and batched gradients run on the definition."""
    x, *rest = example((4, 3, 8), torch.float64)

    def loss(x):
        h, out = call(False, x, *rest)
        return (h + 2 * out).square().sum()

    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(x), torch.autograd.grad(loss(leaf), leaf)[0])
    out = call(False, leaf, *rest)[1]
    upstream = torch.randn(3, *out.shape, dtype=torch.float64)
    batched = torch.autograd.grad(out, leaf, upstream, is_grads_batched=True, retain_graph=True)[0]
    for one, grad in zip(batched, upstream, strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(out, leaf, grad, retain_graph=True)[0])


def test_one_dimension():
    tensors = [t.flatten() for t in example((1, 1, 24), torch.float64)]
    ours = gradients(lambda *t: call(False, *t), tensors, [torch.ones(24, dtype=torch.float64)] * 2)
    exact = gradients(lambda *t: eager(*t, False), tensors, [torch.ones(24, dtype=torch.float64)] * 2)
    for a, b in zip(ours, exact, strict=True):
        assert a.shape == (24,)
        torch.testing.assert_close(a, b)


def test_the_backward_definition_is_the_kernels():
    h, branch, grad, grad_h = torch.randn(4, 3, 70, 17)
    gate, scale = torch.randn(2, 3, 1, 17)
    weight = torch.randn(17)
    for rms in (False, True):
        mean, rstd = dbkernels._modulation.statistics(h, 1e-6, rms)
        for upstream in (grad_h, None):
            arguments = grad, upstream, h, branch, gate, scale, weight, mean, rstd
            ours = torch.ops.dbkernels.gated_residual_norm_backward(*arguments)
            for a, b in zip(ours, _backward(*arguments), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.kernels
def test_saves_h_and_the_branch_but_not_x():
    x, branch, gate, shift, scale, _, _ = example((8, 64, 32), torch.float32)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.data_ptr(), t.nbytes) and t, lambda t: t
    ):
        leaves = [t.requires_grad_() for t in (x, branch, gate, shift, scale)]
        h, _ = dbkernels.gated_residual_norm(*leaves)
    assert h.data_ptr() in saved and x.data_ptr() not in saved
    assert sum(saved.values()) == h.nbytes + branch.nbytes + gate.nbytes + scale.nbytes + 2 * 4 * 8 * 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_opcheck(dtype):
    tensors = example((2, 3, 8), dtype)
    torch.library.opcheck(torch.ops.dbkernels.gated_residual_norm.default, (*tensors, 1e-6, False))
    h, _, mean, rstd = _forward(*tensors, 1e-6, False)
    arguments = (h, h, h, tensors[1], tensors[2], tensors[4], tensors[5], mean, rstd)
    torch.library.opcheck(torch.ops.dbkernels.gated_residual_norm_backward.default, arguments)


@pytest.mark.kernels
def test_compiles_whole_and_once(compile_counter):
    compiled = torch.compile(lambda *t: sum(dbkernels.gated_residual_norm(*t)), fullgraph=True, backend=compile_counter)
    for _ in range(4):
        leaves = [t.requires_grad_() for t in example((4, 5, 8), torch.float32)[:5]]
        ours, expected = compiled(*leaves), sum(dbkernels.gated_residual_norm(*leaves))
        pairs = zip(torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True)
        assert torch.equal(ours, expected) and all(torch.equal(a, b) for a, b in pairs)
    assert compile_counter.frame_count == 1


def test_meta():
    x, branch = torch.empty(2, 2, 3, 8, device="meta")
    h, out = dbkernels.gated_residual_norm(x, branch, *torch.empty(3, 2, 1, 8, device="meta"))
    assert h.shape == out.shape == (2, 3, 8) and h.device.type == "meta"


X, M = torch.randn(4, 3, 8), torch.randn(4, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(branch=X[:2]), ValueError, r"branch is \(2, 3, 8\) on cpu, x is \(4, 3, 8\)"),
        (dict(branch=1.0), TypeError, r"branch must be a torch\.Tensor"),
        (dict(gate=torch.randn(8)), ValueError, r"gate has shape \(8,\)"),
        (dict(gate=None), TypeError, "gate must be a floating tensor"),
        (dict(shift=M.int()), TypeError, "shift must be a floating"),
        (dict(norm="batch"), ValueError, 'norm must be "layer"'),
        (dict(norm="rms", bias=torch.ones(8)), ValueError, "without a bias"),
        (dict(weight=torch.ones(3)), ValueError, r"weight must be \(8,\)"),
    ],
)
def test_errors_name_the_argument(arguments, error, words):
    with pytest.raises(error, match=words):
        dbkernels.gated_residual_norm(**{"x": X, "branch": X, "gate": M, "shift": M, "scale": M, **arguments})


GPU_SHAPES = [*SHAPES, (3, 5000, 64), (2, 7, 16384), pytest.param((64, 197, 384), marks=pytest.mark.smoke)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_gpu_against_float64(dtype, shape):
    tensors = [t.cuda() for t in example(shape, dtype)]
    grads = [torch.randn(shape, device="cuda").to(dtype) for _ in range(2)]
    ours = gradients(lambda *t: call(False, *t), tensors, grads)
    theirs = gradients(lambda *t: eager(*t, False), tensors, grads)
    wide, wide_grads = [t.double() for t in tensors], [grad.double() for grad in grads]
    exact = gradients(lambda *t: gated_residual_norm_reference(*t, 1e-6, False), wide, wide_grads)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        if dtype != torch.float64:
            assert_as_good_as_eager(a, b, c, dtype)
    again = gradients(lambda *t: call(False, *t), tensors, grads)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
