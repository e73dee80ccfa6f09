"""Test by trial whether two norm modules compute the same function, before `replace` swaps one for the other."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dbkernels._drop_in import _DropIn

SIZES = (1e-6, 1e-4, 1e-2, 1.0, 1e3)  # of activations: where eps counts, and where squares grow large
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((64,), (4, 16), (2, 4, 8), ())  # in front of the normalised dimension; 64 rows show a dropout of .1
# One rounding fewer than the module replaced makes one unit of difference, and some compute float64 in float32; a norm
# of another kind differs by far more.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def same_function(theirs: nn.Module, ours: _DropIn) -> bool:  # type: ignore[valid-type]
    """Return whether `ours` may replace `theirs`.

    Both take and return one tensor, have no state but the parameters, and give the same values, dtypes and gradients
    wherever `theirs` runs. The trial runs on copies, on the CPU, with its own random numbers.
    """
    argument = _only_argument(theirs)
    if argument is None or _has_more(theirs) or any(p.is_meta for p in theirs.parameters()):
        return False
    ours.argument = argument
    try:
        copies = copy.deepcopy(theirs).cpu(), copy.deepcopy(ours).cpu()
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns of dtypes that it computes slowly
            torch.manual_seed(0)
            ours.promotes = copies[1].promotes = _promotes(*copies)
            tried = [_same(*copies, x) for x in _inputs(int(ours.dim), ours.weight)]
    except Exception:  # whatever fails in a trial, the module stays as it is
        return False
    return any(same is not None for same in tried) and all(same is not False for same in tried)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _has_more(module: nn.Module) -> bool:
    """Return whether the module has state that a swap would lose: hooks, buffers, children."""
    hooked = any(getattr(module, hooks) for hooks in _HOOKS)
    return hooked or any(True for _ in module.buffers()) or any(True for _ in module.children())


def _only_argument(module: nn.Module) -> str | None:
    """Return the name of forward's argument if it has exactly one."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return parameters[0].name if len(parameters) == 1 and parameters[0].kind in kinds else None


def _inputs(dim: int, weight: Tensor | None) -> Iterator[Tensor]:
    half = weight is not None and weight.dtype.itemsize == 2
    for dtype in DTYPES:
        if half and dtype.itemsize == 2 and weight is not None and dtype != weight.dtype:
            continue  # bfloat16 with float16 isn't used, and libraries differ in their results
        for size in SIZES:
            yield (size * (torch.randn(64, dim) + 0.3)).to(dtype)
        for shape in SHAPES:
            yield torch.randn(*shape, dim).to(dtype)
    yield torch.randn(dim, 5).T  # rows whose elements lie apart


def _promotes(theirs: nn.Module, ours: nn.Module) -> bool:
    """Return whether `theirs` promotes narrower inputs to the weight's dtype."""
    weight = ours.weight
    if weight is None or weight.dtype.itemsize < 4:
        return False
    narrow = torch.randn(4, int(ours.dim)).to(torch.bfloat16)  # type: ignore[arg-type]
    try:
        return bool(theirs(narrow).dtype == weight.dtype)
    except Exception:
        return False


def _same(theirs: nn.Module, ours: nn.Module, x: Tensor) -> bool | None:
    """Return whether both give equal results for x, in training and evaluation; None where `theirs` fails."""
    for training in (True, False):
        theirs.train(training)
        ours.train(training)
        try:
            expected = _value_and_gradients(theirs, x)
        except Exception:
            return None
        actual = _value_and_gradients(ours, x)
        if not _close(actual, expected, x) and not (x.dtype.itemsize == 2 and _truer(actual, expected, theirs, x)):
            return False
    return True


def _value_and_gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the output, and the gradients of the input and of the parameters."""
    leaf = x.detach().clone().requires_grad_()
    given = leaf * 1  # a module that works in place changes this one
    kept = given.detach().clone()
    out = module(given)
    if not isinstance(out, Tensor):
        raise TypeError("a tensor in, a tensor out")
    leaves = [leaf, *(p for p in module.parameters() if p.requires_grad)]
    # Not symmetric: sums over rows that cancel would leave only rounding
    upstream = torch.linspace(-0.5, 1.5, out.numel(), dtype=torch.float64).view(out.shape).cos().to(out.dtype)
    grads = torch.autograd.grad(out, leaves, upstream)
    if not torch.equal(kept, given.detach()):
        raise ValueError("the input was overwritten")
    return [out.detach(), *grads]


def _close(actual: list[Tensor], expected: list[Tensor], x: Tensor) -> bool:
    return all(
        a.dtype == b.dtype and a.shape == b.shape and _within(a, b.double(), torch.zeros(()), _tolerance(b, x, i > 0))
        for i, (a, b) in enumerate(zip(actual, expected, strict=True))
    )


def _truer(actual: list[Tensor], expected: list[Tensor], theirs: nn.Module, x: Tensor) -> bool:
    """Return whether ours is as accurate as `theirs`, whose squares may overflow in halves, by `theirs` in float64."""
    exact = _value_and_gradients(copy.deepcopy(theirs).double(), x.double())
    return all(
        a.dtype == b.dtype and a.shape == b.shape and _within(a, c, (b.double() - c).abs(), _tolerance(b, x, i > 0))
        for i, (a, b, c) in enumerate(zip(actual, expected, exact, strict=True))
    )


def _tolerance(value: Tensor, x: Tensor, gradient: bool) -> float:
    """Return the relative error allowed for rounding: PyTorch's own gradients sum 64 rows in halves."""
    return (10 if gradient else 1) * max(_TOLERANCE[value.dtype], _TOLERANCE[x.dtype])


def _within(a: Tensor, exact: Tensor, slack: Tensor, tolerance: float) -> bool:
    """Return whether a is near `exact`, both finite, with an additional error of `slack` allowed."""
    band = slack.nan_to_num(nan=torch.inf) + tolerance * (exact.abs() + exact.square().mean().sqrt())
    return bool(((a.double() - exact).abs() <= band).all()) and bool(exact.isfinite().all())
