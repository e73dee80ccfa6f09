"""When an op calls its launcher past the dispatcher: a plain GPU tensor, and nobody watching."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from dbkernels import _direct
from dbkernels._direct import direct, kind


class OnGPU:
    """Stands for a plain tensor on a GPU: what `direct` asks of its first argument."""

    is_cuda = True


@pytest.fixture
def x(monkeypatch):
    monkeypatch.setattr(_direct, "_PLAIN", (OnGPU, torch.Tensor, torch.nn.Parameter))
    monkeypatch.setattr(_direct, "_has_storage", lambda t: isinstance(t, OnGPU) or torch._C._has_storage(t))
    monkeypatch.setattr(_direct, "HAS_TRITON", True)
    return OnGPU()


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return op(*args, **(kwargs or {}))


class Mine(torch.Tensor):
    pass


@pytest.mark.kernels
def test_plain_tensors_go_directly(x):
    assert direct(x) and direct(x, torch.zeros(2), None, torch.nn.Parameter(torch.zeros(2)))


@pytest.mark.kernels
def test_what_watches_or_transforms_goes_through_the_dispatcher(x, monkeypatch):
    assert not direct(x, torch.zeros(2).as_subclass(Mine))
    for mode in (Watch(), FakeTensorMode()):
        with mode:
            assert not direct(x)
    with forward_ad.dual_level():
        assert not direct(x)
    seen = []
    torch.vmap(lambda t: seen.append(direct(x)) or t)(torch.zeros(2))
    torch.func.grad(lambda t: seen.append(direct(x)) or t.sum())(torch.zeros(2))
    torch.jit.trace(lambda t: seen.append(direct(x)) or t * 1, torch.zeros(2), check_trace=False)
    assert seen == [False, False, False] and direct(x)


def test_batched_gradients_go_through_the_dispatcher(x):
    seen = []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t * 1

        @staticmethod
        def backward(ctx, grad):
            seen.append(direct(x, grad))
            return grad * 1

    leaf = torch.zeros(3, requires_grad=True)
    out = Square.apply(leaf)
    torch.autograd.grad(out, leaf, torch.eye(3), is_grads_batched=True)
    assert seen == [False]


def test_without_triton_or_as_the_definition_the_dispatcher_serves(x, monkeypatch):
    monkeypatch.setattr(_direct, "HAS_TRITON", False)
    assert not direct(x)
    monkeypatch.setattr(_direct, "HAS_TRITON", True)
    monkeypatch.setattr(_direct, "backend", lambda: "reference")
    assert not direct(x)
    monkeypatch.undo()
    assert not direct(torch.zeros(2))  # on the CPU


def test_a_kind_tells_apart_what_launches_depend_on():
    x = torch.zeros(4, 6)
    kinds = {kind(x), kind(x.t()), kind(x[:, ::2]), kind(x.double()), kind(x.view(2, 12)), kind(None)}
    assert len(kinds) == 6 and kind(torch.ones(4, 6)) == kind(x)
