"""two_stream_attention and two_stream_decode whatever the memory layout, against the definition in float64."""

import pytest
import torch

from dbkernels import (
    two_stream_attention,
    two_stream_attention_reference,
    two_stream_decode,
    two_stream_decode_reference,
)
from two_streams import NAMES

B, H, N, D = 1, 2, 33, 8
LAYOUTS = {
    "contiguous": lambda: torch.randn(B, H, N, D),
    "columns before rows": lambda: torch.randn(B, H, D, N).transpose(2, 3),
    "every second column": lambda: torch.randn(B, H, N, 2 * D)[..., ::2],
    "one column, expanded": lambda: torch.randn(B, H, N, 1).expand(B, H, N, D),
    "one token, expanded": lambda: torch.randn(B, H, 1, D).expand(B, H, N, D),
    "tokens first": lambda: torch.randn(N, B, H, D).permute(1, 2, 0, 3),
}
GROUPS = (1, 4, N)


def check(streams, group_size, upstream):
    """float32 sums over a few dozen numbers of order one."""
    mine = [t.detach().requires_grad_() for t in streams]
    exact = [t.detach().double().requires_grad_() for t in streams]
    ours = two_stream_attention(*mine, group_size=group_size)
    true = two_stream_attention_reference(*exact, group_size, streams[0].shape[-1] ** -0.5)[:2]
    found = [*ours, *torch.autograd.grad(ours, mine, upstream)]
    expected = [*true, *torch.autograd.grad(true, exact, [t.double() for t in upstream])]
    for name, a, b in zip(("out", "out_noisy", *NAMES), found, expected, strict=True):
        assert (a.double() - b).abs().max() <= 1e-5 * (1 + b.abs().max()), name


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_six_tensors(layout, group_size):
    check([LAYOUTS[layout]() for _ in range(6)], group_size, torch.randn(2, B, H, N, D).unbind())


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("which", range(6))
def test_one_tensor_alone(which, group_size):
    streams = list(torch.randn(6, B, H, N, D).unbind())
    streams[which] = LAYOUTS["columns before rows"]()
    check(streams, group_size, torch.randn(2, B, H, N, D).unbind())


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_upstream_gradients(layout, group_size):
    check(torch.randn(6, B, H, N, D).unbind(), group_size, [LAYOUTS[layout]() for _ in range(2)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_decode(layout):
    given = [LAYOUTS[layout]() for _ in range(5)]
    exact = two_stream_decode_reference(*(t.double() for t in given), None, D**-0.5)
    assert (two_stream_decode(*given).double() - exact).abs().max() <= 1e-5 * (1 + exact.abs().max())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_decode_of_a_cache_filled_in_part(layout):
    given = [LAYOUTS[layout]() for _ in range(5)]
    lengths = torch.tensor([7])
    exact = two_stream_decode_reference(*(t.double() for t in given), lengths, D**-0.5)
    ours = two_stream_decode(*given, cache_lengths=lengths)
    assert (ours.double() - exact).abs().max() <= 1e-5 * (1 + exact.abs().max())


@pytest.mark.parametrize("reference", [True, False])
def test_decode_never_shows_what_a_cache_holds_beyond_its_length(reference):
    """An unfilled cache may hold NaN, and 0 times NaN is NaN."""
    q, k, v = torch.randn(3, 2, H, 4, D).unbind()
    k_cache, v_cache = torch.randn(2, 2, H, 20, D).unbind()
    lengths = torch.tensor([3, 12])
    run = two_stream_decode_reference if reference else lambda *t: two_stream_decode(*t[:5], cache_lengths=t[5])
    rest = (lengths, D**-0.5) if reference else (lengths,)
    expected = run(q, k, v, k_cache, v_cache, *rest)
    for cache in (k_cache, v_cache):
        for b, length in enumerate(lengths.tolist()):
            cache[b, :, length:] = torch.nan
    assert torch.equal(run(q, k, v, k_cache, v_cache, *rest), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["columns before rows", "every second column", "one token, expanded"])
def test_gpu_layouts(layout):
    """float32 as three TF32 products keeps some 21 bits; sums over 33 keys and 32 columns."""
    width = 32
    makers = {
        "columns before rows": lambda: torch.randn(B, H, width, N, device="cuda").transpose(2, 3),
        "every second column": lambda: torch.randn(B, H, N, 2 * width, device="cuda")[..., ::2],
        "one token, expanded": lambda: torch.randn(B, H, 1, width, device="cuda").expand(B, H, N, width),
    }
    check([makers[layout]() for _ in range(6)], 4, torch.randn(2, B, H, N, width, device="cuda").unbind())
