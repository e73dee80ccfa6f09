"""attention: the values, the choice of a library, and what it refuses."""

import pytest
import torch

from dbkernels import attention, attention_choice
from dbkernels._fastest import fastest


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [4, 2])
def test_against_the_formula(heads, causal):
    q, k, v = (torch.randn(2, h, 9, 8, dtype=torch.float64) for h in (4, heads, heads))
    scores = q @ k.repeat_interleave(4 // heads, 1).transpose(-1, -2) * 0.3
    if causal:
        scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    expected = scores.softmax(-1) @ v.repeat_interleave(4 // heads, 1)
    torch.testing.assert_close(attention(q, k, v, causal=causal, scale=0.3), expected)


def test_on_a_cpu_it_says_sdpa_and_why():
    choice = attention_choice(*torch.randn(3, 1, 2, 5, 8).unbind())
    assert choice.name == "sdpa" and "cpu" in choice.reason and not choice.milliseconds


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)), "q must be"),
        (((1, 3, 5, 4), (1, 2, 5, 4), (1, 2, 5, 4)), "doesn't fit k"),
        (((1, 2, 5, 4), (1, 2, 5, 4), (1, 2, 6, 4)), "v has shape"),
        (((1, 2, 5, 4), (1, 2, 6, 4), (1, 2, 6, 4)), "as many queries as keys"),
    ],
)
def test_shapes_that_do_not_fit(shapes, words):
    with pytest.raises(ValueError, match=words):
        attention(*(torch.zeros(s) for s in shapes), causal=True)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_would_unmask(scale):
    with pytest.raises(ValueError, match="must be positive and finite: for another sign, negate the queries"):
        attention(*torch.randn(3, 1, 2, 5, 8).unbind(), causal=True, scale=scale)


def test_only_floating_tensors():
    with pytest.raises(TypeError, match="k must be a floating tensor"):
        attention(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2).long(), torch.zeros(1, 1, 2, 2))


@pytest.mark.gpu
@pytest.mark.smoke
@pytest.mark.parametrize("causal", [False, True])
def test_gpu_takes_the_fastest_of_those_timed(causal):
    q, k, v = torch.randn(3, 2, 4, 256, 64, device="cuda", dtype=torch.bfloat16).unbind()
    choice = attention_choice(q, k, v, causal=causal)
    if choice.milliseconds:
        assert choice.name == min(choice.milliseconds, key=choice.milliseconds.get)
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
    assert (attention(q, k, v, causal=causal).double() - exact).abs().max() < 2.0**-6 * (1 + exact.abs().max())


def test_trials_are_hidden_from_a_callers_saved_tensors():
    """Checkpointing would find more tensors in the first forward pass than in its recomputation."""
    q, saved = torch.randn(1, 2, 5, 4, requires_grad=True), []

    def way():
        out = attention(q, q, q)
        return out, *torch.autograd.grad(out.sum(), q)

    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        assert fastest({"one": way, "other": way}, time=lambda call: float(len(call()))).name == "one"
        assert not saved
        attention(q, q, q)
    assert saved  # a positive control
