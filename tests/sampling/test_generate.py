"""Texts by language models in blocks: the caches change nothing, and what ends a text ends it."""

from __future__ import annotations

import functools

import pytest
import torch

import diffusionblocks as db
import tiny_transformers as tiny
from diffusionblocks.convert.conditioning import Conditioned
from diffusionblocks.sampling.decoding import filtered
from diffusionblocks.sampling.generate import Writer

pytest.importorskip("transformers")
MODEL = tiny.convert(tiny.network("LlamaForCausalLM", layers=1), 1, cond=0)
EVERY = functools.partial(filtered, temperature=1.0)


def converted(name, blocks=2, **options):
    """Return a converted network whose conditioning does something."""
    model = tiny.convert(tiny.network(name), blocks, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Conditioned):
                module.linear.weight.normal_(std=0.2)
    return model.eval()


@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_caches_change_nothing(name):
    model = converted(name)
    x, _ = tiny.batch(name, 3)
    writer = Writer(model, [1.0, 0.0], EVERY, seed=0)
    for n in (3, 4, 6):  # the cache grows by one token, and by several
        for block in (0, 1):
            z = torch.randn(3, n, model.target.table.shape[1])
            sigma = float(model.partition.owned(block).high)
            whole = model.denoise(x[:, :n], z, sigma, block=block).raw[:, -1:]
            level = torch.full((3, 1), sigma)
            logits = writer.denoise(block, x[:, :n], z[:, -1:], level)
            alone = model.target.posterior(logits, z[:, -1:], level).raw
            torch.testing.assert_close(alone, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_one_unconditioned_block_writes_what_the_network_writes(name):
    network = tiny.network(name)
    x, _ = tiny.batch(name, 3)
    written = db.generate(tiny.convert(network, 1, cond=0), x[:, :4], max_new_tokens=6, top_k=1)
    network.generation_config.eos_token_id = None
    expected = network.generate(x[:, :4], max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(written, expected)


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_blocks_write_alike_wherever_they_wait(offload):
    x, _ = tiny.batch("LlamaForCausalLM", 3)
    expected = db.generate(converted("LlamaForCausalLM"), x[:, :4], max_new_tokens=4, seed=3)
    model = converted("LlamaForCausalLM")
    trainer = db.Trainer(model, offload=offload, device="cpu")
    assert torch.equal(db.generate(model, x[:, :4], max_new_tokens=4, seed=3), expected)
    assert expected.shape == (3, 8) and torch.equal(expected[:, :4], x[:, :4])
    assert not torch.equal(db.generate(model, x[:, :4], max_new_tokens=4, seed=4), expected)
    trainer.step(*tiny.batch("LlamaForCausalLM", 3))


def test_texts_end():
    model = tiny.convert(tiny.network("LlamaForCausalLM"), 1, cond=0)
    x, _ = tiny.batch("LlamaForCausalLM", 4)
    free = db.generate(model, x[:, :2], max_new_tokens=8, top_k=1)
    eos = int(free[0, 4])
    ended = db.generate(model, x[:, :2], max_new_tokens=8, top_k=1, eos_token_id=eos, pad_token_id=7)
    for one, other in zip(ended.tolist(), free.tolist(), strict=True):
        end = other.index(eos, 2) + 1 if eos in other[2:] else len(one)
        assert one[:end] == other[: min(end, len(one))] and set(one[end:]) <= {7}
    either = db.generate(
        model, x[:, :2], max_new_tokens=8, top_k=1, eos_token_id=[eos, int(free[1, 4])], pad_token_id=7
    )
    assert either[1, 5:].tolist() == [7] * (either.shape[1] - 5)
    calls = []

    def stop(tokens, scores):
        calls.append(tokens.shape[1])
        return torch.full((4,), tokens.shape[1] >= 5)

    assert db.generate(model, x[:, :2], max_new_tokens=8, stopping_criteria=stop).shape == (4, 5) and calls == [3, 4, 5]


def test_masks_are_filled_and_the_rest_stays():
    model = tiny.convert(tiny.network("BertForMaskedLM"), 2)
    _, y = tiny.batch("BertForMaskedLM", 3)
    prompt = y[:, :4].clone()
    prompt[:, 1] = model.target.mask_id
    made = db.generate(model, prompt, max_new_tokens=3, steps=4)
    assert made.shape == (3, 7) and int(made.max()) < tiny.VOCAB
    assert torch.equal(made[:, [0, 2, 3]], y[:, [0, 2, 3]])
    tokenized = torch.where(prompt == model.target.mask_id, tiny.MASK, prompt)  # the mask as a tokenizer has it
    assert torch.equal(db.generate(model, tokenized, max_new_tokens=3, steps=4), made)
    eos = int(made[0, 4])
    ended = db.generate(model, prompt, max_new_tokens=3, steps=4, eos_token_id=[eos], pad_token_id=1)
    assert ended[0, 4] == eos and ended[0, 5:].tolist() == [1, 1]


def test_the_mask_itself_is_never_written():
    model = tiny.convert(tiny.network("BertForMaskedLM"), 2)
    with torch.no_grad():
        linear = model.stem_head.head.linear
        linear.bias[tiny.MASK] += 100  # by far the likeliest
    tokens = torch.ones(8, 2, dtype=torch.int64)
    for options in ({}, dict(top_k=1)):
        made = db.generate(model, tokens, max_new_tokens=6, steps=4, **options)
        assert not (made == tiny.MASK).any() and int(made.max()) < tiny.VOCAB
    model.target.shape = (6,)
    assert not (db.sample(model, torch.zeros(8, 0, dtype=torch.int64), steps=4) == tiny.MASK).any()


def test_other_lengths_than_those_trained_on():
    model = converted("LlamaForCausalLM")
    x, y = tiny.batch("LlamaForCausalLM", 4)
    model.loss(0, x, y)
    assert model(x[:2, :3]).shape == (2, 3, tiny.VOCAB) and db.sample(model, x[:2, :5], steps=2).shape == (2, 5)


@pytest.mark.parametrize(("options", "words"), [
    *((dict(top_k=k), "top_k must be a whole number of at least 1, or None for all") for k in (0, -1, 2.5, True)),
    *((dict(temperature=t), "temperature=.* must be positive") for t in (0.0, float("nan"), "1")),
    *((dict(top_p=p), r"top_p=.* must be in \(0, 1\]") for p in (0, "1")),
    *((dict(steps=s), "steps must be a whole number of at least 1") for s in (0, -3, 2.5)),
    *((dict(max_new_tokens=n), "max_new_tokens must be a whole number") for n in (0, True, 2.0)),
    *((dict(eos_token_id=i), "eos_token_id must be among the model's 20 tokens") for i in ("a", 2.5, True, [3, 20])),
    (dict(attention_mask=torch.ones(2, 3)), r"attention_mask must be of the tokens' shape \(2, 2\), got \(2, 3\)"),
    (dict(attention_mask=torch.tensor([[0, 1], [1, 1]])), "attention_mask hides tokens: prompts must be of one"),
])  # fmt: skip
def test_arguments_that_do_not_fit_are_refused_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        db.generate(MODEL, torch.ones(2, 2, dtype=torch.int64), **{"max_new_tokens": 1, **options})


def test_a_mask_that_hides_nothing_is_taken():
    x = torch.ones(2, 2, dtype=torch.int64)
    made = [db.generate(MODEL, x, max_new_tokens=1, attention_mask=mask) for mask in (None, torch.ones_like(x))]
    assert torch.equal(*made)


def test_what_writes_no_text_is_refused():
    x, _ = tiny.batch("LlamaForCausalLM", 2)
    model = converted("LlamaForCausalLM")
    with pytest.raises(ValueError, match="writes no text"):
        db.generate(tiny.convert(tiny.network("ViTForImageClassification")), x, max_new_tokens=1)
    with pytest.raises(ValueError, match="prompts"):
        db.generate(model, x[:, :0], max_new_tokens=1)
    with pytest.raises(ValueError, match="x's tokens"):
        db.generate(model, x + 30, max_new_tokens=1)
    with pytest.raises(TypeError, match="must be DiffusionBlocks, from convert, got LlamaForCausalLM"):
        db.generate(tiny.network("LlamaForCausalLM", layers=1), x, max_new_tokens=1)
    with pytest.raises(TypeError, match="stopping_criteria must be a function"):
        db.generate(model, x, max_new_tokens=1, stopping_criteria=3)
    with pytest.raises(ValueError, match="stopping_criteria: a masked model writes all tokens at once"):
        db.generate(tiny.convert(tiny.network("BertForMaskedLM")), x, max_new_tokens=1, stopping_criteria=len)
    gpt = tiny.convert(tiny.network("GPT2LMHeadModel"))
    with pytest.raises(TypeError, match=r"give \.input_ids"):
        db.generate(model, {"input_ids": x}, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"max_new_tokens=8.*position embeddings"):
        db.generate(gpt, x, max_new_tokens=8)
