"""edm_loss: against float64, how precise it is over the noise levels, shapes, layouts, dtypes, torch.library's checks,
compile. Its gradients under an upstream gradient: test_edm_loss_gradients.py."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import dbkernels
from dbkernels import edm_loss, edm_loss_reference
from numerics import EPSILON, assert_as_good_as_eager

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
REDUCTIONS = ["mean", "sum", "none", "sample"]
SHAPES = [((7,), (7,)), ((5, 3, 7), ()), ((5, 3, 7), (5, 3)), ((3, 1000, 3), (3,)), ((2, 5000), (2,)), ((4, 1, 1), (4, 1)),
          ((64, 197, 24), (64,))]  # fmt: skip
S = 0.5


def wide(*dtypes):
    return torch.float64 if torch.float64 in dtypes else torch.float32


def example(shape, levels, dtype, device="cpu"):
    """F, z, y as a network, `inject_noise` and the data give them, at levels from .05 to 5."""
    F, y = torch.randn(2, *shape, device=device).to(dtype)
    sigma = torch.exp(torch.rand(levels, device=device) * 4.6 - 3).to(wide(dtype))
    return F, dbkernels.inject_noise(y, sigma, seed=7), y, sigma


def spread(sigma, x):
    return sigma.reshape(sigma.shape + (1,) * (x.dim() - sigma.dim()))


def reduced(square, reduction):
    if reduction == "sample":
        return square.flatten(1).mean(1) if square.dim() > 1 else square
    return {"mean": torch.Tensor.mean, "sum": torch.Tensor.sum, "none": lambda x: x}[reduction](square)


def eager(F, z, y, sigma, reduction):
    """As the paper writes it, in float32 (float64 for float64), as one would without a kernel."""
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
def test_against_float64(dtype, shape, levels, reduction):
    """Loss and gradients, at most twice the error of the paper's formula at the same dtype."""
    F, z, y, sigma = example(shape, levels, dtype)
    ours = graded(lambda F, z, y: edm_loss(F, z, y, sigma, sigma_data=S, reduction=reduction), F, z, y)
    theirs = graded(lambda F, z, y: eager(F, z, y, sigma, reduction), F, z, y)
    exact = graded(lambda *t: eager(*t, sigma.double(), reduction), F.double(), z.double(), y.double())
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
    drawn=st.booleans(),
    transposed=st.lists(st.booleans(), min_size=3, max_size=3),
)
@settings(max_examples=150, deadline=None)
def test_any_shape_stride_and_dtype(shape, depth, dtypes, reduction, drawn, transposed):
    """Each of F, z and y with a dtype and strides of its own, against the definition in float64."""
    tensors = [torch.randn(shape).to(dtype) for dtype in dtypes]
    tensors = [t.movedim(0, -1).contiguous().movedim(-1, 0) if flip else t for t, flip in zip(tensors, transposed)]
    tensors[1] = None if drawn else tensors[1]
    used = [t for t in tensors if t is not None]
    sigma = torch.rand(shape[: min(depth, len(shape))]) + 0.1
    options = dict(seed=5, offset=1) if drawn else {}
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    loss = edm_loss(*leaves, sigma, sigma_data=0.7, reduction=reduction, **options)
    loss.sum().backward()
    exact = [None if t is None else t.double().requires_grad_() for t in tensors]
    expected = edm_loss_reference(*exact, sigma.double(), 0.7, reduction, 5, 1)
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
def test_empty(shape, reduction):
    """A mean over nothing is NaN and a sum 0, as torch has it."""
    empty = torch.empty(shape, requires_grad=True)
    loss = edm_loss(empty, empty, empty, 1.0, sigma_data=S, reduction=reduction)
    expected = reduced(torch.empty(shape), reduction)
    assert torch.equal(loss.isnan(), expected.isnan()) and loss.shape == expected.shape
    loss.sum().backward()
    assert empty.grad.shape == shape


