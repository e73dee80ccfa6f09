"""Trained blocks as networks of their own class, which transformers saves and loads."""

from __future__ import annotations

import pytest
import torch

import diffusionblocks as db
import tiny_transformers as tiny

ALL = pytest.mark.parametrize("name", tiny.CLASSES)


def trained(name, folder, blocks=2, ema=0.0, **options):
    x, y = tiny.batch(name)
    model = tiny.convert(tiny.network(name), blocks, cond=0, **options)
    trainer = db.Trainer(model, lr=1e-2, device="cpu", offload="disk", folder=folder, visit=1, seed=0, ema=ema)
    for _ in range(4):
        trainer.step(x, y)
    return model.eval(), x, y


def reloaded(network, folder):
    """What another reader of transformers' files gets."""
    network.save_pretrained(folder)
    return type(network).from_pretrained(folder).eval()


def block_logits(model, block, x, y):
    """A block's logits; of masked tokens its denoiser's."""
    if isinstance(model.target, db.MaskedTarget):
        return model.denoise(x, torch.where(torch.arange(9) % 3 == 0, tiny.VOCAB, y), 0.5, block=block).raw
    return model.logits(x, block)


@ALL
@pytest.mark.parametrize("shared", ["shared", "per_block"])
@torch.no_grad()
def test_a_block_is_a_network_with_equal_outputs(name, shared, tmp_path):
    with torch.enable_grad():
        model, x, y = trained(name, tmp_path / "wait", shared=shared)
    blocks = [0] if name.startswith("ModernBert") else [0, 1]
    for block in blocks:
        network = reloaded(db.to_original(model, block), tmp_path / f"{block}")
        assert network.config.num_hidden_layers == 2
        found, expected = network(tiny.inputs(name, x, y)).logits, block_logits(model, block, x, y)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@ALL
@torch.no_grad()
def test_one_block_is_the_whole_network(name, tmp_path):
    with torch.enable_grad():
        model, x, y = trained(name, tmp_path / "wait", blocks=1)
    network = reloaded(db.to_original(model), tmp_path / "net")
    found = network(tiny.inputs(name, x, y)).logits
    torch.testing.assert_close(found, block_logits(model, 0, x, y), rtol=1e-4, atol=1e-5)
    untrained = tiny.network(name)(tiny.inputs(name, x, y)).logits
    assert not torch.allclose(found, untrained, atol=1e-3)


@pytest.mark.parametrize("name", ["DeiTForImageClassification", "GPT2LMHeadModel", "ModernBertForMaskedLM"])
def test_all_layers_of_several_blocks_come_with_a_warning(name, tmp_path):
    model, _, _ = trained(name, tmp_path)
    with pytest.warns(UserWarning, match="weren't trained to follow each other"):
        network = db.to_original(model)
    assert type(network).__name__ == name and network.config.num_hidden_layers == 4 and not network.training
    weights = network.state_dict()
    for part in model.parts():
        for key, t in model.part_weights(part).items():
            same = [w for w in weights.values() if w.shape == t.shape and torch.equal(w, t)]
            assert same or key == "target.table", key


def test_averages_are_given_back(tmp_path):
    model, _, _ = trained("LlamaForCausalLM", tmp_path, ema=0.9)
    key = "blocks.1.layers.0.layer.mlp.up_proj.weight"
    found = db.to_original(model, 1).model.layers[0].mlp.up_proj.weight
    with model.averages():
        assert torch.equal(found, model.part_weights("block_1")[key])
    assert not torch.equal(found, model.part_weights("block_1")[key])


def test_half_weights_come_back_as_halves():
    model = tiny.convert(tiny.network("ViTForImageClassification").bfloat16(), cond=0)
    assert {p.dtype for p in db.to_original(model, 1).parameters()} == {torch.bfloat16}


def test_a_saved_model_is_given_back(tmp_path):
    model, x, _ = trained("BertForSequenceClassification", tmp_path / "wait")
    model.save_pretrained(tmp_path / "model")
    ours, theirs = (db.to_original(m, 1)(x).logits for m in (model, db.load(tmp_path / "model")))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("name", "options", "block", "words"), [
    ("LlamaForCausalLM", {}, 0, "AdaLN conditioning, which LlamaForCausalLM has no place for: convert with cond=0"),
    ("ViTForImageClassification", dict(cond=0, shared="per_block"), None, "a stem and head of its own"),
    ("ViTForImageClassification", dict(cond=0), 2, "block"),
    ("ModernBertForMaskedLM", dict(cond=0), 1, "no place for model.layers.0.attn_norm.weight"),
])  # fmt: skip
def test_what_has_no_place_is_refused(name, options, block, words):
    with pytest.raises(ValueError, match=words):
        db.to_original(tiny.convert(tiny.network(name), **options), block)


def test_layers_scaled_by_their_place_are_refused():
    net = tiny.network("GPT2LMHeadModel", scale_attn_by_inverse_layer_idx=True)
    model = tiny.convert(net, cond=0)
    assert db.to_original(model, 0).config.n_layer == 2
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx"):
        db.to_original(model, 1)


@torch.no_grad()
def test_lists_by_layer_are_cut_with_the_layers():
    """SmolLM3 rotates by one of them, and attends by another."""
    net = tiny.network("SmolLM3ForCausalLM", use_sliding_window=True, sliding_window=3, layer_types=None)
    model, x = tiny.convert(net, (1, 3), cond=0).eval(), tiny.batch("SmolLM3ForCausalLM")[0]
    network = db.to_original(model, 1)
    assert network.config.no_rope_layers == net.config.no_rope_layers[1:]
    torch.testing.assert_close(network(x).logits, model.logits(x, 1), rtol=1e-4, atol=1e-5)


def test_layers_that_depend_on_their_place_in_another_way_are_refused(monkeypatch):
    model = tiny.convert(tiny.network("LlamaForCausalLM"), cond=0)
    attention = transformers_of_llama().LlamaAttention
    made = attention.__init__

    def scaled(self, config, layer_idx):
        made(self, config, layer_idx)
        self.scaling /= layer_idx + 1

    monkeypatch.setattr(attention, "__init__", scaled)
    with pytest.raises(ValueError, match=r"model\.layers\.2 depends on its place: as model\.layers\.0.*scaling is"):
        db.to_original(model, 1)


def transformers_of_llama():
    return pytest.importorskip("transformers.models.llama.modeling_llama")


def test_a_model_of_from_layers_is_no_original():
    layers = [torch.nn.Linear(8, 8)]
    model = db.from_layers(
        layers, stem=torch.nn.Linear(4, 8), head=torch.nn.Linear(8, 3), target=db.LabelTarget(3, 8), blocks=1
    )
    with pytest.raises(ValueError, match="a network of transformers, diffusers or timm"):
        db.to_original(model)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "ModernBertForMaskedLM", "LlamaForCausalLM"])
@torch.no_grad()
def test_untied_networks_are_given_back(name, tmp_path):
    network = tiny.network(name, tie_word_embeddings=False).eval()
    x, _ = tiny.batch("LlamaForCausalLM")
    back = reloaded(db.to_original(tiny.convert(network, 1, cond=0)), tmp_path)
    assert torch.equal(back(x).logits, network(x).logits)
