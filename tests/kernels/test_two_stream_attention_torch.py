"""two_stream_attention inside PyTorch: torch.library's checks, compile, autocast, memory, and what it refuses."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dbkernels import two_stream_attention
from numerics import pairs
from two_streams import NAMES, example


@pytest.mark.parametrize(
    ("dtype", "group_size", "clean"), pairs([torch.float32, torch.bfloat16], [1, 4], [True, False])
)
def test_opcheck(dtype, group_size, clean):
    streams = [None if t is None else t.detach() for t in example(N=9, dtype=dtype, clean=clean)]
    forward = torch.ops.dbkernels.two_stream_attention.default
    torch.library.opcheck(forward, (*streams, group_size, 0.25, None))
    outs = forward(*streams, group_size, 0.25, None)
    grad = torch.randn_like(outs[1])
    arguments = (grad if clean else None, grad, *streams, *outs, group_size, 0.25, None)
    torch.library.opcheck(torch.ops.dbkernels.two_stream_attention_backward.default, arguments)


@pytest.mark.parametrize("group_size", [1, 4])
def test_compiles_whole_and_once_over_changing_data(group_size, compile_counter):
    def step(*streams):
        out, out_noisy = two_stream_attention(*streams, group_size=group_size)
        return (out * 2).sum() + (out_noisy * 3).sum()

    compiled = torch.compile(step, fullgraph=True, backend=compile_counter)
    for _ in range(3):
        streams = example()
        ours = torch.autograd.grad(compiled(*streams), streams)
        plain = torch.autograd.grad(step(*streams), streams)
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert compile_counter.frame_count == 1


def test_autocast_casts_as_for_pytorchs_attention():
    streams = example()
    mixed = [t if i % 2 else t.to(torch.bfloat16) for i, t in enumerate(streams)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, out_noisy = two_stream_attention(*mixed)
    assert out.dtype == out_noisy.dtype == torch.bfloat16
    low = [t.detach().to(torch.bfloat16) for t in streams]
    assert torch.equal(out_noisy, two_stream_attention(*low)[1])


def test_a_second_derivative_is_refused_never_dropped():
    """Where upstream is a constant, once_differentiable would let the gradient pass for a constant too."""
    streams = example(N=9)
    out, out_noisy = two_stream_attention(*streams)
    with pytest.raises(RuntimeError, match="no second derivative: drop create_graph=True"):
        torch.autograd.grad(out.sum() + out_noisy.sum(), streams, create_graph=True)
    assert torch.autograd.grad(two_stream_attention(*streams)[1].sum(), streams[3])[0].abs().sum() > 0


def test_transforms_of_functions_take_the_definition():
    streams = [t.detach() for t in example(N=9, dtype=torch.float64)]
    many = [torch.stack([t, 2 * t]) for t in streams]
    out = torch.func.vmap(lambda *t: two_stream_attention(*t, group_size=4)[1])(*many)
    torch.testing.assert_close(out[1], two_stream_attention(*(2 * t for t in streams), group_size=4)[1])


def test_meta_and_empty():
    streams = [t.detach().to("meta") for t in example(D=64)]
    out, out_noisy = two_stream_attention(*streams)
    assert out.shape == out_noisy.shape == streams[0].shape and out.is_meta
    for size in (dict(N=0), dict(B=0)):
        streams = example(**size)
        out, out_noisy = two_stream_attention(*streams)
        assert out.shape == streams[0].shape
        grads = torch.autograd.grad((out.sum() + out_noisy.sum()), streams)
        assert [g.shape for g in grads] == [t.shape for t in streams]


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("group_size", [1, 4])
def test_no_mask_of_the_sequence_is_made(group_size):
    N, D = 2048, 8
    streams = example(B=1, H=1, heads=1, N=N, D=D)
    with Largest() as largest:
        out, out_noisy = two_stream_attention(*streams, group_size=group_size)
        torch.autograd.grad(out.sum() + out_noisy.sum(), streams)
    assert largest.numel <= 2 * 128 * 128 + 3 * N * D < N * N / 16


def bad(**changes):
    return {**dict(zip(NAMES, example(B=1), strict=True)), **changes}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(k=None), TypeError, "k must be a floating tensor, got NoneType"),
        (
            dict(q=torch.zeros(1, 4, 37, 16, dtype=torch.int64)),
            TypeError,
            "q must be a floating tensor, got torch.int64",
        ),
        (dict(group_size=True), TypeError, "group_size must be an int"),
        (dict(group_size=0), ValueError, "group_size=0 must be from 1 to N=37"),
        (dict(group_size=38), ValueError, "group_size=38 must be from 1 to N=37"),
        (dict(scale="x"), TypeError, "scale must be a float"),
        (dict(scale=float("nan")), ValueError, "scale=nan must be positive and finite"),
        (dict(scale=0.0), ValueError, "scale=0.0 must be positive and finite: for another sign, negate the queries"),
        (dict(scale=-0.5), ValueError, "scale=-0.5 must be positive"),
        (dict(v=torch.zeros(1, 37, 16)), ValueError, r"v must be \(B, H, N, D\)"),
        (dict(v=torch.zeros(1, 2, 36, 16)), ValueError, "v has shape"),
        (
            dict(k_noisy=torch.zeros(1, 2, 37, 16).half()),
            ValueError,
            "k_noisy is torch.float16 on cpu and k torch.float32",
        ),
        (dict(q=torch.zeros(1, 3, 37, 16)), ValueError, "q has shape"),
        (dict(q=None, q_noisy=torch.zeros(1, 3, 37, 16)), ValueError, "H=3 query heads must be a multiple of H_kv=2"),
        (dict(cu_seqlens=torch.tensor([0, 37])), ValueError, "1-d int32"),
        (dict(cu_seqlens=torch.tensor([0, 30], dtype=torch.int32)), ValueError, "must rise from 0 to N=37"),
        (dict(cu_seqlens=torch.tensor([37], dtype=torch.int32)), ValueError, "two entries"),
    ],
)
def test_errors_name_the_argument(changes, error, words):
    with pytest.raises(error, match=words):
        two_stream_attention(**bad(**changes))


def test_every_reason_is_given_at_once():
    streams = [torch.zeros(2, 4, 9, 48, device="meta")] * 6
    with pytest.raises(ValueError) as caught:
        two_stream_attention(*streams, group_size=10, cu_seqlens=torch.zeros(2, dtype=torch.int32))
    words = ("group_size=10", "got B=2", "cu_seqlens is on cpu")
    assert all(word in str(caught.value) for word in words)
