"""A network that files couldn't give back is refused when it is converted; what changes no value is taken."""

from __future__ import annotations

import types
from typing import ClassVar

import pytest
import torch
from torch import nn

import diffusionblocks as db
import tiny_diffusers
import tiny_transformers as tiny

transformers = pytest.importorskip("transformers")
LLAMA = "LlamaForCausalLM"


def _doubled(self, h):
    return 2 * h


class Doubling(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Named(transformers.LlamaForCausalLM):
    tag: ClassVar[str] = "a class of one's own that computes the same"


class Norm(transformers.models.llama.modeling_llama.LlamaRMSNorm):
    def forward(self, h):
        return 2 * super().forward(h)


def with_bias(net):
    net.lm_head.bias = nn.Parameter(torch.zeros(tiny.VOCAB))


def another_activation(net):
    net.model.layers[1].mlp.act_fn = nn.ReLU()


def another_norm(net):
    net.model.norm = Norm(16)


def patched_norm(net):
    net.model.norm.forward = types.MethodType(_doubled, net.model.norm)


def another_eps(net):
    net.model.layers[2].input_layernorm.variance_epsilon = 0.5


def scaled_angles(net):
    net.model.rotary_emb.inv_freq *= 0.5


def halved_and_back(net):
    net.half().float()


def another_config(net):
    net.config.hidden_act = "relu"


def tied_projections(net):
    net.model.layers[1].mlp.up_proj.weight = net.model.layers[0].mlp.up_proj.weight


def hook_on_network(net):
    net.register_forward_hook(lambda *_: None)


def hook_on_model(net):
    net.model.register_forward_pre_hook(lambda *_: None)


def hook_on_head(net):
    net.lm_head.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(("change", "words"), [
    (with_bias, r"can't be built again; these differ: lm_head\.bias"),
    (another_activation, r"model\.layers\.1\.mlp\.act_fn is a ReLU, no SiLUActivation"),
    (another_norm, r"model\.norm is a Norm, no LlamaRMSNorm"),
    (patched_norm, r"model\.norm\.forward was replaced"),
    (another_eps, r"model\.layers\.2\.input_layernorm\.variance_epsilon is 0\.5, not 1e-06"),
    (scaled_angles, r"the values of model\.rotary_emb\.inv_freq"),
    (halved_and_back, r"the values of model\.rotary_emb\.inv_freq"),
    (another_config, r"mlp\.act_fn is a SiLUActivation, no ReLU"),
    (tied_projections, r"layers\.0\.mlp\.up_proj\.weight and model\.layers\.1\.mlp\.up_proj\.weight are tied"),
    (hook_on_network, "LlamaForCausalLM has a hook, which would be lost.*put it on a layer, or remove it"),
    (hook_on_model, "model has a hook, which would be lost"),
    (hook_on_head, "lm_head has a hook, and the loss takes its plain weight"),
])  # fmt: skip
@torch.no_grad()
def test_what_files_cannot_hold_is_refused(change, words):
    net = tiny.network(LLAMA)
    change(net)
    with pytest.raises(ValueError, match=words):
        db.convert(net, 2)


def test_a_forward_of_its_own_needs_a_converter_of_its_own():
    config = tiny.network(LLAMA, layers=1).config
    with pytest.raises(TypeError, match=r"Doubling has a forward of its own.*@register\(Doubling\) a converter"):
        db.convert(Doubling(config), 1)
    assert db.convert(Named(config), 1).origin["kind"].endswith(LLAMA)


def test_what_changes_no_value_is_taken():
    net = tiny.network(LLAMA)
    net.gradient_checkpointing_enable()
    net.enable_input_require_grads()
    net.set_attn_implementation("eager")
    net.config.pad_token_id, net.config.use_cache = 7, False
    net.resize_token_embeddings(tiny.VOCAB + 4)
    net.model.layers[0].register_forward_hook(lambda *_: None)
    net.train()(torch.ones(1, 3, dtype=torch.int64), output_hidden_states=True)
    assert len(db.convert(net, 2).blocks) == 2


def test_no_random_number_is_drawn_for_the_comparison():
    net = tiny.network("ViTForImageClassification", layers=1)
    torch.manual_seed(0)
    db.convert(net, 1, cond=0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    db.convert(net, 1, cond=0)
    assert torch.equal(torch.rand(1), expected)


def test_dropout_changed_by_hand_is_kept(tmp_path):
    net = tiny.network("BertForSequenceClassification")
    net.dropout.p = 0
    net.bert.encoder.layer[3].output.dropout.p = 0.75
    model = db.convert(net, 2, cond=0)
    model.save_pretrained(tmp_path)
    again = db.load(tmp_path)
    for made, layer in ((db.to_original(again), 3), (db.to_original(again, 1), 1)):
        assert made.dropout.p == 0
        assert [x.output.dropout.p for x in made.bert.encoder.layer] == [0.1] * layer + [0.75]


@pytest.mark.parametrize("way", ["from_pretrained", "to"])
@pytest.mark.parametrize(("tiny_ones", "name"), [(tiny, LLAMA), (tiny_diffusers, tiny_diffusers.DIT)])
def test_buffers_that_no_file_holds_keep_their_type(tiny_ones, name, way, tmp_path):
    net = tiny_ones.network(name)
    if way == "to":
        net = nn.Module.to(net, torch.bfloat16)
    else:
        net.save_pretrained(tmp_path / "net")
        net = type(net).from_pretrained(tmp_path / "net", dtype=torch.bfloat16)
    model = db.convert(net, 1, **({"cond": 0} if name == LLAMA else {}))
    model.save_pretrained(tmp_path / "blocks")
    again = db.load(tmp_path / "blocks")

    def buffers(module):
        return [t for key, t in module.named_buffers() if key.endswith(("inv_freq", "pos_embed"))]

    expected = buffers(net)
    assert {t.dtype for t in expected} == {torch.bfloat16 if way == "to" else torch.float32}
    for made in (again, db.to_original(again)):
        assert all(map(torch.equal, buffers(made), expected)) and len(buffers(made)) == len(expected)
