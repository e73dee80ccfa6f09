"""Run by test_ada_norm_triton.py with TRITON_INTERPRET=1: the public functions past the dispatcher, as on a GPU,
against their definitions: outputs and every gradient, in the shapes and dtypes of what was given."""

import sys

import torch

import dbkernels
from dbkernels import gated_residual_norm_reference
from dbkernels._modulation import definition
from dbkernels.triton.ada_norm_launch import Backward, Forward, Inputs, Wanted
from numerics import EPSILON, thinned

for module in ("dbkernels.ada_norm", "dbkernels.gated_residual_norm"):
    sys.modules[module].direct = lambda *tensors: True
torch.manual_seed(0)


def close(ours, exact, what):
    """The interpreter truncates where a GPU rounds to bfloat16; sums over rows lose a few units more."""
    exact = exact.detach()
    unit = max(2 * EPSILON[ours.dtype], 64 * EPSILON[torch.float32])
    assert ((ours.double() - exact.double()).abs() <= unit * (1 + exact.double().abs().max())).all(), what


def check(ours, exact, tensors, upstream, what):
    """Outputs and gradients of two functions of the same tensors, of which the second runs in float64."""
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in tensors]
    wide = [t if t is None else t.detach().double().requires_grad_() for t in tensors]
    found, expected = ours(*leaves), exact(*wide)
    given = [t for t in leaves if t is not None]
    grads = torch.autograd.grad(found, given, upstream)
    exact_grads = torch.autograd.grad(expected, [t for t in wide if t is not None], [g.double() for g in upstream])
    for a, b in zip((*found, *grads), (*expected, *exact_grads), strict=True):
        close(a, b, what)
    for grad, leaf in zip(grads, given, strict=True):
        assert grad.shape == leaf.shape and grad.dtype == leaf.dtype and grad.is_contiguous(), what


def example(shape, dtype, form, affine):
    """gate, shift, scale as chunks of one tensor (chunks), per sample without the inner size, or per token."""
    x, branch = (torch.randn(shape).to(dtype) for _ in range(2))
    wide = {"chunks": (shape[0], 1), "flat": (shape[0],), "token": shape[:-1]}[form]
    modulation = torch.randn(*wide, 3 * shape[-1]).to(dtype).chunk(3, -1)
    weight, bias = torch.randn(2, shape[-1]) if affine else (None, None)
    return x, branch, *modulation, weight, bias


def check_case(shape, dtype, form, affine, rms):
    """Alone, and behind a gated residual where h isn't rounded to 16 bits, which a float64 definition doesn't do."""
    x, branch, *modulation, weight, bias = example(shape, dtype, form, affine)
    bias, norm = None if rms else bias, "rms" if rms else "layer"
    upstream = [torch.randn(shape).to(dtype) for _ in range(2)]

    def broadcast(*modulation):  # a (B, D) serves all rows of a sample
        return [t.unsqueeze(1) if form == "flat" else t for t in modulation]

    def alone(x, shift, scale, weight, bias):
        if rms:
            return (dbkernels.ada_rms_norm(x, shift, scale, weight=weight),)
        return (dbkernels.ada_layer_norm(x, shift, scale, weight=weight, bias=bias),)

    def alone_defined(x, shift, scale, weight, bias):
        return (definition(x, *broadcast(shift, scale), weight, bias, 1e-6, rms),)

    def gated(x, branch, gate, shift, scale, weight, bias):
        return dbkernels.gated_residual_norm(x, branch, gate, shift, scale, weight=weight, bias=bias, norm=norm)

    def gated_defined(x, branch, gate, shift, scale, weight, bias):
        return gated_residual_norm_reference(x, branch, *broadcast(gate, shift, scale), weight, bias, 1e-6, rms)

    what = shape, dtype, form, affine, rms
    check(alone, alone_defined, (x, *modulation[1:], weight, bias), upstream[:1], what)
    if dtype.itemsize > 2:
        check(gated, gated_defined, (x, branch, *modulation, weight, bias), upstream, ("gated", *what))


