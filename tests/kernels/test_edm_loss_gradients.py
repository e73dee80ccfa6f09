"""edm_loss: its gradients under an upstream gradient, in retained graphs, and what is kept for them."""

import pytest
import torch

from dbkernels import edm_loss, edm_loss_reference
from dbkernels._edm_loss import _with_gradients
from numerics import EPSILON
from test_edm_loss import DTYPES, REDUCTIONS, S, example

UPSTREAM = {"mean": (), "sum": (), "none": (6, 5, 8), "sample": (6,)}


def leaves_of(*tensors):
    return [None if t is None else t.clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("source", ["read", "scaled", "drawn"])
@pytest.mark.parametrize("levels", [(), (3,), (3, 4)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction, levels, source):
    """Of the op and of the definition, in F, z and y."""
    F, z, y = (torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    sigma = torch.rand(levels, dtype=torch.float64) + 0.3
    if source == "drawn":
        assert torch.autograd.gradcheck(
            lambda F, y: edm_loss(F, None, y, sigma, sigma_data=S, reduction=reduction, seed=4), (F, y)
        )
        assert torch.autograd.gradcheck(lambda F, y: edm_loss_reference(F, None, y, sigma, S, reduction, 4), (F, y))
    else:
        given, scaled = (F, z, y), dict(z_scaled=source == "scaled")
        assert torch.autograd.gradcheck(
            lambda *t: edm_loss(*t, sigma, sigma_data=S, reduction=reduction, **scaled), given
        )
        assert torch.autograd.gradcheck(lambda *t: edm_loss_reference(*t, sigma, S, reduction, **scaled), given)


@pytest.mark.parametrize("source", ["read", "scaled", "drawn"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_definitions_own_gradients(reduction, source):
    """They serve where no kernel was built. Against autograd: half the loss, for an upstream gradient of 3."""
    F, z, y = torch.randn(3, 3, 4, 5, dtype=torch.float64)
    z, sigma, scaled = None if source == "drawn" else z, torch.rand(3, dtype=torch.float64) + 0.3, source == "scaled"
    loss, *grads = _with_gradients(
        F, z, y, sigma, S, reduction, scaled, 4, 1, 10, 0.5, 3.0, (True, z is not None, True)
    )
    leaves = leaves_of(F, z, y)
    expected = edm_loss_reference(*leaves, sigma, S, reduction, 4, 1, weight=0.5, z_scaled=scaled)
    (3 * expected).sum().backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-14, atol=0)
    for ours, leaf in zip(grads, leaves, strict=True):
        torch.testing.assert_close(ours, torch.empty(0).double() if leaf is None else leaf.grad, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_upstream_gradient_is_applied(dtype, reduction):
    """By each backward through a retained graph, also where the gradients of the one before were written into. Against
    the definition in float64: a rounding as the gradient is kept, one as it is scaled."""
    inputs = example((6, 5, 8), (6,), dtype)[:3]
    sigma = torch.rand(6, dtype=torch.float64 if dtype == torch.float64 else torch.float32) + 0.1
    leaves, exact = leaves_of(*inputs), leaves_of(*(t.double() for t in inputs))
    loss = edm_loss(*leaves, sigma, sigma_data=S, reduction=reduction)
    expected = edm_loss_reference(*exact, sigma.double(), S, reduction)
    first, second = (torch.randn(UPSTREAM[reduction], dtype=loss.dtype) for _ in range(2))
    for upstream, retain in ((first, True), (second, True), (torch.ones_like(first), True), (-3 * first, False)):
        grads = torch.autograd.grad(loss, leaves, upstream, retain_graph=retain)
        wanted = torch.autograd.grad(expected, exact, upstream.double(), retain_graph=retain)
        for ours, theirs in zip(grads, wanted, strict=True):
            unit = 2 * EPSILON[dtype] if dtype != torch.float64 else 1e-14
            assert ((ours.double() - theirs).abs() <= unit * theirs.abs().max()).all()
            ours.fill_(float("nan"))  # whoever owns a gradient may write into it


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_weight_is_a_factor_on_the_loss(reduction, drawn):
    """A power of two, so that not a bit differs."""
    F, z, y, sigma = example((6, 5, 8), (6,), torch.float32)
    options = dict(sigma_data=S, reduction=reduction) | (dict(seed=3) if drawn else {})
    ours, factor = leaves_of(F, F)
    weighed = edm_loss(ours, None if drawn else z, y, sigma, weight=0.25, **options)
    times = 0.25 * edm_loss(factor, None if drawn else z, y, sigma, **options)
    assert torch.equal(weighed, times)
    weighed.mean().backward(), times.mean().backward()
    torch.testing.assert_close(ours.grad, factor.grad, rtol=2e-7, atol=0)
    for bad, error in ((float("nan"), ValueError), (torch.tensor(1.0), TypeError), (True, TypeError)):
        with pytest.raises(error, match="weight"):
            edm_loss(F, z, y, sigma, sigma_data=S, weight=bad)


def test_backward_twice_accumulates():
    F, z, y, sigma = example((4, 8), (4,), torch.float32)
    F.requires_grad_()
    (once,) = torch.autograd.grad(edm_loss(F, z, y, sigma, sigma_data=S), F)
    loss = edm_loss(F, z, y, sigma, sigma_data=S)
    for _ in range(3):
        loss.backward(retain_graph=True)
    (3 * loss).backward()
    torch.testing.assert_close(F.grad, 6 * once)


@pytest.mark.parametrize("view", [False, True])
def test_a_gradient_scaled_in_place_leaves_the_graph_as_it_was(view):
    """As gradient clipping and zero_grad do it, between two backward passes of one graph."""
    F, z, y, sigma = example((4, 8), (4,), torch.float32)
    F.requires_grad_()
    shaped = F.view(4, 2, 4) if view else F
    loss = edm_loss(shaped, z.view_as(shaped), y.view_as(shaped), sigma, sigma_data=S)
    loss.backward(retain_graph=True)
    expected = F.grad.clone()
    F.grad.mul_(100)
    F.grad = None
    loss.backward()
    assert torch.equal(F.grad, expected)


def test_losses_of_one_output_add_up():
    """Two nodes whose gradients meet: neither may be added into what the other keeps."""
    F, z, y, sigma = example((4, 8), (4,), torch.float32)
    F.requires_grad_()
    a = edm_loss(F, z, y, sigma, sigma_data=S)
    b = edm_loss(F, z, y, 2 * sigma, sigma_data=S)
    expected = sum(torch.autograd.grad(x, F, retain_graph=True)[0] for x in (a, b))
    for _ in range(2):
        F.grad = None
        (a + b).backward(retain_graph=True)
        torch.testing.assert_close(F.grad, expected)


def test_an_expanded_upstream_gradient():
    """What .sum() and .mean() hand to a loss of each element: one number, expanded."""
    F, z, y, sigma = example((4, 3, 8), (4,), torch.float32)
    for reduction in ("none", "sample"):
        leaf, other = leaves_of(F, F)
        edm_loss(leaf, z, y, sigma, sigma_data=S, reduction=reduction).mean().backward()
        edm_loss(other, z, y, sigma, sigma_data=S).backward()
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-6, atol=0)


def saved_by(make):
    """The tensors kept for backward, and what `make` returns."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = make()
    return [t for t in saved if t.numel()], loss


@pytest.mark.kernels
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_kept_gradient_is_handed_over(scale):
    """What is kept is the gradient of F, of F's bytes. The last backward hands that memory on, a retained graph keeps
    it."""
    F, z, y, sigma = example((8, 64), (8,), torch.bfloat16)
    F.requires_grad_()
    (kept,), loss = saved_by(lambda: edm_loss(F, z, y, sigma, sigma_data=S))
    assert kept.nbytes == F.nbytes
    upstream = torch.full_like(loss, scale)
    (copy,) = torch.autograd.grad(loss, F, upstream, retain_graph=True)
    (grad,) = torch.autograd.grad(loss, F, upstream)
    assert copy.data_ptr() != kept.data_ptr() and grad.data_ptr() == kept.data_ptr()
    assert torch.equal(copy, grad)


def test_a_loss_scale_reaches_small_float16_gradients():
    """The gradient of a mean over a million elements is below float16's least number until the scale is applied."""
    shape = (64, 128, 128)
    F, z, y, sigma = example(shape, (64,), torch.float16)
    F.requires_grad_()
    (grad,) = torch.autograd.grad(65536 * edm_loss(F, z, y, sigma, sigma_data=S), F)
    exact = F.detach().double().requires_grad_()
    edm_loss_reference(exact, z.double(), y.double(), sigma.double(), S).backward()
    assert grad.dtype == torch.float16 and exact.grad.abs().max() < 2.0**-14  # the least that float16 holds in full
    torch.testing.assert_close(grad.double(), 65536 * exact.grad, rtol=2.0**-11, atol=2.0**-24)


@pytest.mark.kernels
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_second_derivative_is_refused(reduction):
    """It would be wrong without a word: to autograd the kept gradient is a constant."""
    F, z, y, sigma = example((4, 8), (4,), torch.float32)
    loss = edm_loss(F.requires_grad_(), z, y, sigma, sigma_data=S, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="no second derivative: drop create_graph"):
        torch.autograd.grad(loss, F, create_graph=True)


def test_a_graph_that_was_not_retained_is_gone():
    F, z, y, sigma = example((4, 8), (4,), torch.float32)
    loss = edm_loss(F.requires_grad_(), z, y, sigma, sigma_data=S)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