def test_sigma_as_float_and_with_trailing_ones():
    F, z, y, sigma = example((4, 3, 5), (4,), torch.float32)
    loss = edm_loss(F, z, y, sigma, sigma_data=S)
    assert torch.equal(edm_loss(F, z, y, sigma.view(4, 1, 1), sigma_data=S), loss)
    assert torch.equal(edm_loss(F, z, y, sigma.double(), sigma_data=S), loss)
    assert torch.equal(edm_loss(F, z, y, 0.3, sigma_data=S), edm_loss(F, z, y, torch.tensor(0.3), sigma_data=S))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_show_where_they_are(dtype):
    F, z, y, sigma = example((5, 70), (5,), dtype)
    F[0, 2], z[1, 3], y[2, 68], sigma[3] = float("nan"), float("inf"), float("nan"), float("nan")
    bad = torch.zeros(5, 70, dtype=torch.bool)
    bad[0, 2] = bad[1, 3] = bad[2, 68] = bad[3] = True
    assert torch.equal(~edm_loss(F, z, y, sigma, sigma_data=S, reduction="none").isfinite(), bad)
    assert torch.equal(~edm_loss(F, z, y, sigma, sigma_data=S, reduction="sample").isfinite(), bad.any(1))
    leaf = F.clone().requires_grad_()
    edm_loss(leaf, z, y, sigma, sigma_data=S, reduction="sum").backward()
    assert torch.equal(~leaf.grad.isfinite(), bad)


def bits(reduction="mean"):
    """A loss and its gradients whose chunks, samples and levels don't coincide."""
    F, z, y, _ = example((33, 65, 31), (33,), torch.float32)
    sigma = torch.rand(33, 65) + 0.1
    loss, grads = graded(lambda *t: edm_loss(*t, sigma, sigma_data=S, reduction=reduction), F, z, y)
    return torch.cat([t.flatten() for t in (loss, *grads)])


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
def test_the_other_builds(build):
    """The portable kernel gives the same bits; the definition, in a process where it serves the ops, the same up to the
    roundings of float32."""
    if dbkernels.compiled() is None:
        pytest.skip("the kernels aren't built here")
    script = "import sys, torch, test_edm_loss as t; torch.manual_seed(0); torch.save(t.bits(), sys.stdout.buffer)"
    name = "DBKERNELS_CPU" if build == "portable" else "DBKERNELS_BACKEND"
    folder = os.path.dirname(__file__)
    environment = {**os.environ, name: build, "PYTHONPATH": os.pathsep.join([folder, *sys.path])}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, timeout=120)
    assert run.returncode == 0, run.stderr.decode()
    import io

    theirs = torch.load(io.BytesIO(run.stdout))
    torch.manual_seed(0)
    ours = bits()
    if build == "portable":
        assert torch.equal(ours, theirs)
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_opcheck(dtype, reduction):
    F, z, y, sigma = example((3, 4, 5), (3,), dtype)
    op = torch.ops.dbkernels.edm_loss.default
    torch.library.opcheck(op, (F, z, y, sigma, S, reduction, 0, 0, True, True, False))
    torch.library.opcheck(op, (F, None, y, sigma, S, reduction, -7, 1, True, False, True))
    torch.library.opcheck(torch.ops.dbkernels.edm_loss_scale_.default, (F.float(), sigma))


class Calls(TorchDispatchMode):
    """The arguments of each call of our op."""

    def __init__(self):
        super().__init__()
        self.arguments = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.dbkernels.edm_loss.default:
            self.arguments.append(args)
        return func(*args, **(kwargs or {}))


