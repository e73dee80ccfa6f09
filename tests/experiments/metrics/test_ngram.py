"""The judge: probabilities that sum to one, and Witten-Bell by hand."""

from __future__ import annotations

import math

import pytest
import torch

from diffusionblocks.experiments.data.text import TextData
from diffusionblocks.experiments.data.vocabulary import Characters
from diffusionblocks.experiments.metrics.language import judged
from diffusionblocks.experiments.metrics.ngram import NGram


@pytest.mark.parametrize("context", ["", "a", "ab", "zz", "ba"])
def test_probabilities_sum_to_one(context):
    judge = NGram("abacabad", order=2, vocab_size=6)
    assert sum(judge.probability(context, symbol) for symbol in "abcdyz") == pytest.approx(1)


def test_witten_bell_by_hand():
    judge = NGram("aab", order=1, vocab_size=4)
    unigram = (2 + 2 * 0.25) / (3 + 2)  # "a" twice of 3, 2 kinds
    assert judge.probability("", "a") == pytest.approx(unigram)
    assert judge.probability("a", "a") == pytest.approx((1 + 2 * unigram) / (2 + 2))
    assert judge.probability("b", "a") == pytest.approx(unigram), "nothing came after b"
    assert judge.bits("aa") == pytest.approx(-(math.log2(unigram) + math.log2((1 + 2 * unigram) / 4)) / 2)
    with pytest.raises(ValueError, match="empty"):
        judge.bits("")


def test_loops_are_likely_and_told_by_distinct_2():
    alphabet = "ab cdehlort�"
    train = Characters(alphabet).encode("the cat ate the red hat or the old bed " * 30)
    data = TextData(train, train[:50], train[200:400], Characters(alphabet))
    loop = train[:39].repeat(5)[:160].view(2, 80)
    mixed = torch.randint(len(alphabet), (2, 80), generator=torch.Generator().manual_seed(0))
    bits = {name: judged(data, tokens) for name, tokens in {"loop": loop, "mixed": mixed}.items()}
    assert bits["loop"]["judge_bits"] < 1.5 < bits["mixed"]["judge_bits"]
    assert bits["loop"]["distinct_2"] < 0.5 * bits["mixed"]["distinct_2"]
    assert bits["loop"]["judge_test_bits"] < 1
