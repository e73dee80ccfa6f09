"""two_stream_decode: what two_stream_attention gives the last group's rows, from a cache."""

import pytest
import torch

from dbkernels import two_stream_attention, two_stream_decode, two_stream_decode_reference
from numerics import EPSILON
from two_streams import example

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def inputs(B=2, H=4, heads=2, group=4, L=33, D=16, dtype=torch.float32, device="cpu"):
    q = torch.randn(B, group, H, D, device=device).to(dtype).transpose(1, 2)
    k, v = torch.randn(2, B, heads, group, D, device=device).to(dtype).unbind()
    k_cache, v_cache = torch.randn(2, B, heads, L + 7, D, device=device).to(dtype)[:, :, :, :L].unbind()
    return q, k, v, k_cache, v_cache


def check(tensors, lengths, dtype):
    """Roundings: of each part's output and of the merged one; exponentials of 20 bits in PyTorch's flash attention; on
    GPUs float32 is three products of TF32, which keep 21 bits of 24."""
    D = tensors[0].shape[-1]
    exact = two_stream_decode_reference(*(t.double() for t in tensors), lengths, D**-0.5)
    ours = two_stream_decode(*tensors, cache_lengths=lengths)
    units = 4 if dtype.itemsize == 2 else 128 if ours.is_cuda and dtype == torch.float32 else 16
    band = units * EPSILON[dtype] * (1 + exact.abs().max())
    assert ours.dtype == dtype and ours.shape == exact.shape and ours.transpose(1, 2).is_contiguous()
    assert (ours.double() - exact).abs().max() <= band


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [None, [0, 33], [5, 20]])
@pytest.mark.parametrize("sizes", [dict(), dict(group=1), dict(H=3, heads=3, group=40), dict(L=0), dict(H=6, heads=1)])
def test_against_float64(sizes, lengths, dtype):
    tensors = inputs(**sizes, dtype=dtype)
    lengths = None if lengths is None else torch.tensor(lengths).clamp(max=tensors[3].shape[2])
    check(tensors, lengths, dtype)


@pytest.mark.parametrize("group_size", [1, 4])
def test_is_the_last_group_of_two_streams(group_size):
    streams = [t.detach() for t in example(N=40, dtype=torch.float64)]
    whole = two_stream_attention(*streams, group_size=group_size)[1]
    for first in (0, 12, 36):
        own = [t[:, :, first : first + group_size] for t in streams[3:]]
        cached = [t[:, :, :first] for t in streams[1:3]]
        torch.testing.assert_close(two_stream_decode(*own, *cached), whole[:, :, first : first + group_size])
    lengths = torch.tensor([12, 12])
    own = [t[:, :, 12 : 12 + group_size] for t in streams[3:]]
    out = two_stream_decode(*own, *streams[1:3], cache_lengths=lengths)
    torch.testing.assert_close(out, whole[:, :, 12 : 12 + group_size])


def test_opcheck_compile_and_empty():
    tensors = inputs()
    op = torch.ops.dbkernels.two_stream_decode.default
    torch.library.opcheck(op, (*tensors, torch.tensor([3, 20]), 0.25))
    compiled = torch.compile(two_stream_decode, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), two_stream_decode(*tensors))
    assert two_stream_decode(*inputs(B=0)).shape == (0, 4, 4, 16)
    assert two_stream_decode(*(t.to("meta") for t in inputs(D=64))).shape == (2, 4, 4, 64)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(cache_lengths=torch.tensor([3])), r"cache_lengths must be \(2,\)"),
        (dict(cache_lengths=torch.tensor([3, 34])), "cache_lengths go from 3 to 34, and the cache holds 33"),
        (dict(scale=float("inf")), "scale=inf"),
        (dict(scale=0.0), "scale=0.0 must be positive"),
        (dict(k_cache=torch.zeros(2, 2, 33, 8)), r"k_cache must be \(B, H_kv, L, D\)"),
        (dict(v_cache=torch.zeros(2, 2, 33, 16).half()), "v_cache is torch.float16"),
        (dict(k_noisy=torch.zeros(2, 2, 5, 16)), "v_noisy has shape"),
        (dict(q_noisy=torch.zeros(2, 4, 4, 16, requires_grad=True)), "isn't differentiable"),
    ],
)
def test_errors_name_the_argument(change, words):
    given = dict(zip(("q_noisy", "k_noisy", "v_noisy", "k_cache", "v_cache"), inputs(), strict=True))
    with pytest.raises(ValueError, match=words):
        two_stream_decode(**{**given, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(dict(L=3000), marks=pytest.mark.smoke),
        dict(group=1, L=700, H=8, heads=1),
        dict(group=40),
        dict(L=0),
    ],
)
def test_gpu_against_float64(sizes, dtype):
    for D in (64, 128):
        tensors = inputs(**sizes, D=D, dtype=dtype, device="cuda")
        check(tensors, None, dtype)
        check(tensors, torch.tensor([0, tensors[3].shape[2]], device="cuda"), dtype)
