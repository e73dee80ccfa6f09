"""What is changed about a converted model's modules afterwards: files and to_original leave it out, and say so."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import diffusionblocks as db
import tiny_diffusers
import tiny_transformers as tiny
from diffusionblocks.convert import left_out

pytest.importorskip("transformers")
LLAMA = "LlamaForCausalLM"


def layer_of(model):
    found = model.blocks[1].layers[0].layer
    return getattr(found, "layer", found)


def hooked(model):
    layer_of(model).register_forward_hook(lambda module, given, out: None)


def hooked_words(model):
    model.stem_head.stem.embedding.embeddings.register_forward_pre_hook(lambda module, given: None)


def another_norm(model):
    layer_of(model).input_layernorm = nn.LayerNorm(16, bias=False)


def replaced(model):
    model.stem_head.head.before[0].forward = lambda h: 2 * h


def another_number(model):
    layer_of(model).input_layernorm.variance_epsilon = 0.5


def untied(model):
    head = model.stem_head.head.linear
    head.weight = nn.Parameter(head.weight.detach().clone())


def other_angles(model):
    model.stem_head.stem.embedding.rotary.inv_freq.mul_(0.1)


def replaced_of_ours(model):
    model.stem_head.head.features = lambda tokens: 2 * tokens.h


@pytest.mark.parametrize("cond", [0, 8])
@pytest.mark.parametrize("change, words", [
    (hooked, r"a hook on blocks\.1\.layers\.0\.layer"),
    (hooked_words, r"a hook on stem_head\.stem\.embedding\.embeddings"),
    (another_norm, r"blocks\.1\.layers\.0\.layer.*input_layernorm is a LayerNorm, no LlamaRMSNorm"),
    (replaced, r"stem_head\.head\.before\.0\.forward was replaced"),
    (other_angles, r"the values of stem_head\.stem\.embedding\.rotary\.inv_freq"),
    (replaced_of_ours, r"stem_head\.head\.features was replaced"),
    (another_number, r"blocks\.1\.layers\.0.*input_layernorm\.variance_epsilon is 0\.5"),
])  # fmt: skip
def test_saving_warns_by_name(change, words, cond, tmp_path):
    model = db.convert(tiny.network(LLAMA), 2, cond=cond)
    change(model)
    with pytest.warns(UserWarning, match=words):
        model.save_pretrained(tmp_path)
    if cond == 0:
        with pytest.warns(UserWarning, match=words):
            db.to_original(model, 1)


@pytest.mark.parametrize("cond", [0, 8])
def test_a_layer_that_is_replaced_is_named(cond, tmp_path):
    model = db.convert(tiny.network(LLAMA), 2, cond=cond)
    model.blocks[1].layers[0] = nn.Identity()
    with pytest.warns(UserWarning, match=r"blocks\.1\.layers\.0\.layer is missing"):
        model.save_pretrained(tmp_path)


def test_weights_that_are_tied_no_more_are_named(tmp_path):
    """Both are in the file, and where it is loaded one would take the other's place."""
    model = db.convert(tiny.network(LLAMA), 2, cond=0)
    untied(model)
    with pytest.warns(UserWarning, match=r"lm_head\.weight and model\.embed_tokens\.weight are not tied"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("inside", [True, False])
def test_layers_compiled_after_convert_are_no_change(inside, tmp_path):
    model, (x, _) = db.convert(tiny.network(LLAMA), 2, cond=0).eval(), tiny.batch(LLAMA)
    expected = model.logits(x, 0)
    layers = model.blocks[0].layers
    if inside:
        layers[0].layer = torch.compile(layers[0].layer, backend="eager")
    else:
        layers[0] = torch.compile(layers[0], backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
        network = db.to_original(model, 0)
    assert torch.equal(db.load(tmp_path).logits(x, 0), expected)
    torch.testing.assert_close(network(x).logits, expected, rtol=1e-5, atol=1e-6)


def test_hooks_of_the_libraries_themselves_are_no_change(tmp_path):
    net = tiny.network(LLAMA)
    net.enable_input_require_grads()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        db.convert(net, 2, cond=0).save_pretrained(tmp_path)


def test_dropout_that_is_changed_is_named(tmp_path):
    model = db.convert(tiny.network("BertForSequenceClassification"), 2)
    layer_of(model).output.dropout.p = 0.75
    with pytest.warns(UserWarning, match=r"output\.dropout\.p is 0\.75"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("name", [LLAMA, "ViTForImageClassification", "BertForMaskedLM", "GPT2LMHeadModel"])
@pytest.mark.parametrize("shared", ["shared", "per_block"])
def test_training_and_moving_change_nothing_of_that(name, shared, tmp_path):
    model = tiny.convert(tiny.network(name), shared=shared)
    trainer = db.Trainer(model, device="cpu", offload="disk", folder=tmp_path / "waiting", visit=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            trainer.step(*tiny.batch(name))
        model.save_pretrained(tmp_path / "model")
        db.load(tmp_path / "model").save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("name", tiny_diffusers.CLASSES)
def test_of_diffusers_too(name, tmp_path):
    model = db.convert(tiny_diffusers.network(name), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    next(m for m in model.stem_head.stem.children()).register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"a hook on stem_head\.stem"):
        model.save_pretrained(tmp_path)


def test_compiled_layers_have_plain_names_in_files(tmp_path):
    net = tiny.network(LLAMA)
    net.model.layers[1] = torch.compile(net.model.layers[1], backend="eager")
    model, (x, _) = db.convert(net, 2, cond=0), tiny.batch(LLAMA)
    model.eval().save_pretrained(tmp_path)
    plain = db.load(tmp_path)
    assert torch.equal(plain.logits(x, 0), model.logits(x, 0))
    again = db.load(tmp_path, db.convert(net, 2, cond=0))
    assert torch.equal(again.logits(x, 0), model.logits(x, 0))
    torch.testing.assert_close(db.to_original(model, 0)(x).logits, model.logits(x, 0), rtol=1e-5, atol=1e-6)


def test_a_network_that_cannot_be_compared_is_saved_and_its_hooks_named(monkeypatch, tmp_path):
    def fail(*given, **options):
        raise RuntimeError("the first values of these adapters need the weights")

    model = db.convert(tiny.network(LLAMA), 2, cond=0)
    hooked(model)
    monkeypatch.setattr(left_out, "weightless", fail)
    with pytest.warns(UserWarning, match="a hook on blocks"):
        model.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert torch.equal(db.load(tmp_path).logits(tiny.batch(LLAMA)[0]), model.eval().logits(tiny.batch(LLAMA)[0]))
