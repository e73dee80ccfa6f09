"""inject_noise with y as rows of a table, and c_noise: against float64, the dense form, gradients, layouts, compile,
errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dbkernels
from dbkernels.inject_noise_table import gather_rows, row_sums
from dbkernels.philox import normal_reference
from numerics import EPSILON, assert_as_good_as_eager

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# indices' shape, noise levels' shape, rows of the table, its width
CASES = [((9,), (9,), 5, 64), ((4, 6), (4,), 3, 37), ((4, 6), (4, 6), 40, 8), ((3, 2), (), 2, 1), ((), (), 3, 5),
         ((64,), (64,), 10, 384), ((2, 1000), (2,), 7, 33)]  # fmt: skip


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def example(shape, levels, count, width, dtype, device="cpu"):
    table = torch.randn(count, width, device=device).to(dtype)
    sigma = (torch.rand(levels, device=device) * 3 + 0.05).to(wide(dtype))
    return torch.randint(count, shape, device=device), table, sigma


def eager(indices, table, sigma, eps, sigma_data, normalize):
    """The op as one would write it without a kernel, at the table's dtype; `eps` is given."""
    y = (torch.nn.functional.normalize(table, dim=-1) if normalize else table)[indices]
    level = sigma.reshape(sigma.shape + (1,) * (y.dim() - sigma.dim())).to(table.dtype)
    z = y + level * eps.to(table.dtype)
    return z if sigma_data is None else z * torch.rsqrt(level * level + sigma_data**2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("normalize,sigma_data", [(False, None), (True, 0.5)])
def test_against_float64_forward_and_backward(dtype, case, normalize, sigma_data):
    indices, table, sigma = example(*case, dtype)
    eps = normal_reference((*indices.shape, table.shape[1]), seed=11, offset=2)
    upstream = torch.randn(eps.shape).to(dtype)

    def run(op, dtype):
        leaf = table.to(dtype, copy=True).requires_grad_()
        z = op(leaf, sigma.to(wide(dtype)))
        return z.detach(), torch.autograd.grad(z, leaf, upstream.to(dtype))[0]

    def ours(leaf, level):
        return dbkernels.inject_noise(
            (indices, leaf), level, sigma_data=sigma_data, normalize=normalize, seed=11, offset=2
        )

    def plain(leaf, level):
        return eager(indices, leaf, level, eps, sigma_data, normalize)

    (z, grad), (z_eager, grad_eager) = run(ours, dtype), run(plain, dtype)
    z_exact, grad_exact = run(plain, torch.float64)
    if dtype == torch.float64:
        # eps is float32 by definition, and a kernel's may be 2 ulp off; the gradient holds no eps.
        assert (z - z_exact).abs().max() <= 2.0**-22 * sigma.max() * eps.abs().max()
        torch.testing.assert_close(grad, grad_exact, rtol=1e-12, atol=1e-12)
    else:
        assert_as_good_as_eager(z, z_eager, z_exact, dtype)
        assert_as_good_as_eager(grad, grad_eager, grad_exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_noise_as_the_dense_form(dtype):
    """The same (seed, offset, flat index) gives the same eps; without a norm, z is the dense form bit for bit."""
    indices, table, sigma = example((4, 6), (4, 6), 5, 37, dtype)
    z = dbkernels.inject_noise((indices, table), sigma, sigma_data=0.5, seed=7, offset=3)
    assert torch.equal(z, dbkernels.inject_noise(table[indices], sigma, sigma_data=0.5, seed=7, offset=3))
    zeros = torch.zeros(2, 10)
    z = dbkernels.inject_noise((torch.tensor([0, 1, 1]), zeros), 1.0, normalize=True, seed=7)
    assert torch.equal(z.flatten(), dbkernels.philox_normal(30, seed=7))


@given(
    shape=st.lists(st.integers(0, 7), max_size=3),
    depth=st.integers(0, 2),
    count=st.integers(1, 6),
    width=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    normalize=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=80, deadline=None)
def test_any_shape_and_stride(shape, depth, count, width, dtype, index_dtype, normalize, strided, seed):
    indices, table, sigma = example(shape, shape[: min(depth, len(shape))], count, width, dtype)
    indices = indices.to(index_dtype)
    if strided:
        table, indices = table.t().contiguous().t(), indices.movedim(0, -1) if shape else indices
        sigma = sigma if sigma.shape == indices.shape[: sigma.dim()] else torch.tensor(0.5, dtype=sigma.dtype)
    z = dbkernels.inject_noise((indices, table), sigma, sigma_data=0.7, normalize=normalize, seed=seed)
    expected = dbkernels.inject_noise_table_reference(indices.long(), table, sigma, 0.7, normalize, seed, 0)
    assert z.shape == (*indices.shape, width) and z.dtype == dtype and z.is_contiguous()
    # 2 ulp of eps, a rounding each for sum, scale and norm, then one to the dtype.
    slack = 6 * EPSILON[torch.float32] + (0 if dtype in (torch.float32, torch.float64) else EPSILON[dtype])
    assert ((z - expected).abs() <= slack * (8 + 8 * expected.abs())).all()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("sigma_data", [None, 0.5])
def test_gradcheck(normalize, sigma_data):
    table = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    sigma = (torch.rand(3, 2, dtype=torch.float64) + 0.3).requires_grad_()
    indices = torch.tensor([[0, 2], [2, 2], [3, 0]])  # row 1 is used nowhere, row 2 three times

    def op(table, sigma):
        return dbkernels.inject_noise(
            (indices, table), sigma, sigma_data=sigma_data, normalize=normalize, seed=4, offset=1
        )

    def reference(table, sigma):
        return dbkernels.inject_noise_table_reference(indices, table, sigma, sigma_data, normalize, 4, 1)

    assert torch.autograd.gradcheck(op, (table, sigma))
    assert torch.autograd.gradcheck(reference, (table, sigma))


def test_a_zero_row_has_the_gradient_of_torchs_normalize():
    table = torch.zeros(2, 4, dtype=torch.float64)
    table[1] = torch.tensor([3e-13, 0, 0, 4e-13])  # shorter than normalize's least length of 1e-12
    upstream = torch.randn(2, 4, dtype=torch.float64)
    grads = []
    for op in (
        lambda leaf: dbkernels.inject_noise((torch.tensor([0, 1]), leaf), 0.0, normalize=True, seed=1),
        lambda leaf: gather_rows(torch.tensor([0, 1]), leaf, True),
    ):
        leaf = table.clone().requires_grad_()
        grads.append(torch.autograd.grad(op(leaf), leaf, upstream)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.kernels
def test_repeats_bit_for_bit_whatever_the_threads():
    indices, table, sigma = example((40, 50), (40,), 9, 130, torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaf = table.clone().requires_grad_()
            z = dbkernels.inject_noise((indices, leaf), sigma, sigma_data=0.5, normalize=True, seed=9)
            results.append((z.detach(), torch.autograd.grad(z.square().sum(), leaf)[0]))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.kernels
def test_saves_no_rows():
    """What is kept for the backward pass is the call's own tensors: nothing of z's size."""
    indices, table, sigma = example((64, 100), (64,), 5, 32, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        dbkernels.inject_noise((indices, table.requires_grad_()), sigma, sigma_data=0.5, normalize=True, seed=1)
    assert sum(saved) == indices.nbytes + table.nbytes + sigma.nbytes


def test_an_index_outside_is_not_read():
    """The op below the checks, as a compiled graph calls it."""
    if dbkernels.compiled() is None:
        pytest.skip("the definition raises, as torch's indexing does")
    indices = torch.tensor([0, 5, -1, 4, 2**40])
    arguments = (torch.randn(5, 10), torch.ones(()), None, True)
    z = torch.ops.dbkernels.inject_noise_table(indices, *arguments, 1, 0)
    assert z.isnan().all(1).tolist() == [False, True, True, False, True]
    grad = torch.ops.dbkernels.inject_noise_table_grad(
        torch.ones(5, 10), indices, torch.ones(5, 10), *arguments[1:3], False
    )
    assert grad.sum(1).tolist() == [10, 0, 0, 0, 10]


def test_nan_and_infinity_show_where_they_are():
    table = torch.ones(3, 4)
    table[1, 2], table[2, 0] = float("nan"), float("inf")
    z = dbkernels.inject_noise((torch.tensor([0, 1, 2]), table), 1.0, seed=1)
    assert torch.equal(~torch.isfinite(z), ~torch.isfinite(table))
    z = dbkernels.inject_noise((torch.tensor([0, 1, 2]), table), 1.0, normalize=True, seed=1)
    assert z[1].isnan().all() and z[2, 0].isnan() and z[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_opcheck(dtype):
    indices, table, sigma = example((3, 4), (3,), 5, 6, dtype)
    arguments = (indices, table.requires_grad_(), sigma.requires_grad_(), 0.5, True, 7, 1)
    torch.library.opcheck(torch.ops.dbkernels.inject_noise_table.default, arguments)
    grad = (torch.randn(3, 4, 6).to(dtype), indices, table.detach(), sigma.detach(), 0.5, True)
    torch.library.opcheck(torch.ops.dbkernels.inject_noise_table_grad.default, grad)


@pytest.mark.kernels
def test_compiles_whole_and_once_over_changing_data(compile_counter):
    def run(indices, table, sigma, step):
        z, c_noise = dbkernels.inject_noise(
            (indices, table), sigma, sigma_data=0.5, normalize=True, return_c_noise=True, seed=2**63 + 1, offset=step
        )
        return z.square() + c_noise[:, None]

    compiled = torch.compile(run, fullgraph=True, backend=compile_counter)
    for step in range(2, 8):
        indices, table, sigma = example((6,), (6,), 5, 4, torch.float32)
        table.requires_grad_()
        ours, expected = compiled(indices, table, sigma, step), run(indices, table, sigma, step)
        assert torch.equal(ours, expected)
        assert torch.equal(*(torch.autograd.grad(z.sum(), table)[0] for z in (ours, expected)))
    assert compile_counter.frame_count <= 2  # once with the first step as a constant, once with the step as a variable


def test_autocast_leaves_the_tables_dtype():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = dbkernels.inject_noise((torch.tensor([1, 0]), torch.randn(2, 4)), 1.0, seed=1)
    assert z.dtype == torch.float32


def test_meta():
    table = torch.empty(5, 6, device="meta")
    z = dbkernels.inject_noise((torch.empty(3, 4, dtype=torch.int64, device="meta"), table), 1.0, seed=1)
    assert z.shape == (3, 4, 6) and z.device.type == "meta"


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 1, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_c_noise(shape, dtype):
    sigma = (torch.rand(shape) + 0.1).to(dtype)
    plain = dbkernels.inject_noise(torch.zeros(4, 3, 5), sigma, seed=1)
    z, c_noise = dbkernels.inject_noise(torch.zeros(4, 3, 5), sigma, return_c_noise=True, seed=1)
    assert torch.equal(z, plain) and c_noise.dtype == torch.float32 and c_noise.shape == sigma.shape
    # A rounding of sigma to float32, of the logarithm and of the quotient.
    torch.testing.assert_close(c_noise.double(), sigma.double().log() / 4, rtol=3 * 2.0**-23, atol=2.0**-24)


def test_c_noise_of_a_float_of_zero_and_its_gradient():
    z, c_noise = dbkernels.inject_noise(torch.zeros(3), 2.0, return_c_noise=True, seed=1)
    assert c_noise.shape == () and c_noise.item() == pytest.approx(0.17328680)
    assert dbkernels.inject_noise(z, 0.0, return_c_noise=True, seed=1)[1].item() == -float("inf")
    sigma = torch.rand(3, dtype=torch.float64, requires_grad=True)
    _, c_noise = dbkernels.inject_noise(z, sigma.float(), return_c_noise=True, seed=1)
    torch.testing.assert_close(torch.autograd.grad(c_noise.sum(), sigma)[0], 0.25 / sigma.detach(), rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("normalize", [False, True])
def test_gpu_against_float64(dtype, case, normalize):
    indices, table, sigma = example(*case, dtype, "cuda")
    table.requires_grad_()
    z = dbkernels.inject_noise((indices, table), sigma, sigma_data=0.5, normalize=normalize, seed=2**63 + 11, offset=2)
    exact_table = table.detach().double().requires_grad_()
    exact = dbkernels.inject_noise_table_reference(indices, exact_table, sigma.double(), 0.5, normalize, 2**63 + 11, 2)
    unit = max(EPSILON[dtype], 8 * EPSILON[torch.float32])
    assert ((z.double() - exact).abs() <= unit * (1 + exact.abs())).all()
    upstream = torch.randn_like(z)
    ours = torch.autograd.grad(z, table, upstream, retain_graph=True)[0]
    assert torch.equal(ours, torch.autograd.grad(z, table, upstream)[0])
    expected = row_sums(upstream.double(), indices, len(table), sigma.double(), 0.5).abs().max()
    grad = torch.autograd.grad(exact, exact_table, upstream.double())[0]
    scale = expected / table.detach().double().norm(dim=1).min() if normalize else expected
    assert (ours.double() - grad).abs().max() <= 2 * unit * scale


@pytest.mark.gpu
@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_forward_and_backward(dtype):
    test_gpu_against_float64(dtype, CASES[5], True)
    test_gpu_against_float64(dtype, CASES[1], False)


@pytest.mark.gpu
def test_gpu_bad_indices_show_as_nan_without_a_host_sync():
    table = torch.randn(5, 10, device="cuda", requires_grad=True)
    indices = torch.tensor([0, 5, -1, 4, 2**40], device="cuda")
    sigma = torch.ones(5, device="cuda")
    dbkernels.inject_noise((indices, table), sigma, normalize=True, seed=1).sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        z = dbkernels.inject_noise((indices, table), sigma, normalize=True, seed=1)
        z[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert z.isnan().all(1).tolist() == [False, True, True, False, True]
