"""inject_noise: against float64, its gradients, torch.library's checks, shapes, layouts, compile, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dbkernels
from dbkernels._levels import broadcast
from dbkernels.philox import normal_reference
from numerics import EPSILON, assert_as_good_as_eager

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [((), ()), ((7,), (7,)), ((5, 3, 7), (5,)), ((5, 3, 7), (5, 3)), ((2, 3, 64), (2, 3)), ((3, 5), ()),
          ((64, 197, 24), (64,)), ((4, 1, 1), (4, 1)), ((1, 4097), (1,))]  # fmt: skip


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def example(shape, levels, dtype, device="cpu"):
    y = torch.randn(shape, device=device).to(dtype)
    sigma = (torch.rand(levels, device=device) * 3 + 0.05).to(wide(dtype))
    return y, sigma


def eager(y, sigma, eps, sigma_data):
    """The op as one would write it without a kernel, at y's dtype; `eps` is given."""
    level = sigma.reshape(sigma.shape + (1,) * (y.dim() - sigma.dim())).to(y.dtype)
    z = y + level * eps.to(y.dtype)
    return z if sigma_data is None else z * torch.rsqrt(level * level + sigma_data**2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape,levels", SHAPES)
@pytest.mark.parametrize("sigma_data", [None, 0.5])
def test_against_float64(dtype, shape, levels, sigma_data):
    y, sigma = example(shape, levels, dtype)
    eps = normal_reference(shape, seed=11, offset=2)
    z = dbkernels.inject_noise(y, sigma, sigma_data=sigma_data, seed=11, offset=2)
    exact = eager(y.double(), sigma.double(), eps.double(), sigma_data)
    if dtype == torch.float64:
        # eps is float32 by definition, and a kernel's may be 2 ulp off: 2^-22 of the noise, whatever y's
        # dtype.
        assert (z - exact).abs().max() <= 2.0**-22 * (sigma.max() * eps.abs().max())
    else:
        assert_as_good_as_eager(z, eager(y, sigma, eps, sigma_data), exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_eps_does_not_depend_on_dtype_shape_or_layout(dtype):
    y = torch.zeros(6, 4, 10, dtype=dtype)
    z = dbkernels.inject_noise(y, 1.0, seed=5)
    assert torch.equal(z.flatten().float(), dbkernels.philox_normal(240, seed=5).to(dtype).float())
    strided = torch.zeros(10, 4, 6, dtype=dtype).permute(2, 1, 0)
    assert torch.equal(dbkernels.inject_noise(strided, 1.0, seed=5), z)


@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    depth=st.integers(0, 2),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**64 - 1),
    transpose=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_any_shape_and_stride(shape, depth, dtype, seed, transpose):
    levels = shape[: min(depth, len(shape))]
    y, sigma = example(shape, levels, dtype)
    if transpose:
        y = y.movedim(0, -1).contiguous().movedim(-1, 0)
    z = dbkernels.inject_noise(y, sigma, sigma_data=0.7, seed=seed)
    expected = dbkernels.inject_noise_reference(y, sigma, 0.7, seed, 0)
    assert z.shape == y.shape and z.dtype == y.dtype and z.is_contiguous()
    # Kernel and definition: 2 ulp of eps and a rounding each for sum and scale, then one rounding to the
    # dtype.
    slack = 4 * EPSILON[torch.float32] + (0 if dtype in (torch.float32, torch.float64) else EPSILON[dtype])
    assert ((z - expected).abs() <= slack * (8 + 8 * expected.abs())).all()


def test_sigma_with_trailing_ones_and_as_float():
    y = torch.randn(4, 3, 5)
    per_sample = torch.rand(4) + 0.1
    z = dbkernels.inject_noise(y, per_sample, seed=1)
    assert torch.equal(dbkernels.inject_noise(y, per_sample.view(4, 1, 1), seed=1), z)
    scalar = dbkernels.inject_noise(y, torch.tensor(0.3), seed=1)
    assert torch.equal(dbkernels.inject_noise(y, 0.3, seed=1), scalar)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_value_of_a_half_type_is_read_and_rounded_as_torch_does(dtype):
    """Without noise z is y·c_in: all 65,536 values, subnormal, infinite and NaN, through scales that round and
    overflow."""
    y = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    for scale in (1.0, 1 / 3, 2.0**-9, 300.0):
        z = dbkernels.inject_noise(y, 0.0, sigma_data=1 / scale, seed=1)
        factor = 1 / torch.tensor(1 / scale).square().sqrt()
        expected = (y.float() * factor).to(dtype)
        torch.testing.assert_close(z, expected, rtol=0, atol=0, equal_nan=True)


def test_empty():
    z = dbkernels.inject_noise(torch.empty(0, 3, 4), torch.empty(0), seed=1)
    assert z.shape == (0, 3, 4)


def test_nan_and_infinity_show_where_they_are():
    y = torch.zeros(4, 8)
    y[1, 2], y[2, 3] = float("nan"), float("inf")
    z = dbkernels.inject_noise(y, torch.tensor([1.0, 1.0, 1.0, float("nan")]), sigma_data=0.5, seed=1)
    bad = torch.zeros(4, 8, dtype=torch.bool)
    bad[1, 2], bad[2, 3], bad[3] = True, True, True
    assert torch.equal(~torch.isfinite(z), bad)


def test_repeats_bit_for_bit_whatever_the_threads():
    y, sigma = example((33, 65, 31), (33,), torch.float32)
    threads = torch.get_num_threads()
    try:
        draws = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            draws.append(dbkernels.inject_noise(y, sigma, sigma_data=0.5, seed=9))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(draw, draws[0]) for draw in draws)


