"""two_stream_attention against dense attention under the explicit mask in float64, and who really sees whom."""

import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st

from dbkernels import two_stream_attention, two_stream_attention_reference
from dbkernels import two_stream_cpu as cpu
from dbkernels.two_stream_attention import visible
from numerics import EPSILON
from two_streams import both_ways, dense, dense_mask, double, example

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [(37, 1), (37, 4), (150, 2), (150, 16), (150, 149), (150, 150), (300, 130), (1, 1), (256, 1), (261, 4)]


def check(streams, group_size, dtype, **options):
    """Ours is as near to float64 as dense attention in the same dtype is, but for roundings: in halves those of each
    part's output and of the merged one; in float32 and float64 some more, of sums over parts and of exponentials, which
    PyTorch's flash attention takes to 20 bits. Gradients of scores are small differences of numbers of order one. On
    GPUs float32 is three products of TF32, which keep 21 bits of 24."""
    upstream = torch.randn(2, *streams[3].shape, device=streams[3].device).to(dtype).unbind()
    exact = both_ways(dense(wide := double(streams), group_size, **options), wide, upstream)
    eager = both_ways(dense(streams, group_size, **options), streams, upstream)
    ours = both_ways(two_stream_attention(*streams, group_size=group_size, **options), streams, upstream)
    for a, b, c in zip(ours, eager, exact, strict=True):
        units = 4 if dtype.itemsize == 2 else 128 if a.is_cuda and dtype == torch.float32 else 16
        band = units * EPSILON[dtype] * (1 + float(c.detach().abs().max()))
        assert a.dtype == dtype and a.shape == c.shape
        error, plain = ((t.double() - c).abs().max().item() for t in (a, b))
        assert error <= 2 * plain + band, (error, plain, band)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "group_size"), SIZES)
def test_against_float64_forward_and_backward(N, group_size, dtype):
    check(example(N=N, dtype=dtype), group_size, dtype)


@pytest.mark.parametrize("group_size", [1, 4, 150])
@pytest.mark.parametrize("options", [dict(clean=False), dict(H=3, heads=3), dict(H=6, heads=1), dict(B=1, D=80)])
def test_every_option(options, group_size):
    check(example(N=150, **options), group_size, torch.float32, scale=0.3)


@given(
    B=st.integers(1, 3), heads=st.integers(1, 3), ratio=st.integers(1, 3), N=st.integers(1, 150), D=st.integers(1, 20),
    group=st.integers(1, 150), clean=st.booleans(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_any_shape(B, heads, ratio, N, D, group, clean, dtype, seed):
    torch.manual_seed(seed)
    check(example(B, heads * ratio, heads, N, D, dtype, clean=clean), min(group, N), dtype)


@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("clean", [True, False])
def test_sequences_of_any_lengths_are_as_each_alone(group_size, clean):
    ends = torch.tensor([0, 7, 7, 50, 200], dtype=torch.int32)
    streams = example(B=1, N=200, clean=clean)
    upstream = torch.randn(2, 1, 4, 200, 16).unbind()
    together = both_ways(two_stream_attention(*streams, group_size=group_size, cu_seqlens=ends), streams, upstream)
    exact = two_stream_attention_reference(*double(streams), group_size, 0.25, ends)
    assert (together[0].double() - exact[1 - clean]).abs().max() < 1e-5
    for begin, end in ((0, 7), (7, 50), (50, 200)):
        part = [None if t is None else t[:, :, begin:end].detach().requires_grad_() for t in streams]
        ups = [up[:, :, begin:end] for up in upstream]
        alone = both_ways(two_stream_attention(*part, group_size=min(group_size, end - begin)), part, ups)
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a[:, :, begin:end], b)


@pytest.mark.parametrize("group_size", [1, 4, 37])
def test_lse_is_of_the_scores_in_nats(group_size):
    streams = example(dtype=torch.float64)
    result = two_stream_attention(*streams, group_size=group_size, return_lse=True)
    q, k, _, q_noisy, k_noisy, _ = streams
    scores = torch.cat([q, q_noisy], 2) @ torch.cat([k, k_noisy], 2).repeat_interleave(2, 1).transpose(-1, -2) / 4
    expected = scores.masked_fill(~dense_mask(37, group_size), -torch.inf).logsumexp(-1)
    torch.testing.assert_close(torch.cat([result.lse, result.lse_noisy], 2), expected)
    assert not result.lse.requires_grad and result.out.requires_grad


def seen_by_perturbation(run, streams, which):
    """(queries, keys) bool: whose output changes when the key and value of token j of stream `which` change."""
    before = run(streams)
    changes = []
    for j in range(streams[1].shape[2]):
        moved = [t.detach().clone() for t in streams]
        for index in (1 + 3 * which, 2 + 3 * which):
            moved[index][:, :, j] += 1
        after = run(moved)
        changes.append([((a - b).abs().amax((0, 1, 3)) > 0) for a, b in zip(after, before, strict=True)])
    return [torch.stack([change[stream] for change in changes], 1) for stream in range(2)]


@pytest.mark.parametrize("group_size", [1, 3, 4, 12])
def test_who_sees_whom_by_changing_one_token(group_size):
    streams = [t.detach() for t in example(B=1, H=1, heads=1, N=12, dtype=torch.float64)]

    def run(tensors):
        return two_stream_attention(*tensors, group_size=group_size)

    clean, noisy, own = visible(12, group_size)
    of_clean, of_noisy = (seen_by_perturbation(run, streams, which) for which in range(2))
    assert torch.equal(of_clean[0], clean) and torch.equal(of_clean[1], noisy)
    assert not of_noisy[0].any() and torch.equal(of_noisy[1], own)


def test_the_perturbation_test_would_see_a_leak():
    """A plain causal mask over the concatenation shows each noisy token its own clean one: the answer."""
    streams = [t.detach() for t in example(B=1, H=1, heads=1, N=12, dtype=torch.float64)]

    def run(tensors):
        q, k, v = (torch.cat([tensors[i], tensors[i + 3]], 2) for i in range(3))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True).split(12, 2)

    assert seen_by_perturbation(run, streams, 0)[1].diagonal().all()


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("clean", [True, False])
def test_gradcheck(group_size, clean):
    streams = example(B=1, H=2, heads=1, N=7, D=4, dtype=torch.float64, clean=clean)
    leaves = [t for t in streams if t is not None]

    def run(*tensors):
        tensors = tensors if clean else (None, *tensors)
        return tuple(o for o in two_stream_attention(*tensors, group_size=group_size) if o is not None)

    assert torch.autograd.gradcheck(run, leaves)


