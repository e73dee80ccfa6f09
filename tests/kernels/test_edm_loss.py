"""edm_loss: against float64, its precision over the noise levels, shapes, layouts, dtypes, builds."""

import os
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dbkernels
import warm
from dbkernels import edm_loss, edm_loss_reference
from numerics import EPSILON, assert_as_good_as_eager

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
REDUCTIONS = ["mean", "sum", "none", "sample"]
SHAPES = [((7,), (7,)), ((5, 3, 7), ()), ((5, 3, 7), (5, 3)), ((3, 1000, 3), (3,)), ((2, 5000), (2,)),
          ((4, 1, 1), (4, 1)), ((64, 197, 24), (64,))]  # fmt: skip
S = 0.5


def wide(*dtypes):
    return torch.float64 if torch.float64 in dtypes else torch.float32


def example(shape, levels, dtype, device="cpu", z_scaled=False):
    """Return F, z, y, sigma as a network, `inject_noise` and the data give them, at levels from .05 to 5."""
    F, y = torch.randn(2, *shape, device=device).to(dtype)
    sigma = torch.exp(torch.rand(levels, device=device) * 4.6 - 3).to(wide(dtype))
    return F, dbkernels.inject_noise(y, sigma, sigma_data=S if z_scaled else None, seed=7), y, sigma


def spread(sigma, x):
    return sigma.reshape(sigma.shape + (1,) * (x.dim() - sigma.dim()))


def reduced(square, reduction):
    if reduction == "sample":
        return square.flatten(1).mean(1) if square.dim() > 1 else square
    return {"mean": torch.Tensor.mean, "sum": torch.Tensor.sum, "none": lambda x: x}[reduction](square)


def eager(F, z, y, sigma, reduction):
    """Compute the loss as the paper writes it, in float32 (float64 for float64), as one would without a kernel."""
    dtype, sigma = sigma.dtype, spread(sigma, F)
    total = sigma.square() + S**2
    target = (y.to(dtype) - S**2 / total * z.to(dtype)) / (sigma * S / total.sqrt())
    return reduced((F.to(dtype) - target).square(), reduction)


