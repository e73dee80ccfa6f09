"""denoising_cross_entropy against its definition in float64, whatever the options and the chunks."""

import sys

import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st

from dbkernels import _logit_chunks as chunks
from dbkernels import _products as products
from dbkernels import denoising_cross_entropy
from numerics import EPSILON

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPTIONS = {
    "plain": {},
    "tied": dict(z=True),
    "readout": dict(posterior=True, logit_scale=True),
    "cosine": dict(z=True, normalize=True, logit_scale=True),
    "all": dict(z=True, normalize=True, logit_scale=True, bias=True, softcap=4.0, posterior=True, row_weight=True),
    "bias and cap": dict(bias=True, softcap=4.0, row_weight=True),
}
module = sys.modules["dbkernels.denoising_cross_entropy"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks of rows and several blocks of the head at the tests' sizes."""
    monkeypatch.setattr(chunks, "LEAST_ROWS", 16)
    monkeypatch.setattr(chunks, "CPU_LOGITS", 16)
    monkeypatch.setattr(products, "CONVERTED", 20)


def example(rows=(5, 9), d=24, V=50, dtype=torch.float32, device="cpu", smallest=0.3, **options):
    """(arguments, keywords, leaves): tensors of `dtype`, leaves those that get a gradient."""
    like = dict(device=device)
    leaves = {
        "h": torch.randn(*rows, d, **like).to(dtype),
        "weight": (torch.randn(V, d, **like) / d**0.5).to(dtype),
    }
    target = torch.randint(V, rows, **like)
    if target.numel() > 3:
        target.view(-1)[::7] = -100
    sigma = torch.rand(rows, **like) * 2 + smallest
    keywords = {name: options[name] for name in ("softcap", "normalize") if name in options}
    if options.get("row_weight"):
        keywords["row_weight"] = torch.rand(rows, **like)
    if options.get("z"):
        leaves["z"] = torch.randn(*rows, d, **like).to(dtype)
        keywords |= dict(c_skip=sigma**-2, c_out=torch.rand(rows, **like))
    if options.get("bias"):
        leaves["bias"] = torch.randn(V, **like).to(dtype)
    if options.get("logit_scale"):
        leaves["logit_scale"] = torch.tensor(3.0, **like).to(dtype)
    if options.get("posterior"):
        table = functional.normalize(torch.randn(V, 12, **like), dim=-1).to(dtype)
        leaves["seen"] = torch.randn(*rows, 12, **like).to(dtype)
        keywords["posterior"] = (None, table, sigma)
    return target, keywords, leaves


def loss_and_gradients(target, keywords, leaves, upstream, reference=False, **more):
    """The loss, then a gradient for each leaf, by the op or by its definition in float64."""
    cast = torch.float64 if reference else None
    given = {name: t.detach().to(cast or t.dtype).requires_grad_() for name, t in leaves.items()}
    named = dict(keywords) | more
    if "posterior" in named:
        _, table, sigma = named["posterior"]
        named["posterior"] = (given["seen"], table.to(cast or table.dtype), sigma)
    named |= {name: t for name, t in given.items() if name not in ("h", "weight", "seen")}
    with pytest.MonkeyPatch.context() as patch:
        if reference:
            patch.setattr(module, "as_defined", lambda: True)
        loss = denoising_cross_entropy(given["h"], given["weight"], target, **named)
    return [loss, *torch.autograd.grad(loss, list(given.values()), upstream.to(loss.dtype))]


def check(target, keywords, leaves, reduction, dtype):
    """float32 and float64: sums of products round once a term. Halves: each product's operand rounds once, so gradients
    err by a unit of the largest; a gradient in the half is rounded again, float16's below 6e-5 to steps of 6e-8. On a
    GPU D is such an operand too, so a logit errs by a unit of its terms, which reach 1/sigma² = 11 times the others
    with the readout, and its probability and the loss with it. The gradient of logit_scale is one sum over all rows,
    whose terms cancel: it errs by a unit of their magnitudes."""
    upstream = torch.randn(target.shape if reduction == "none" else ()).to(target.device)
    exact = loss_and_gradients(target, keywords, leaves, upstream, reference=True, reduction=reduction)
    ours = loss_and_gradients(target, keywords, leaves, upstream, reduction=reduction)
    assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    half, on_gpu = dtype.itemsize == 2, target.is_cuda
    for name, a, b in zip(("loss", *leaves), ours, exact, strict=True):
        unit, least = 64 * EPSILON[ours[0].dtype], 1.0
        if name == "logit_scale":
            least += float(upstream.abs().sum()) / 8
        if half and (on_gpu or name != "loss"):
            unit, least = (16 if on_gpu else 2) * EPSILON[dtype], max(1e-6, torch.finfo(dtype).tiny)
        assert (a.double() - b).abs().max() <= unit * (b.abs().max() + least), (name, reduction)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_against_float64_forward_and_backward(options, reduction, dtype):
    check(*example(dtype=dtype, **OPTIONS[options]), reduction, dtype)


@pytest.mark.kernels
@given(
    rows=st.lists(st.integers(1, 20), min_size=1, max_size=3), d=st.integers(1, 30), V=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES), options=st.sampled_from(list(OPTIONS)),
    reduction=st.sampled_from(["mean", "sum", "none"]), seed=st.integers(0, 2**32),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_any_shape(rows, d, V, dtype, options, reduction, seed):
    torch.manual_seed(seed)
    target, keywords, leaves = example(tuple(rows), d, V, dtype, **OPTIONS[options])
    assert torch.isfinite(loss_and_gradients(target, keywords, leaves, torch.ones(()), reduction="sum")[0])
    check(target, keywords, leaves, reduction, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ["tied", "readout"])
def test_the_lowest_noise_neither_overflows_nor_hides_the_answer(options, dtype):
    """At sigma 0.002 c_skip is 2.5e5: z is the target's row, and the loss and its gradients are 0, not NaN."""
    torch.manual_seed(0)
    rows, V, d = 30, 50, 64
    table = functional.normalize(torch.randn(V, d), dim=-1).to(dtype)
    target, sigma = torch.randint(V, (rows,)), torch.full((rows,), 0.002)
    z, h = table[target], torch.randn(rows, d).to(dtype).requires_grad_()
    named = dict(z=z, c_skip=sigma**-2) if options == "tied" else dict(posterior=(z, table, sigma))
    loss = denoising_cross_entropy(h, table, target, **named)
    assert loss.isfinite() and loss < 1e-6
    assert torch.autograd.grad(loss, h)[0].abs().max() < 1e-6


@pytest.mark.kernels
def test_a_nearly_certain_target_still_has_a_gradient():
    """1 - p = 1e-12 is lost where p is rounded to float32 first, and so is the loss."""
    logits = torch.tensor([[28.0, 0.0]])
    h = logits.clone().requires_grad_()
    loss = denoising_cross_entropy(h, torch.eye(2), torch.tensor([0]))
    exact = torch.tensor(-28.0, dtype=torch.float64).exp()
    torch.testing.assert_close(loss.double(), exact.log1p(), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, h)[0].double(), torch.stack([-exact, exact])[None], rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("length", [1e-13, 1e-12, 1e-9])
def test_normalize_near_zero(length):
    """Below 1e-12 torch.nn.functional.normalize divides by a constant: the same gradient."""
    target, keywords, leaves = example((6,), dtype=torch.float64, normalize=True)
    leaves["h"] = functional.normalize(leaves["h"], dim=-1) * length * (1 + 1e-3)
    exact = loss_and_gradients(target, keywords, leaves, torch.ones(()), reference=True)
    ours = loss_and_gradients(target, keywords, leaves, torch.ones(()))
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options):
    target, keywords, leaves = example((7,), 5, 6, torch.float64, **OPTIONS[options])
    names = list(leaves)

    def run(*tensors):
        return loss_of(target, keywords, dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in leaves.values()])