def test_one_stream_alone_may_be_wanted():
    streams = example()
    exact = double(streams)
    for stream in range(2):
        ours = torch.autograd.grad(two_stream_attention(*streams)[stream].sum(), streams, allow_unused=True)
        expected = torch.autograd.grad(dense(exact, 1)[stream].sum(), exact, allow_unused=True)
        for a, b in zip(ours, expected, strict=True):
            wanted = torch.zeros_like(a, dtype=torch.float64) if b is None else b
            torch.testing.assert_close(a.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group_size", [1, 4])
def test_repeats_bit_for_bit_whatever_the_threads(group_size):
    streams = example(N=150, dtype=torch.bfloat16)
    upstream = torch.randn(2, 2, 4, 150, 16).to(torch.bfloat16).unbind()
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            runs.append(both_ways(two_stream_attention(*streams, group_size=group_size), streams, upstream))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("group_size", [1, 4])
def test_no_output_is_left_unwritten(group_size, monkeypatch):
    def poisoned(q):
        return torch.full((q.shape[0], q.shape[2], q.shape[1], q.shape[3]), torch.nan, dtype=q.dtype).transpose(1, 2)

    monkeypatch.setattr(cpu, "like_rows", poisoned)
    outs = two_stream_attention(*example(N=150), group_size=group_size, return_lse=True)
    assert all(out.isfinite().all() for out in outs)


def test_nan_reaches_all_who_see_it():
    """And, as in PyTorch's flash attention, some of its tile who don't: zero times NaN is NaN."""
    streams = [t.detach() for t in example(B=1, H=1, heads=1, N=300)]
    streams[2][:, :, 160] = torch.nan
    clean, noisy, _ = visible(300, 4)
    out, out_noisy = two_stream_attention(*streams, group_size=4)
    assert out.isnan().any(-1)[0, 0][clean[:, 160]].all() and out_noisy.isnan().any(-1)[0, 0][noisy[:, 160]].all()
    assert not out_noisy[:, :, :128].isnan().any()


def test_layout_joins_the_heads_without_a_copy():
    out, out_noisy = two_stream_attention(*example())
    for tensor in (out, out_noisy):
        assert tensor.transpose(1, 2).is_contiguous()


@pytest.fixture
def triton_alone():
    """Paths are chosen by time: so that a test knows what it tests, there is one."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


HEADS = [(N, group_size, D) for D in (32, 64, 80, 96, 128, 256) for N, group_size in ((300, 1), (261, 4))]
LENGTHS = [(37, 1, 64), (300, 16, 64), (300, 130, 64), (300, 300, 64)]
SMOKE = [pytest.param(200, 4, 64, marks=pytest.mark.smoke)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize(("N", "group_size", "D"), HEADS + LENGTHS + SMOKE)
@pytest.mark.parametrize("clean", [True, False])
def test_gpu_against_float64(N, group_size, D, dtype, clean, triton_alone):
    check(example(N=N, D=D, dtype=dtype, device="cuda", clean=clean), group_size, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:3])
@pytest.mark.parametrize(("N", "group_size", "D"), [(261, 1, 64), (300, 1, 128), (261, 4, 64), (300, 32, 128)])
@pytest.mark.parametrize("packed", [True, False])
def test_gpu_each_path_against_float64(N, group_size, D, dtype, packed):
    """Those of cuDNN too, forced: each part is rounded to the dtype before they are added."""
    from dbkernels.triton import two_stream_plans as plans

    given = [t.detach() if packed else t.detach().contiguous() for t in example(N=N, D=D, dtype=dtype, device="cuda")]
    exact = double(given)
    upstream = torch.randn(2, *given[3].shape, device="cuda").to(dtype).unbind()
    expected = both_ways(dense(exact, group_size), exact, upstream)
    options = plans.Options(group_size, D**-0.5, None)
    assert plans.unfit(*given[:4], None) is None
    for path in (plans.TRITON, plans.CLEAN, plans.BOTH)[: 3 if group_size == 1 else 2]:
        outs = plans.Forward(options, *given[:4]).run(path, *given)
        found = [*outs[:2], *plans.Backward(options, *given[:4]).run(path, *upstream, *given, *outs)]
        for a, b in zip(found, expected, strict=True):
            assert (a.double() - b).abs().max() <= 6 * EPSILON[dtype] * (1 + b.detach().abs().max()), path


@pytest.mark.gpu
@pytest.mark.smoke
def test_gpu_the_chosen_path_is_the_fastest_and_right():
    from dbkernels.two_stream_choice import two_stream_choice

    streams = example(B=2, H=4, heads=4, N=1024, D=64, dtype=torch.bfloat16, device="cuda")
    for choice in two_stream_choice(*streams):
        assert choice.name in choice.milliseconds and len(choice.milliseconds) + choice.reason.count(":") >= 3
        assert choice.name == min(choice.milliseconds, key=choice.milliseconds.get)
    check(streams, 1, torch.bfloat16)
    short = example(N=20, D=64, dtype=torch.bfloat16, device="cuda")
    assert two_stream_choice(*short).forward.name == "triton"


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", [1, 4])
def test_gpu_sequences_of_any_lengths(group_size):
    """float32 as three products of TF32: as in `check`."""
    ends = torch.tensor([0, 7, 7, 50, 400], dtype=torch.int32, device="cuda")
    streams = example(B=1, N=400, D=64, dtype=torch.float32, device="cuda")
    exact = double(streams)
    upstream = torch.randn(2, 1, 4, 400, 64, device="cuda").unbind()
    ours = both_ways(two_stream_attention(*streams, group_size=group_size, cu_seqlens=ends), streams, upstream)
    expected = both_ways(two_stream_attention_reference(*exact, group_size, 0.125, ends), exact, upstream)
    for a, b in zip(ours, expected, strict=True):
        assert (a.double() - b).abs().max() <= 2.0**-16 * (1 + b.abs().max())


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", [1, 4])
def test_gpu_repeats_bit_for_bit_where_asked_to(group_size):
    streams = example(N=700, D=64, dtype=torch.bfloat16, device="cuda")
    upstream = torch.randn(2, 2, 4, 700, 64, device="cuda").to(torch.bfloat16).unbind()
    torch.use_deterministic_algorithms(True)
    try:
        runs = [both_ways(two_stream_attention(*streams, group_size=group_size), streams, upstream) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    # The output may be cuDNN's, whose forward pass repeats.
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


@pytest.mark.gpu
def test_gpu_within_a_cuda_graph():
    streams = [t.detach() for t in example(N=256, D=64, dtype=torch.bfloat16, device="cuda")]
    expected = two_stream_attention(*streams, group_size=4)[1]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = two_stream_attention(*streams, group_size=4)[1]
    graph.replay()
    torch.testing.assert_close(out, expected)