def test_no_gradient_is_taken_where_none_is_wanted():
    F, z, y, sigma = example((3, 8), (3,), torch.float32)
    F.requires_grad_()
    with Calls() as calls:
        edm_loss(F, z, y, sigma, sigma_data=S)
        edm_loss(F.detach(), z, y, sigma, sigma_data=S)
        with torch.no_grad():
            edm_loss(F, z, y, sigma, sigma_data=S)
        edm_loss(F, z, y.clone().requires_grad_(), sigma, sigma_data=S)
    wanted = [arguments[-3:] for arguments in calls.arguments]
    assert wanted == [(True, False, False), (False,) * 3, (False,) * 3, (True, False, True)]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiles_whole_and_once_over_changing_sigma(reduction):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(F, z, y, sigma):
        return edm_loss(F * 2, z, y, sigma, sigma_data=S, reduction=reduction).sum() * 3

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for _ in range(4):
        F, z, y, sigma = example((6, 5, 4), (6,), torch.bfloat16)
        ours, plain = (F.clone().requires_grad_() for _ in range(2))
        for run, leaf in ((compiled, ours), (step, plain)):
            run(leaf, z, y, sigma).backward()
        torch.testing.assert_close(ours.grad, plain.grad, rtol=2 * EPSILON[torch.bfloat16], atol=0)
        assert torch.equal(compiled(F, z, y, sigma), step(F, z, y, sigma))
    assert counter.frame_count <= 2  # with and without a gradient


def test_inductor_compiles_it_with_the_layer_around_it():
    torch._dynamo.reset()
    head, (F, _, y, sigma) = torch.nn.Linear(8, 8), example((6, 8), (6,), torch.float32)

    def step(step):
        return edm_loss(head(F), None, y, sigma, sigma_data=S, seed=2**63 + 1, offset=step)

    step(3).backward()
    expected = head.weight.grad.clone()
    head.weight.grad = None
    torch.compile(step, fullgraph=True)(3).backward()
    torch.testing.assert_close(head.weight.grad, expected)


def test_autocast_takes_a_half_output_beside_float32_data():
    head, (x, z, y, sigma) = torch.nn.Linear(16, 16), example((6, 16), (6,), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        F = head(x)
        loss = edm_loss(F, z, y, sigma, sigma_data=S)
    assert F.dtype == torch.bfloat16 and loss.dtype == torch.float32
    exact = eager(F.detach(), z, y, sigma, "mean")
    assert abs(loss.item() / exact.item() - 1) < 1e-6  # y and z were not rounded to bfloat16
    loss.backward()
    assert head.weight.grad.abs().sum() > 0


def test_meta_and_fake():
    x, sigma = torch.empty(5, 6, device="meta", dtype=torch.float16), torch.empty(5, device="meta")
    for reduction, shape in (("mean", ()), ("none", (5, 6)), ("sample", (5,))):
        op = torch.ops.dbkernels.edm_loss
        loss, grad_F, grad_z, _ = op(x, x, x, sigma, S, reduction, 0, 0, True, False, False)
        assert loss.shape == shape and loss.dtype == torch.float32 and loss.device.type == "meta"
        assert grad_F.shape == (5, 6) and grad_F.dtype == torch.float32 and grad_z.numel() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape,levels", SHAPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("drawn", [False, True])
def test_gpu_against_float64(dtype, shape, levels, reduction, drawn):
    F, z, y, sigma = example(shape, levels, dtype, "cuda")
    source = dict(z=None, seed=2**63 + 11, offset=2) if drawn else dict(z=z)
    ours = graded(lambda F, y: edm_loss(F, y=y, sigma=sigma, sigma_data=S, reduction=reduction, **source), F, y)
    address = (2**63 + 11, 2) if drawn else (0, 0)
    wide_z = None if drawn else z.double()
    exact = graded(
        lambda F, y: edm_loss_reference(F, wide_z, y, sigma.double(), S, reduction, *address), F.double(), y.double()
    )
    for a, b, own in zip((ours[0], *ours[1]), (exact[0], *exact[1]), (wide(dtype), dtype, dtype), strict=True):
        unit = 16 * EPSILON[torch.float32] + (0 if own == torch.float64 else EPSILON[own])
        assert a.dtype == own and ((a.double() - b).abs() <= unit * b.abs().max()).all()


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