def loss_of(target, keywords, leaves, reduction="mean"):
    named = dict(keywords)
    if "posterior" in named:
        named["posterior"] = (leaves["seen"], *named["posterior"][1:])
    named |= {name: t for name, t in leaves.items() if name not in ("h", "weight", "seen")}
    return denoising_cross_entropy(leaves["h"], leaves["weight"], target, reduction=reduction, **named)


def test_equal_to_pytorchs_where_both_can():
    target, _, leaves = example(V=70)
    ours = denoising_cross_entropy(leaves["h"], leaves["weight"], target)
    plain = functional.cross_entropy((leaves["h"] @ leaves["weight"].T).flatten(0, 1), target.flatten())
    torch.testing.assert_close(ours, plain)


def test_a_loss_scale_keeps_the_gradients_of_float16():
    """A mean's gradients underflow in float16 unless the scale is applied before they are rounded."""
    target, keywords, leaves = example((64, 64), d=8, V=400, dtype=torch.float16)
    upstream = torch.tensor(2.0**16)
    exact = loss_and_gradients(target, keywords, leaves, upstream, reference=True)
    ours = loss_and_gradients(target, keywords, leaves, upstream)
    for a, b in zip(ours, exact, strict=True):
        assert (a.double() - b).abs().max() <= 2.0**-9 * b.abs().max()


