"""Filters and draws of tokens against their definitions."""

import math

import pytest
import torch

from diffusionblocks.noise import rng
from diffusionblocks.sampling import decoding


def test_temperature_and_top_k():
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    warm = decoding.filtered(logits, temperature=2.0)
    assert torch.equal(warm - warm[:, :1], (logits - logits[:, :1]) / 2)
    kept = decoding.filtered(logits, top_k=2).isfinite()
    assert kept.tolist() == [[True, False, True, False]]
    assert decoding.filtered(logits, top_k=9).isfinite().all()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_ties_keep_no_more_than_k(k):
    kept = decoding.filtered(torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [0.0] * 5]), top_k=k).isfinite()
    assert kept.sum(-1).tolist() == [k, k]
    assert (
        kept[0].nonzero().flatten().tolist() == [1, 2, 3][:k] and kept[1].nonzero().flatten().tolist() == [0, 1, 2][:k]
    )


@pytest.mark.parametrize("temperature", [1e-30, 1e-39, 1e-45, 1e-46, 1e-300, 5e-324])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}])
def test_cold_draws_take_the_likeliest_word(temperature, options):
    logits = torch.randn(50, 7) * 30
    cold = decoding.filtered(logits, temperature=temperature, **options)
    assert not cold.isnan().any()
    assert torch.equal(rng.draw(cold, seed=1), logits.argmax(-1))


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.81, 3), (1.0, 4)])
def test_top_p_keeps_the_fewest_that_reach_it(top_p, kept):
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log()
    finite = decoding.filtered(logits, top_p=top_p).isfinite()
    assert finite.sum() == kept and set(finite.nonzero().flatten().tolist()) == set([1, 3, 2, 0][:kept])


def test_draws_follow_the_distribution_and_repeat():
    logits = torch.tensor([0.1, 0.6, 0.3]).log().expand(20000, 3)
    tokens = rng.draw(logits, seed=3)
    shares = torch.bincount(tokens, minlength=3) / len(tokens)
    assert (shares - torch.tensor([0.1, 0.6, 0.3])).abs().max() < 4 * (0.25 / len(tokens)) ** 0.5
    assert torch.equal(tokens, rng.draw(logits, seed=3)) and not torch.equal(tokens, rng.draw(logits, seed=4))
    banned = decoding.filtered(logits, top_k=2)
    assert 0 not in rng.draw(banned, seed=3)


@pytest.mark.parametrize("word", [0, 1])
def test_draws_have_the_tail_of_improbable_words(word, monkeypatch):
    """A word of probability p wins where its exponential is smaller than the other's times p: at the smallest uniform,
    2^-47, for p down to some 2^-47."""

    def extreme(shape, **rest):
        uniforms = torch.full(shape, 1 - 2.0**-24)
        uniforms[..., word] = 2.0**-24
        return uniforms

    monkeypatch.setattr(rng.dbkernels, "philox_uniform", extreme)
    logits = torch.zeros(2, dtype=torch.float64)
    logits[word] = -46 * math.log(2)
    assert rng.draw(logits, seed=0) == word
    logits[word] = -60 * math.log(2)
    assert rng.draw(logits, seed=0) == 1 - word


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: decoding.filtered(torch.zeros(3), temperature=0.0), "temperature=0.0"),
        (lambda: decoding.filtered(torch.zeros(3), top_k=0), "top_k must be .* got 0"),
        (lambda: decoding.filtered(torch.zeros(3), top_p=1.5), "top_p=1.5"),
    ],
)
def test_errors_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words):
        call()
