"""Language models in blocks under lm-evaluation-harness: log-likelihoods are the models' own."""

from __future__ import annotations

import types

import pytest
import torch

import tiny_transformers as tiny

pytest.importorskip("lm_eval")
tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
from diffusionblocks.integrations.lm_eval import BlocksLM  # noqa: E402

LETTERS = "abcdefghijklmnop"


def tokenizer():
    """Return a tokenizer of letters, all of the network's tokens but the last four."""
    model = tokenizers.models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="p")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="a")


def wrapped(name, **options):
    return BlocksLM(tiny.convert(tiny.network(name), 2, **options).eval(), tokenizer(), max_length=8)


def asked(*args):
    return types.SimpleNamespace(args=args)


def test_blocks_without_z_are_read_exactly():
    lm = wrapped("LlamaForCausalLM", cond=0)
    assert lm.likelihood == "exact"
    (total, greedy), *_ = lm.loglikelihood([asked("bcd", "efg")], disable_tqdm=True)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    told = lm.model.logits(ids[:, :-1])[0, 2:].double().log_softmax(-1)
    assert total == pytest.approx(float(told.gather(1, ids[0, 3:, None]).sum()), rel=1e-5) and not greedy
    best = lm.generate_until([asked("bcd", {"until": [], "max_gen_toks": 1})])[0]
    if best:  # an end of text is none
        assert lm.loglikelihood([asked("bcd", best)], disable_tqdm=True)[0][1]


def test_likelihoods_of_all_continuations_sum_to_one():
    for options in ({"cond": 0}, {}):
        lm = wrapped("LlamaForCausalLM", **options)
        every = [lm.score(torch.tensor([[1, 2, token]]), 1)[0] for token in range(tiny.VOCAB)]
        assert float(torch.tensor(every).exp().sum()) == pytest.approx(1, abs=1e-4)
    assert lm.likelihood == "first step"


def test_a_masked_model_has_a_bound_and_keeps_the_context():
    lm = wrapped("BertForMaskedLM")
    assert lm.likelihood == "bound"
    total, _ = lm.loglikelihood([asked("bcd", "efg")], disable_tqdm=True)[0]
    assert -40 < total < 0 and total == lm.loglikelihood([asked("bcd", "efg")], disable_tqdm=True)[0][0]
    lm.draws = 2000  # of one token the bound is its log-probability under all masks of it, to rounding
    one = lm.score(torch.tensor([[1, 2, 3, 4]]), 1)[0]
    z = torch.tensor([[1, 2, 3, lm.model.target.mask_id]])
    told = [lm.model.denoise(z[:, :0], z, t).raw[0, 3].double().log_softmax(-1)[4] for t in (0.25, 0.75)]
    assert one == pytest.approx(float(torch.stack(told).mean()), rel=0.1)


def test_windows_cover_a_long_text_once():
    lm = wrapped("LlamaForCausalLM", cond=0)
    text = "bcdefghijklmno"
    total = lm.loglikelihood_rolling([asked(text)])[0]
    ids = torch.tensor([[0, *lm.tok_encode(text)]])
    pieces = [lm.score(ids[:, :8], 7)[0], lm.score(ids[:, 7:15], 7)[0]]
    assert total == pytest.approx(sum(pieces), rel=1e-5)


def test_stops_end_what_is_written():
    lm = wrapped("LlamaForCausalLM", cond=0)
    free = lm.generate_until([asked("bc", {"until": [], "max_gen_toks": 5})])[0]
    if len(free) > 1:
        stop = free[1]
        assert lm.generate_until([asked("bc", {"until": [stop], "max_gen_toks": 5})])[0] == free.partition(stop)[0]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="writes no text"):
        BlocksLM(tiny.convert(tiny.network("ViTForImageClassification")), tokenizer())
    with pytest.raises(ValueError, match="needs tokenizer="):
        BlocksLM(tiny.convert(tiny.network("LlamaForCausalLM")))
    with pytest.raises(ValueError, match="100 tokens, the model 20"):
        BlocksLM(tiny.convert(tiny.network("LlamaForCausalLM")), range(100))
