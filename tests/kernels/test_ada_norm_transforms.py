"""The modulated norms differentiated twice, and within torch.func, forward mode and batched gradients."""

import pytest
import torch

import dbkernels
from test_ada_norm import call, example


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_second_derivatives(rms, per_token):
    """Of all inputs; and of a penalty on the gradient, whose upstream gradient is a constant."""
    given = example((2, 3, 5), torch.float64, per_token, rms=rms)
    leaves = [t.requires_grad_() for t in given if t is not None]
    assert torch.autograd.gradgradcheck(lambda *t: call(rms, *t, *([None] if rms else [])), leaves)

    def penalty(op):
        (slope,) = torch.autograd.grad(op(*given).sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(slope.square().sum(), leaves[0])[0]

    exact = penalty(lambda *t: dbkernels._modulation.definition(*t, 1e-6, rms))
    torch.testing.assert_close(penalty(lambda *t: call(rms, *t)), exact)


def test_transforms_of_torch_func():
    """They, forward-mode derivatives and batched gradients run on the definition."""
    x, shift, scale, weight, bias = example((4, 3, 8), torch.float64)

    def loss(x):
        return dbkernels.ada_layer_norm(x, shift[:1], scale[:1], weight=weight, bias=bias).square().sum()

    expected = torch.autograd.grad(loss(leaf := x.clone().requires_grad_()), leaf)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    each = torch.func.vmap(lambda x, t, s: dbkernels.ada_layer_norm(x, t, s, weight=weight, bias=bias))(x, shift, scale)
    torch.testing.assert_close(each, dbkernels.ada_layer_norm(x, shift, scale, weight=weight, bias=bias))
    _, along = torch.func.jvp(loss, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(along, expected.sum())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent, along)
    out = dbkernels.ada_layer_norm(leaf, shift, scale)
    upstream = torch.randn(3, *out.shape, dtype=torch.float64)
    batched = torch.autograd.grad(out, leaf, upstream, is_grads_batched=True, retain_graph=True)[0]
    for one, grad in zip(batched, upstream, strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(out, leaf, grad, retain_graph=True)[0])