def graded(op, *inputs):
    """Loss, and the gradients of its sum."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    loss = op(*leaves)
    loss.sum().backward()
    return loss.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape,levels", SHAPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("z_scaled", [False, True])
def test_against_float64(dtype, shape, levels, reduction, z_scaled):
    """Loss and gradients, at most twice the error of the paper's formula at the same dtype. A scaled z is exact by the
    c_in that `inject_noise` multiplied by, rounded as it was."""
    F, z, y, sigma = example(shape, levels, dtype, z_scaled=z_scaled)
    root = spread((sigma.square() + S**2).sqrt(), F) if z_scaled else torch.ones(())
    c_in = root.reciprocal().double()
    options = dict(sigma_data=S, reduction=reduction, z_scaled=z_scaled)
    ours = graded(lambda F, z, y: edm_loss(F, z, y, sigma, **options), F, z, y)
    theirs = graded(lambda F, z, y: eager(F, z.to(sigma.dtype) * root, y, sigma, reduction), F, z, y)
    wide_inputs = F.double(), z.double(), y.double()
    exact = graded(lambda F, z, y: eager(F, z / c_in, y, sigma.double(), reduction), *wide_inputs)
    assert ours[0].shape == exact[0].shape
    if dtype == torch.float64:
        for a, b in zip((ours[0], *ours[1]), (exact[0], *exact[1]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * b.abs().max().item())
        return
    assert_as_good_as_eager(ours[0], theirs[0], exact[0], torch.float32)
    for a, b, c in zip(ours[1], theirs[1], exact[1], strict=True):
        assert_as_good_as_eager(a, b, c, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape,levels", SHAPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_drawn_again_against_float64(dtype, shape, levels, reduction):
    """The definition, which has the normals rounded to float32 as every kernel has. Float32: some roundings of terms as
    large as the largest, and a gradient's own. A kernel's normals may be 2 ulp off, in float64 too."""
    F, _, y, sigma = example(shape, levels, dtype)
    ours = graded(lambda F, y: edm_loss(F, None, y, sigma, sigma_data=S, reduction=reduction, seed=9, offset=3), F, y)
    exact = graded(
        lambda F, y: edm_loss_reference(F, None, y, sigma.double(), S, reduction, 9, 3), F.double(), y.double()
    )
    for a, b, own in zip((ours[0], *ours[1]), (exact[0], *exact[1]), (wide(dtype), dtype, dtype), strict=True):
        unit = 16 * EPSILON[torch.float32] + (0 if own == torch.float64 else EPSILON[own])
        assert a.dtype == own and a.shape == b.shape
        assert ((a.double() - b).abs() <= unit * b.abs().max()).all(), (a.double() - b).abs().max() / b.abs().max()


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("sigma", [1e-6, 0.002, 0.5, 80.0, 1e6, 1e15])
def test_no_level_loses_precision(sigma, drawn):
    """The residual F − target within four roundings of its three terms, from noise far below EDM's sigma_min to far
    above its sigma_max: nothing overflows and nothing cancels."""
    F, y = torch.randn(2, 4096)
    level = torch.full((), sigma).double()
    z = (y + level * torch.randn(4096)).float()
    root = torch.hypot(level, torch.tensor(S).double())
    noise = dbkernels.philox_normal(4096, seed=3).double() * level if drawn else z.double() - y.double()
    terms = F.double(), -level / root / S * y.double(), S / root / level * noise
    exact = sum(terms)
    leaf = F.clone().requires_grad_()
    source = dict(z=None, seed=3) if drawn else dict(z=z)
    loss = edm_loss(leaf, y=y, sigma=sigma, sigma_data=S, reduction="sum", **source)
    loss.backward()
    bound = 4 * 2.0**-24 * sum(term.abs() for term in terms)
    assert ((leaf.grad.double() / 2 - exact).abs() <= bound).all()
    assert abs(loss.item() / exact.square().sum().item() - 1) < 1e-6


def test_drawing_z_again_is_free_of_its_rounding():
    """At sigma_min a bfloat16 z has lost the noise, and a float32 z 2^-24 / .002 of it; drawn again, z has lost
    nothing."""
    y, sigma = torch.randn(64, 64), torch.full((64,), 0.002)
    F = -dbkernels.philox_normal((64, 64), seed=5)  # close to the target at so little noise
    exact = edm_loss_reference(F.double(), None, y.double(), sigma.double(), S, "mean", 5, 0).item()
    drawn = edm_loss(F, None, y, sigma, sigma_data=S, seed=5).item()
    read = edm_loss(F, dbkernels.inject_noise(y, sigma, seed=5), y, sigma, sigma_data=S).item()
    half = edm_loss(F, dbkernels.inject_noise(y, sigma, seed=5).bfloat16(), y, sigma, sigma_data=S).item()
    assert abs(drawn / exact - 1) < 1e-5 and abs(read / exact - 1) < 0.02 and half > 1000 * exact


def test_the_noise_is_that_of_inject_noise():
    """With F = y = 0 and hardly any noise, the gradient of F in a sum is 2·eps: the same bits."""
    zero = torch.zeros(3, 5, 211, requires_grad=True)
    for seed, offset in ((0, 0), (2**64 - 1, 2**32 - 1)):
        (grad,) = torch.autograd.grad(
            edm_loss(zero, None, zero.detach(), 1e-30, sigma_data=S, reduction="sum", seed=seed, offset=offset), zero
        )
        assert torch.equal(grad / 2, dbkernels.philox_normal((3, 5, 211), seed=seed, offset=offset))


@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    depth=st.integers(0, 2),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=3, max_size=3),
    reduction=st.sampled_from(REDUCTIONS),
    source=st.sampled_from(["read", "scaled", "drawn"]),
    transposed=st.lists(st.booleans(), min_size=3, max_size=3),
)
@settings(max_examples=150, deadline=None)
def test_any_shape_stride_and_dtype(shape, depth, dtypes, reduction, source, transposed):
    """Each of F, z and y with a dtype and strides of its own, against the definition in float64."""
    tensors = [torch.randn(shape).to(dtype) for dtype in dtypes]
    pairs = zip(tensors, transposed, strict=True)
    tensors = [t.movedim(0, -1).contiguous().movedim(-1, 0) if flip else t for t, flip in pairs]
    tensors[1] = None if source == "drawn" else tensors[1]
    used = [t for t in tensors if t is not None]
    sigma = torch.rand(shape[: min(depth, len(shape))]) + 0.1
    options = dict(seed=5, offset=1) if source == "drawn" else dict(z_scaled=source == "scaled")
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    loss = edm_loss(*leaves, sigma, sigma_data=0.7, reduction=reduction, **options)
    loss.sum().backward()
    exact = [None if t is None else t.double().requires_grad_() for t in tensors]
    expected = edm_loss_reference(*exact, sigma.double(), 0.7, reduction, 5, 1, z_scaled=source == "scaled")
    expected.sum().backward()
    assert loss.dtype == wide(*(t.dtype for t in used)) and loss.shape == expected.shape
    # A few hundred terms in float32 at most; normals a kernel may have 2 ulp off; a half type's own rounding.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-4, equal_nan=True)
    for leaf, other in zip(leaves, exact, strict=True):
        if leaf is not None:
            assert leaf.grad.dtype == leaf.dtype
            torch.testing.assert_close(leaf.grad.double(), other.grad, rtol=1e-5 + 2 * EPSILON[leaf.dtype], atol=1e-4)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
@pytest.mark.parametrize("z_scaled", [False, True])
def test_empty(shape, reduction, z_scaled):
    """A mean over nothing is NaN and a sum 0, as torch has it."""
    empty = torch.empty(shape, requires_grad=True)
    loss = edm_loss(empty, empty, empty, 1.0, sigma_data=S, reduction=reduction, z_scaled=z_scaled)
    expected = reduced(torch.empty(shape), reduction)
    assert torch.equal(loss.isnan(), expected.isnan()) and loss.shape == expected.shape
    loss.sum().backward()
    assert empty.grad.shape == shape


@pytest.mark.parametrize("z_scaled", [False, True])
def test_sigma_as_float_and_with_trailing_ones(z_scaled):
    F, z, y, sigma = example((4, 3, 5), (4,), torch.float32)
    options = dict(sigma_data=S, z_scaled=z_scaled)
    loss = edm_loss(F, z, y, sigma, **options)
    assert torch.equal(edm_loss(F, z, y, sigma.view(4, 1, 1), **options), loss)
    assert torch.equal(edm_loss(F, z, y, sigma.double(), **options), loss)
    assert torch.equal(edm_loss(F, z, y, 0.3, **options), edm_loss(F, z, y, torch.tensor(0.3), **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("z_scaled", [False, True])
def test_nan_and_infinity_show_where_they_are(dtype, z_scaled):
    F, z, y, sigma = example((5, 70), (5,), dtype)
    F[0, 2], z[1, 3], y[2, 68], sigma[3] = float("nan"), float("inf"), float("nan"), float("nan")
    bad = torch.zeros(5, 70, dtype=torch.bool)
    bad[0, 2] = bad[1, 3] = bad[2, 68] = bad[3] = True
    options = dict(sigma_data=S, z_scaled=z_scaled)
    assert torch.equal(~edm_loss(F, z, y, sigma, reduction="none", **options).isfinite(), bad)
    assert torch.equal(~edm_loss(F, z, y, sigma, reduction="sample", **options).isfinite(), bad.any(1))
    leaf = F.clone().requires_grad_()
    edm_loss(leaf, z, y, sigma, reduction="sum", **options).backward()
    assert torch.equal(~leaf.grad.isfinite(), bad)


def bits(reduction="mean"):
    """Return losses and gradients whose chunks, samples and levels don't coincide, of z and of a scaled z."""
    F, z, y, _ = example((33, 65, 31), (33,), torch.float32)
    sigma, results = torch.rand(33, 65) + 0.1, []
    for z_scaled in (False, True):
        options = dict(sigma_data=S, reduction=reduction, z_scaled=z_scaled)
        loss, grads = graded(lambda *t: edm_loss(*t, sigma, **options), F, z, y)  # noqa: B023
        results += loss, *grads
    return torch.cat([t.flatten() for t in results])