def test_no_output_is_left_unwritten():
    """PyTorch fills what it allocates with NaN in its deterministic mode."""
    target, keywords, leaves = example(**OPTIONS["all"])
    torch.use_deterministic_algorithms(True)
    try:
        outs = loss_and_gradients(target, keywords, leaves, torch.ones(()), reduction="sum")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(out.isfinite().all() for out in outs)


def test_repeats_bit_for_bit():
    target, keywords, leaves = example(dtype=torch.bfloat16, **OPTIONS["all"])
    runs = [loss_and_gradients(target, keywords, leaves, torch.ones(())) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.kernels
def test_never_more_than_a_chunk_of_logits(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor) and not func.is_view:
                    self.numel = max(self.numel, tensor.numel())
            return out

    target, keywords, leaves = example((640,), 8, 64, **OPTIONS["all"])
    with Largest() as largest:
        loss_and_gradients(target, keywords, leaves, torch.ones(()))
    assert largest.numel <= max(16 * 64, 640 * 12)


def test_frozen_parts_get_no_gradient():
    target, _, leaves = example()
    weight = leaves["weight"].requires_grad_()
    loss = denoising_cross_entropy(leaves["h"], weight, target)
    exact = functional.cross_entropy((leaves["h"] @ weight.T).flatten(0, 1), target.flatten())
    torch.testing.assert_close(torch.autograd.grad(loss, weight), torch.autograd.grad(exact, weight))
    with torch.no_grad():
        assert not denoising_cross_entropy(leaves["h"], weight, target).requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gpu_against_float64(options, reduction, dtype):
    check(*example((3, 300), 64, 5000, dtype, "cuda", **OPTIONS[options]), reduction, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:3])
@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("logits", [2**14, 2**19], ids=["words", "sum"])
def test_gpu_halves_in_chunks(logits, options, dtype, monkeypatch):
    """The head's gradient by words, and summed over chunks of rows."""
    monkeypatch.setattr(chunks, "GPU_LOGITS", logits)
    check(*example((3, 300), 64, 5000, dtype, "cuda", **OPTIONS[options]), "mean", dtype)


@pytest.mark.gpu
@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_smoke(dtype):
    """Forward and backward, some targets ignored: few rows, and more than are few."""
    for rows in (60, 1100):
        check(*example((rows,), 64, 5000, dtype, "cuda"), "mean", dtype)
