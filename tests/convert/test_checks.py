"""Networks, options and batches that can't be converted or trained are refused, and the message says what to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import diffusionblocks as db
import tiny_transformers as tiny

VIT, BERT, MASKED, LLAMA = (
    "ViTForImageClassification",
    "BertForSequenceClassification",
    "BertForMaskedLM",
    "LlamaForCausalLM",
)


def without_layers(net):
    net.vit.layers = nn.ModuleList()


def two_layers(net):
    net.vit.layers = net.vit.layers[:2]


def without_norm(net):
    del net.vit.layernorm


def halved(net):
    net.vit.layernorm.half()


def another_head(net):
    net.classifier = nn.Linear(16, 7)


def sequence_as_head(net):
    net.classifier = nn.Sequential(nn.Linear(16, 5))


def away(net):
    net.lm_head.to("meta")


def quantized(net):
    net.is_quantized = True


def untied(net):
    net.lm_head.weight = nn.Parameter(net.lm_head.weight.detach().clone())


def attention(net):
    net.config._attn_implementation = "flash_attention_2"


def reentrant(net):
    net.gradient_checkpointing_enable({"use_reentrant": True})


@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
@pytest.mark.parametrize(("name", "change", "words"), [
    (VIT, without_layers, "has no layers at vit.layers or vit.encoder.layer: use from_layers"),
    (VIT, two_layers, "has 2 layers, its config says num_hidden_layers=4"),
    (VIT, without_norm, "has no vit.layernorm"),
    (VIT, halved, "weights of float16 and float32: make them one"),
    (VIT, another_head, "must be a torch.nn.Linear to config.num_labels=5 logits"),
    (VIT, sequence_as_head, "must be a torch.nn.Linear to config.num_labels=5 logits"),
    (LLAMA, away, "lm_head.weight is on the meta device"),
    (LLAMA, quantized, "quantized weights aren't trained"),
    (LLAMA, untied, "embeddings and lm_head are two: call network.tie_weights"),
    (LLAMA, attention, "set_attn_implementation\\('sdpa'\\)"),
    (LLAMA, reentrant, "reentrant"),
])  # fmt: skip
def test_networks_that_were_changed(name, change, words):
    net = tiny.network(name, **({"tie_word_embeddings": change is untied} if name == LLAMA else {}))
    change(net)
    with pytest.raises(ValueError, match=words):
        tiny.convert(net)


@pytest.mark.parametrize(("name", "config", "options", "words"), [
    (VIT, dict(num_labels=1), {}, "num_labels=1 is no classifier of single labels"),
    (BERT, dict(problem_type="multi_label_classification"), {}, "problem_type='multi_label_classification'"),
    (BERT, dict(is_decoder=True), {}, "is_decoder or add_cross_attention"),
    ("GPT2LMHeadModel", dict(add_cross_attention=True), {}, "is_decoder or add_cross_attention"),
    (LLAMA, {}, dict(mask_token_id=3), "mask_token_id is for masked language models"),
    (VIT, {}, dict(blocks=5), "layers"),
    *((VIT, {}, dict(cond=cond), "cond must be a whole number of at least 0") for cond in (-1, True, 2.5)),
    (VIT, {}, dict(shared="some"), "shared must be one of"),
])  # fmt: skip
def test_configs_and_options(name, config, options, words):
    with pytest.raises(ValueError, match=words):
        db.convert(tiny.network(name, **config), **{"blocks": 2, **options})


@pytest.mark.parametrize("mask", [None, -1, tiny.VOCAB, "19", True])
def test_a_masked_language_model_needs_its_mask(mask):
    with pytest.raises(ValueError, match=r"mask_token_id=tokenizer\.mask_token_id"):
        db.convert(tiny.network(MASKED), blocks=2, mask_token_id=mask)


def test_a_head_that_is_not_listed():
    transformers = pytest.importorskip("transformers")
    net = transformers.BertForTokenClassification(transformers.BertConfig(**tiny.TEXTS, num_hidden_layers=1))
    with pytest.raises(
        TypeError, match=r"no converter for .*BertForTokenClassification; known beside it: BertForMaskedLM, "
    ):
        db.convert(net, blocks=1)
    with pytest.raises(TypeError, match=r"no converter for .*LlamaModel; known beside it: LlamaForCausalLM\. Load"):
        db.convert(tiny.network(LLAMA, layers=1).model, blocks=1)


@pytest.mark.parametrize("option", ["scheduler", "family", "share"])
def test_options_that_are_not_of_this_class(option):
    with pytest.raises(
        TypeError, match=rf"no option '{option}' for a ViTForImageClassification, only shared, overlap,"
    ):
        db.convert(tiny.network(VIT, layers=1), 1, **{option: 1})


IMAGE, TOKENS = torch.zeros(2, 3, 8, 8), torch.ones(2, 8, dtype=torch.int64)
PADDED = TOKENS.clone()
PADDED[1, 5:] = 0
LABELS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(("name", "config", "x", "y", "words"), [
    (VIT, {}, IMAGE[:, :, :4], LABELS, "images must be 8x8, got 4x8"),
    (VIT, {}, IMAGE[:, :1], LABELS, r"floating images \(B, 3, H, W\), got \(2, 1, 8, 8\)"),
    (VIT, {}, IMAGE.to(torch.uint8), LABELS, "floating images"),
    ("Dinov2ForImageClassification", {}, IMAGE[:, :, :6], LABELS, "6x8 images don't split into patches of 4x4"),
    (BERT, {}, TOKENS.float(), LABELS, "int64 tokens"),
    (BERT, {}, TOKENS + tiny.VOCAB, LABELS, "x's tokens must be in"),
    (BERT, {}, TOKENS.repeat(1, 2), LABELS, "16 tokens are more than the network's 12 position embeddings"),
    (MASKED, {}, TOKENS, TOKENS, r"given nothing: x must be \(B, 0\)"),
    (MASKED, {}, TOKENS[:, :0], TOKENS.repeat(1, 2), "16 tokens are more than"),
    (MASKED, {}, TOKENS[:, :0], PADDED, "hold padding .id 0.*pack texts into full windows"),
    (MASKED, {}, TOKENS[:, :0], torch.full_like(TOKENS, tiny.MASK), "the tokenizer's mask .id 19.*give whole texts"),
    (LLAMA, dict(pad_token_id=0), PADDED, TOKENS, "hold padding .id 0"),
    (LLAMA, {}, TOKENS, TOKENS[:, 1:], "x has 8 tokens, y or z 7: y holds the token after each"),
])  # fmt: skip
def test_batches(name, config, x, y, words):
    model = tiny.convert(tiny.network(name, layers=1, **config), 1)
    with pytest.raises(ValueError, match=words):
        model.loss(0, x, y)


def test_a_padding_id_that_ends_texts_is_text():
    net = tiny.network(LLAMA, layers=1, pad_token_id=2, eos_token_id=2)
    assert tiny.convert(net, 1).loss(0, 2 * TOKENS, TOKENS).loss.isfinite()


def test_dinov2_takes_images_of_other_sizes():
    model = tiny.convert(tiny.network("Dinov2ForImageClassification", layers=1), 1).eval()
    assert model(torch.randn(2, 3, 12, 8)).shape == (2, 5)


def test_z_has_a_point_for_each_token():
    model = tiny.convert(tiny.network(LLAMA, layers=1), 1).eval()
    with pytest.raises(ValueError, match="x has 5 tokens, y or z 8"):
        model.denoise(TOKENS[:, :5], torch.zeros(len(TOKENS), 8, 16), 1.0)