# One program of a sample and several, rows too wide for registers, float64's own tiles; sums over samples where affine
CASES = [((2, 5, 24), torch.float32, "chunks", True), ((2, 5, 24), torch.float32, "token", False),
         ((2, 5, 24), torch.bfloat16, "flat", True), ((2, 5, 24), torch.float16, "token", True),
         ((2, 300, 16), torch.bfloat16, "chunks", False), ((2, 300, 16), torch.float32, "flat", True),
         ((1, 2, 4500), torch.bfloat16, "chunks", True), ((2, 9, 40), torch.float64, "flat", True)]  # fmt: skip
for index, case in thinned(enumerate(CASES)):
    for rms in (False, True) if index == 0 else (bool(index % 2),):
        check_case(*case, rms)

# An upstream gradient that is one number expanded, only some gradients wanted, nothing differentiated
x, _, _, shift, scale, weight, bias = example((2, 5, 24), torch.float32, "chunks", True)
leaf = scale.detach().clone().requires_grad_()
(grad,) = torch.autograd.grad(dbkernels.ada_layer_norm(x, shift, leaf, weight=weight, bias=bias).sum(), leaf)
wide = scale.double().requires_grad_()
whole = definition(x.double(), shift.double(), wide, weight.double(), bias.double(), 1e-6, False).sum()
close(grad, torch.autograd.grad(whole, wide)[0], "scale alone")
assert not dbkernels.ada_layer_norm(x, shift, scale).requires_grad

# A branch of another dtype counts as cast to that of x, in h and in the gradient of the gate
for width in (24, 4500):
    x, branch, gate, shift, scale, _, _ = example((1, 2, width), torch.bfloat16, "chunks", False)
    # More digits than bfloat16's, which both rounding and the interpreter's cutting off take away
    more = (branch.float().view(torch.int32) + torch.randint(2**15, branch.shape).int()).view(torch.float32)
    results = []
    for given in (more, branch):
        leaves = [t.detach().clone().requires_grad_() for t in (x, given, gate)]
        outs = dbkernels.gated_residual_norm(*leaves, shift, scale)
        results.append((*outs, *torch.autograd.grad(outs, leaves, [torch.ones_like(x)] * 2)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.bfloat16(), b)


def sums_over_branch(apart, rows, dim):
    """The gate's gradient, where one tensor holds it 2·apart elements behind the shift's, as the ops' kernels do."""
    torch.manual_seed(0)
    x, branch, grad = torch.randn(3, 1, rows, dim).unbind()
    gate, rest = torch.randn(1, 1, dim), (None, None, None, None)
    h, _, rstd = Forward(Inputs(x, branch, gate, *rest), 1e-6, False, x.shape, joint=True)(x, branch, gate, *rest)
    wanted = Wanted((gate.shape, gate.dtype), *rest, apart=apart)
    plan = Backward(grad, None, Inputs(h, branch, gate, *rest), False, rows, x.shape, wanted)
    sums = torch.empty(2 * apart + dim)  # only the pages that are touched exist
    plan(grad, None, h, branch, gate, None, None, None, rstd, rstd, (sums, *rest))
    return sums[2 * apart :].clone()


# 2^31 elements apart, in each of the kernels that write there
for rows, dim in ((2, 8), (300, 8), (1, 5000)):
    assert torch.equal(sums_over_branch(2**30, rows, dim), sums_over_branch(dim, rows, dim)), (rows, dim)

# Second derivatives and batched gradients run on the definition
leaf, shift, scale = (torch.randn(1, n, 3, dtype=torch.float64) for n in (2, 1, 1))
leaf.requires_grad_()
assert torch.autograd.gradgradcheck(lambda x: dbkernels.ada_layer_norm(x, shift, scale), leaf)
out = dbkernels.ada_layer_norm(leaf, shift, scale)
upstream = torch.stack([torch.ones_like(out), 2 * torch.ones_like(out)])
once, twice = torch.autograd.grad(out, leaf, upstream, is_grads_batched=True)[0]
torch.testing.assert_close(2 * once, twice)
print("interpreted: ok")