@pytest.mark.parametrize("sigma_data", [None, 0.5])
@pytest.mark.parametrize("levels", [(), (3,), (3, 4)])
def test_gradcheck(sigma_data, levels):
    y = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    sigma = (torch.rand(levels, dtype=torch.float64) + 0.3).requires_grad_()

    def op(y, sigma):
        return dbkernels.inject_noise(y, sigma, sigma_data=sigma_data, seed=4, offset=1)

    assert torch.autograd.gradcheck(op, (y, sigma))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_are_the_definitions(dtype):
    y, sigma = example((6, 5, 8), (6,), dtype)
    grads = []
    for op in (
        lambda y, s: dbkernels.inject_noise(y, s, sigma_data=0.5, seed=4),
        lambda y, s: dbkernels.inject_noise_reference(y, s, 0.5, 4, 0),
    ):
        leaves = y.clone().requires_grad_(), sigma.clone().requires_grad_()
        op(*leaves).float().square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    # Both run from z rounded to the dtype, so they may differ by that rounding; sigma's sums 40 such terms.
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=2 * EPSILON[dtype], atol=4 * EPSILON[dtype])
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=4 * EPSILON[dtype], atol=64 * EPSILON[dtype])


def test_saves_no_noise():
    """Without a gradient for sigma, only sigma is saved: bytes counted."""
    y, sigma = example((8, 64, 32), (8,), torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        dbkernels.inject_noise(y.requires_grad_(), sigma, sigma_data=0.5, seed=1)
    assert sum(saved) == sigma.nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_opcheck(dtype):
    y, sigma = example((3, 4, 5), (3,), dtype)
    torch.library.opcheck(torch.ops.dbkernels.inject_noise.default, (y.requires_grad_(), sigma, 0.5, 7, 1))
    torch.library.opcheck(torch.ops.dbkernels.philox_uniform.default, (torch.empty(3, 4), 7, 1))


def test_compiles_whole_and_once_over_changing_sigma(compile_counter):
    compiled = torch.compile(
        lambda y, s, step: dbkernels.inject_noise(y, s, sigma_data=0.5, seed=2**63 + 1, offset=step).square(),
        fullgraph=True,
        backend=compile_counter,
    )
    y = torch.randn(6, 5, 4, requires_grad=True)
    for step in range(2, 9):
        sigma = torch.rand(6) + 0.1
        expected = dbkernels.inject_noise(y, sigma, sigma_data=0.5, seed=2**63 + 1, offset=step).square()
        assert torch.equal(compiled(y, sigma, step), expected)
    assert compile_counter.frame_count <= 2  # once with the first step as a constant, once with the step as a variable


def test_meta_and_fake():
    z = torch.ops.dbkernels.inject_noise(torch.empty(5, 6, device="meta"), torch.empty(5, device="meta"), 0.5, 1, 0)
    assert z.shape == (5, 6) and z.device.type == "meta"


Y = torch.randn(4, 3)


@pytest.mark.parametrize(
    "arguments,error,words",
    [
        (dict(y=[1.0], sigma=1.0), TypeError, "y must be a torch.Tensor"),
        (dict(y=torch.ones(3, dtype=torch.int64), sigma=1.0), TypeError, "y must be float16"),
        (dict(y=Y, sigma="1"), TypeError, "sigma must be a float"),
        (dict(y=Y, sigma=-1.0), ValueError, "sigma=-1.0"),
        (dict(y=Y, sigma=float("nan")), ValueError, "sigma=nan"),
        (dict(y=Y, sigma=torch.ones(4, dtype=torch.int64)), TypeError, "sigma must be floating"),
        (dict(y=Y, sigma=torch.ones(5)), ValueError, r"sigma has shape \(5,\)"),
        (dict(y=Y, sigma=torch.ones(3, 4)), ValueError, "sigma has shape"),
        (dict(y=Y, sigma=torch.ones(4, device="meta")), ValueError, "move sigma"),
        (dict(y=Y, sigma=1.0, sigma_data=0.0), ValueError, "sigma_data=0.0"),
        (dict(y=Y, sigma=1.0, sigma_data="x"), TypeError, "sigma_data"),
        (dict(y=Y, sigma=1.0, seed=-1), ValueError, "seed=-1"),
        (dict(y=Y, sigma=1.0, offset=2**32), ValueError, "offset="),
    ],
)
def test_errors_name_the_argument(arguments, error, words):
    with pytest.raises(error, match=words):
        dbkernels.inject_noise(**{"seed": 0, **arguments})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape,levels", SHAPES)
@pytest.mark.parametrize("rounds", [10, 7])
def test_gpu_against_float64(dtype, shape, levels, rounds):
    """In units of the larger term: 2^-22 for normals 2 ulp off, 2^-24 the sum, 2^-22.9 rsqrt.approx, 2^-24 each for its
    argument and the product: 2^-21 in all; then half a unit of the dtype (2^-25 where float16 is subnormal)."""
    y, sigma = example(shape, levels, dtype, "cuda")
    address = dict(seed=2**63 + 11, offset=2, rounds=rounds)
    eps = normal_reference(shape, **address).cuda().double()
    z = dbkernels.inject_noise(y, sigma, sigma_data=0.5, **address)
    exact = eager(y.double(), sigma.double(), eps, 0.5)
    terms = eager(y.double().abs(), sigma.double(), eps.abs(), 0.5)
    assert z.dtype == dtype and z.shape == y.shape
    assert ((z.double() - exact).abs() <= 2.0**-21 * terms + EPSILON[dtype] / 2 * exact.abs() + 2.0**-25).all()


@pytest.mark.gpu
@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_forward(dtype):
    test_gpu_against_float64(dtype, (64, 197, 24), (64,), 10)
    test_gpu_against_float64(dtype, (5, 3, 7), (5, 3), 7)


@pytest.mark.gpu
@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [(), (33,), (33, 65)])
def test_gpu_backward(dtype, levels):
    """Against the definition in float64; sigma's gradient in units of the sum of its terms' magnitudes."""
    y, sigma = example((33, 65, 32), levels, dtype, "cuda")
    z = dbkernels.inject_noise(y.requires_grad_(), sigma.requires_grad_(), sigma_data=0.5, seed=9)
    upstream = torch.randn_like(z)
    ours = torch.autograd.grad(z, (y, sigma), upstream)
    exact = [t.detach().double().requires_grad_() for t in (y, sigma)]
    reference = dbkernels.inject_noise_reference(*exact, 0.5, 9, 0)
    grad_y, grad_sigma = torch.autograd.grad(reference, exact, upstream.double())
    unit = 2.0**-21 + EPSILON[dtype] / 2
    assert ((ours[0].double() - grad_y).abs() <= unit * grad_y.abs() + 2.0**-25).all()
    # dz/dsigma is below c_in·(|eps| + |y + sigma·eps|·sigma·c_in²), at most 2·(6 + 20·2); some 20 roundings a term.
    terms = upstream.double().abs().sum_to_size(broadcast(sigma, 3).shape).reshape(sigma.shape) * 92
    assert ours[1].dtype == sigma.dtype and ((ours[1].double() - grad_sigma).abs() <= 2.0**-20 * terms).all()