@pytest.mark.skipif(dbkernels.compiled() is None, reason="torch's own sums depend on the number of threads")
@pytest.mark.parametrize("reduction", ["mean", "sample"])
def test_repeats_bit_for_bit_whatever_the_threads(reduction):
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            results.append(bits(reduction))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_everything_is_written():
    """Memory from torch's allocator holds NaN in this mode, so what a kernel leaves out shows."""
    F, z, y, sigma = example((3, 411, 5), (3,), torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        assert F.new_empty(3).isnan().all()
        for reduction in REDUCTIONS:
            loss, grads = graded(lambda *t: edm_loss(*t, sigma, sigma_data=S, reduction=reduction), F, z, y)  # noqa: B023
            assert all(t.isfinite().all() for t in (loss, *grads))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("build", ["portable", "reference"])
def test_the_other_builds(build, tmp_path):
    """The portable kernel gives the same bits; the definition, in a process where it serves the ops, the same up to the
    roundings of float32."""
    if dbkernels.compiled() is None:
        pytest.skip("the kernels aren't built here")
    script = "import sys, torch, test_edm_loss as t; torch.manual_seed(0); torch.save(t.bits(), sys.argv[1])"
    name = "DBKERNELS_CPU" if build == "portable" else "DBKERNELS_BACKEND"
    folder = os.path.dirname(__file__)
    environment = {**os.environ, name: build, "PYTHONPATH": os.pathsep.join([folder, *sys.path])}
    run = warm.run("-c", script, tmp_path / "bits.pt", env=environment)
    assert run.returncode == 0, run.stderr
    theirs = torch.load(tmp_path / "bits.pt")
    torch.manual_seed(0)
    ours = bits()
    if build == "portable":
        assert torch.equal(ours, theirs)
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-9)
