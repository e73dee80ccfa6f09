"""LoRA per block: trained, saved, given back as peft's folders, merged by peft."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch

import diffusionblocks as db
import tiny_transformers as tiny
from diffusionblocks.convert import registry

peft = pytest.importorskip("peft")
from diffusionblocks.integrations.peft import save_adapter  # noqa: E402

LLAMA, VIT = "LlamaForCausalLM", "ViTForImageClassification"
BOTH = pytest.mark.parametrize("name", [LLAMA, VIT])


def config(name, **values):
    return peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"] if name == VIT else None, **values
    )


def adapted(name, **values):
    network = tiny.network(name)
    network.add_adapter(config(name, **values))
    return network


def trained(name, folder, blocks=2, steps=4, **values):
    model = db.convert(adapted(name, **values), blocks, cond=0)
    trainer = db.Trainer(model, lr=1e-2, device="cpu", offload="disk", folder=folder, visit=1, seed=0, ema=0.9)
    for _ in range(steps):
        trainer.step(*tiny.batch(name))
    return model, trainer


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@BOTH
@torch.no_grad()
def test_a_block_is_an_adapter_on_its_network(name, tmp_path):
    with torch.enable_grad():
        model, _ = trained(name, tmp_path / "wait")
    model.eval()
    x, _ = tiny.batch(name)
    for block in range(2):
        save_adapter(model, tmp_path / f"{block}", block)
        base = db.to_original(db.convert(tiny.network(name), 2, cond=0), block)
        before = base(x).logits
        tuned = peft.PeftModel.from_pretrained(base, str(tmp_path / f"{block}")).eval()
        with model.averages():
            expected = model.logits(x, block)
        close(tuned(x).logits, expected)
        assert not torch.allclose(before, expected, atol=1e-3)
        close(tuned.merge_and_unload()(x).logits, expected)


@BOTH
@torch.no_grad()
def test_one_block_is_an_adapter_on_the_network(name, tmp_path):
    with torch.enable_grad():
        model, _ = trained(name, tmp_path / "wait", blocks=1, layers_to_transform=[1, 3])
    model.eval().peft_config["default"].base_model_name_or_path = "me/base"
    save_adapter(model, tmp_path / "adapter")
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "adapter")).base_model_name_or_path == "me/base"
    x, _ = tiny.batch(name)
    tuned = peft.PeftModel.from_pretrained(tiny.network(name), str(tmp_path / "adapter")).eval()
    with model.averages():
        close(tuned(x).logits, model.logits(x, 0))


@torch.no_grad()
def test_layers_of_a_block_are_numbered_from_its_own_first(tmp_path):
    with torch.enable_grad():
        model, _ = trained(LLAMA, tmp_path / "wait", layers_to_transform=[0, 3])
    save_adapter(model.eval(), tmp_path / "adapter", 1)
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "adapter")).layers_to_transform == [1]
    base = db.to_original(db.convert(tiny.network(LLAMA), 2, cond=0), 1)
    x, _ = tiny.batch(LLAMA)
    with model.averages():
        close(peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))(x).logits, model.logits(x, 1))


def test_a_block_without_an_adapter_is_not_saved(tmp_path):
    network = tiny.network(LLAMA)
    network.add_adapter(peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[0, 1]))
    model = db.convert(network, 2, cond=0)
    with pytest.raises(ValueError, match="block 1 has no adapter"):
        save_adapter(model, tmp_path / "adapter", 1)
    assert not (tmp_path / "adapter").exists()
    save_adapter(model, tmp_path / "adapter", 0)


def test_the_base_stays_and_has_no_state(tmp_path):
    model, trainer = trained(LLAMA, tmp_path)
    before = db.convert(tiny.network(LLAMA), 2, cond=0).state_dict()
    after = {key.replace(".base_layer", ""): t for key, t in model.state_dict().items()}
    assert all(torch.equal(t, after[key]) for key, t in before.items() if "extra" not in key)
    moved = {"lora" in key for part in trainer.offloader.parts for key in trainer.offloader.tensors(part)
             if not key.startswith("weight/")}  # fmt: skip
    assert moved == {True}


def test_resume_is_bit_exact(tmp_path):
    (_, trainer), (_, resumed) = trained(VIT, tmp_path / "a"), trained(VIT, tmp_path / "b", steps=0)
    trainer.save(tmp_path / "checkpoint")
    resumed.load(tmp_path / "checkpoint")
    batch = tiny.batch(VIT)
    assert [float(trainer.step(*batch).loss) for _ in range(3)] == [float(resumed.step(*batch).loss) for _ in range(3)]


@BOTH
def test_a_saved_model_is_loaded(name, tmp_path):
    model, _ = trained(name, tmp_path / "wait", lora_dropout=0.1)
    model.eval().save_pretrained(tmp_path / "model")
    loaded, (x, _) = db.load(tmp_path / "model"), tiny.batch(name)
    assert torch.equal(loaded(x), model(x))
    save_adapter(loaded, tmp_path / "adapter")


def test_adapters_take_the_dtype_of_the_network(tmp_path):
    network = peft.get_peft_model(tiny.network(LLAMA).bfloat16(), config(LLAMA)).get_base_model()
    assert len({p.dtype for p in network.parameters()}) == 2
    model = db.convert(network, 2, cond=0)
    assert {p.dtype for p in model.blocks.parameters()} == {torch.bfloat16}
    trainer = db.Trainer(model, device="cpu", offload="cpu", seed=0)
    trainer.step(*tiny.batch(LLAMA))
    assert any(key.startswith("master/") for key in trainer.offloader.tensors("block_0"))


@pytest.mark.parametrize(("change", "words"), [
    (lambda net: net.add_adapter(config(LLAMA), "other"), "delete all but the one"),
    (lambda net: net.disable_adapters(), "merged or disabled"),
    (lambda net: net.model.layers[1].self_attn.q_proj.merge(), "merged or disabled"),
    (lambda net: net.requires_grad_(False), "is_trainable=True"),
])  # fmt: skip
def test_adapters_that_cannot_be_trained_are_refused(change, words):
    network = adapted(LLAMA)
    change(network)
    with pytest.raises(ValueError, match=words):
        db.convert(network, 2, cond=0)


@pytest.mark.parametrize("values", [dict(init_lora_weights="pissa"), dict(trainable_token_indices=[3])])
def test_adapters_that_change_the_base_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        db.convert(adapted(LLAMA, **values), 2, cond=0)


def test_ranks_that_move_between_layers_are_refused():
    network = tiny.network(LLAMA)
    network.add_adapter(peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9))
    with pytest.raises(ValueError, match="AdaLoRA"):
        db.convert(network, 2, cond=0)


def test_what_modules_to_save_names_is_trained_too():
    shared = db.convert(adapted(VIT), 2, cond=0).parts()["shared"]
    assert {key for key, p in shared.named_parameters() if p.requires_grad} == {
        "stem_head.head.after.0.weight", "stem_head.head.after.0.bias"
    }  # fmt: skip


def test_what_modules_to_save_names_is_given_back():
    network = tiny.network(LLAMA, tie_word_embeddings=False)
    network.add_adapter(peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model = db.convert(network, 2, cond=0).eval()
    torch.nn.init.normal_(model.stem_head.head.after[0].weight)
    x, _ = tiny.batch(LLAMA, 2)
    for block in range(2):
        given_back = db.to_original(model, block)
        torch.testing.assert_close(given_back(x).logits, model.logits(x, block), rtol=1e-5, atol=1e-5)


def test_adapters_of_others_are_never_overwritten(tmp_path):
    model = db.convert(adapted(LLAMA), 2, cond=0)
    for _ in range(2):  # one's own are
        save_adapter(model, tmp_path / "own")
    (tmp_path / "file").write_text("mine")
    adapted(LLAMA).save_pretrained(tmp_path / "other")
    for _ in range(2):  # with its weights, then its config alone
        before = {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
        with pytest.raises(ValueError, match="an adapter that save_adapter didn't write"):
            save_adapter(model, tmp_path / "other")
        assert before == {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
        (tmp_path / "other" / "adapter_model.safetensors").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="file is a file: give a folder"):
        save_adapter(model, tmp_path / "file")


def test_an_adapter_on_the_head_is_refused():
    network = tiny.network(LLAMA, tie_word_embeddings=False)
    network.add_adapter(peft.LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match=r"lm_head has an adapter.*modules_to_save=\['lm_head'\]"):
        db.convert(network, 2, cond=0)


def test_an_adapter_needs_this_module(monkeypatch):
    monkeypatch.setattr(registry, "_CONVERTERS", {})
    with pytest.raises(ValueError, match=r"has an adapter: import diffusionblocks\.integrations\.peft first"):
        db.convert(adapted(LLAMA), 2, cond=0)


@pytest.mark.parametrize(("config", "words"), [
    (dict(num_virtual_tokens=2), "PromptTuningConfig: prompts"),
    (dict(adapter_len=2, adapter_layers=2), "AdaptionPromptConfig: prompts"),
])  # fmt: skip
def test_prompts_would_be_lost_and_are_refused(config, words):
    kind = peft.PromptTuningConfig if "num_virtual_tokens" in config else peft.AdaptionPromptConfig
    wrapped = peft.get_peft_model(tiny.network(LLAMA), kind(task_type="CAUSAL_LM", **config))
    with pytest.raises(ValueError, match=words):
        db.convert(wrapped, 2, cond=0)


def test_loading_an_adapter_needs_this_module_too(monkeypatch, tmp_path):
    db.convert(adapted(LLAMA), 2, cond=0).save_pretrained(tmp_path)
    monkeypatch.delitem(sys.modules, "diffusionblocks.integrations.peft")
    with pytest.raises(ValueError, match=r"the network has an adapter: import diffusionblocks\.integrations"):
        db.load(tmp_path)


@pytest.mark.parametrize(("change", "words"), [
    (lambda module: module.merge(), r"q_proj\.merged_adapters is \['default'\]"),
    (lambda module: module.set_scale("default", 5.0), r"q_proj\.scaling is"),
    (lambda module: module.enable_adapters(False), r"q_proj\.disable_adapters is True"),
])  # fmt: skip
def test_what_a_file_does_not_know_of_an_adapter_is_named(change, words, tmp_path):
    model = db.convert(adapted(LLAMA), 2, cond=0)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            change(module)
    with pytest.warns(UserWarning, match=words):
        model.save_pretrained(tmp_path)


def test_modules_to_save_are_no_change(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        db.convert(adapted(VIT), 2, cond=0).save_pretrained(tmp_path)


def test_single_tokens_are_refused():
    network = tiny.network(LLAMA)
    network.add_adapter(peft.TrainableTokensConfig(token_indices=[1, 2], target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="single tokens' embeddings"):
        db.convert(network, 2, cond=0)


def test_options_of_others_are_refused():
    with pytest.raises(TypeError, match="no option 'scheduler' for a LlamaForCausalLM, only shared,"):
        db.convert(adapted(LLAMA), 2, scheduler={})


def test_a_peft_model_is_refused_by_name():
    with pytest.raises(TypeError, match="get_base_model"):
        db.convert(peft.get_peft_model(tiny.network(LLAMA), config(LLAMA)), 2)


@pytest.mark.parametrize(("make", "block", "words"), [
    (lambda: db.convert(tiny.network(LLAMA), 2, cond=0), None, "of a network with an adapter"),
    (lambda: db.convert(adapted(LLAMA), 2), 0, "AdaLN"),
    (lambda: db.convert(adapted(VIT), 2, cond=0, shared="per_block"), None, "block=..."),
    (lambda: db.convert(adapted(LLAMA), 2, cond=0), 2, "block"),
    (lambda: db.convert(adapted(LLAMA, rank_pattern={"layers.3.q_proj": 4}), 2, cond=0), 1, "numbers layers"),
    (
        lambda: db.convert(adapted(LLAMA, exclude_modules=["layers.1.self_attn.q_proj"]), 2, cond=0), 1,
        "'layers.1.self_attn.q_proj' numbers layers",
    ),
])  # fmt: skip
def test_what_no_peft_folder_holds_is_refused(make, block, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        save_adapter(make(), tmp_path / "adapter", block)
    assert not (tmp_path / "adapter").exists()


def test_other_trained_weights_are_not_lost_in_silence(tmp_path):
    network = adapted(LLAMA)
    network.model.norm.requires_grad_(True)
    with pytest.raises(ValueError, match=r"stem_head.head.before.0.weight: trained, and no part of the adapter"):
        save_adapter(db.convert(network, 2, cond=0), tmp_path)