@pytest.mark.gpu
def test_gpu_repeats_whatever_the_strides_and_the_form_of_the_levels():
    y, sigma = example((33, 65, 32), (33,), torch.float32, "cuda")
    first = dbkernels.inject_noise(y, sigma, sigma_data=0.5, seed=9)
    strided = y.transpose(0, 2).contiguous().transpose(0, 2)
    for other in (sigma.double(), sigma.view(33, 1, 1), torch.stack((sigma, sigma), 1)[:, 0]):
        assert torch.equal(dbkernels.inject_noise(strided, other, sigma_data=0.5, seed=9), first)
    assert torch.equal(
        dbkernels.inject_noise(y, 0.25, seed=9), dbkernels.inject_noise(y, torch.tensor(0.25, device="cuda"), seed=9)
    )
    zeros = torch.zeros(33, 65, device="cuda")
    assert torch.equal(
        dbkernels.philox_normal((33, 65), seed=9, device="cuda"), dbkernels.inject_noise(zeros, 1.0, seed=9)
    )
    assert dbkernels.inject_noise(y[:0], sigma[:0], seed=9).shape == (0, 65, 32)


@pytest.mark.gpu
def test_gpu_more_levels_than_a_grid_has_rows():
    y, sigma = torch.randn(70_000, 2048, device="cuda", dtype=torch.bfloat16), torch.rand(70_000, device="cuda")
    z = dbkernels.inject_noise(y, sigma, seed=9)
    for row in (0, 65535, 65536, 69_999):
        eps = (z[row].float() - y[row].float()) / sigma[row]
        assert abs(eps.std() - 1) < 0.1
