"""Run by test_ada_norm_triton.py in a process with TRITON_INTERPRET=1: the kernels against the definitions."""

import itertools

import torch

from dbkernels import _modulation as modulation
from dbkernels.ada_norm import _backward, _forward
from dbkernels.gated_residual_norm import _backward as _gated_backward
from dbkernels.gated_residual_norm import _forward as _gated_forward
from dbkernels.triton import ada_norm_launch as ada_norm
from numerics import EPSILON, thinned

torch.manual_seed(0)


def close(ours, exact, dtype, what):
    """The interpreter truncates where a GPU rounds to bfloat16: a whole unit. Sums and roots lose a few more."""
    assert ours.dtype == exact.dtype and ours.shape == exact.shape, what
    unit = max(2 * EPSILON[dtype] if ours.dtype == dtype else 0, 32 * EPSILON[torch.float32])
    assert ((ours.double() - exact.double()).abs() <= unit * (1 + exact.double().abs())).all(), what


def strided(shape, dtype):
    """Rows of a wider tensor: strides that aren't the shape's."""
    return torch.randn(*shape[:-1], shape[-1] + 3).to(dtype)[..., : shape[-1]]


def cases():
    # (O, I, D): one row a program and several, a tile of many steps, odd widths, rows beyond a register's width
    shapes = [(3, 5, 24), (2, 70, 17), (1, 3, 1100), (4, 1, 8), (1, 2, 5000)]
    for index, (shape, rms) in enumerate(itertools.product(shapes, (False, True))):
        yield shape, torch.float32, rms, index % 4 in (1, 2)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        yield (2, 9, 40), dtype, False, True


for shape, dtype, rms, affine in thinned(cases()):
    O, _, D = shape
    what = (shape, dtype, rms, affine)
    x, branch, grad, grad_h = (strided(shape, dtype) for _ in range(4))
    shift, scale, gate = torch.randn(O, 1, 3 * D).to(dtype).chunk(3, -1)
    weight, bias = torch.randn(2, D).unbind() if affine else (None, None)
    bias = None if rms else bias
    for ours, exact in zip(
        ada_norm.forward(x, shift, scale, weight, bias, 1e-6, rms),
        _forward(x, shift, scale, weight, bias, 1e-6, rms),
        strict=True,
    ):
        close(ours, exact, dtype, ("forward", *what))
    mean, rstd = modulation.statistics(x, 1e-6, rms)
    for ours, exact in zip(
        ada_norm.backward(grad, x, scale, weight, mean, rstd),
        _backward(grad, x, scale, weight, mean, rstd),
        strict=True,
    ):
        close(ours, exact, dtype, ("backward", *what))
    h, *rest = ada_norm.gated_forward(x, branch, gate, shift, scale, weight, bias, 1e-6, rms)
    close(h, _gated_forward(x, branch, gate, shift, scale, weight, bias, 1e-6, rms)[0], dtype, ("gated forward", *what))
    for ours, exact in zip(rest, _forward(h, shift, scale, weight, bias, 1e-6, rms), strict=True):
        close(ours, exact, dtype, ("the norm of h", *what))
    for given in (grad_h, None):
        for ours, exact in zip(
            ada_norm.gated_backward(grad, given, x, branch, gate, scale, weight, mean, rstd),
            _gated_backward(grad, given, x, branch, gate, scale, weight, mean, rstd),
            strict=True,
        ):
            close(ours, exact, dtype, ("gated backward", given is None, *what))

# None of the modulation, and nothing at all
x = torch.randn(2, 3, 8)
close(ada_norm.forward(x, None, None, None, None, 1e-6, False)[0], _forward(x, None, None, None, None, 1e-6, False)[0],
      torch.float32, "plain")  # fmt: skip
assert ada_norm.forward(x[:0], None, None, None, None, 1e-6, True)[0].shape == (0, 3, 8)
print("interpreted: ok")
