"""transformers' networks as blocks: what they compute at the start, that blocks learn, that files give them back."""

from __future__ import annotations

import copy

import pytest
import torch

import diffusionblocks as db
import tiny_transformers as tiny
from diffusionblocks.convert.conditioning import Conditioned

ALL = pytest.mark.parametrize("name", tiny.CLASSES)
TIED = ["BertForMaskedLM", "LlamaForCausalLM", "GPT2LMHeadModel"]
# Each class in one of two ways, those whose embeddings and head are one tensor in both
WAYS = [("shared", "disk"), ("per_block", "cpu")]
TRAINED = [
    (name, *way) for i, name in enumerate(tiny.CLASSES) for j, way in enumerate(WAYS) if i % 2 == j or name in TIED
]


def shown(name, y):
    """The network's tokens as the blocks see them: masks have another id."""
    return torch.where(tiny.inputs(name, None, y) == tiny.MASK, tiny.VOCAB, y)


def run_through(model, name, x, y, *, silent=True):
    """Logits of all blocks' layers, one after another, at z = 0 (of masked tokens: what is shown)."""
    if silent:
        z = torch.zeros(*y.shape[: 1 if y.dim() == 1 else 2], getattr(model.target, "table", y).shape[-1])
    z = shown(name, y) if name in tiny.MASKED else z
    level = torch.full(tuple(model.target.level_shape(y)), 0.3)
    around = model.blocks[0].around(model.stem_head)
    tokens, cond = around.stem(x, z, level)
    for block in model.blocks:
        for layer in block.layers:
            tokens = layer(tokens, cond)
    return around.head(around.head.features(tokens), cond)


@ALL
@pytest.mark.parametrize("cond", [None, 0], ids=["conditioned", "plain"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_at_the_start_it_computes_what_the_network_does(name, cond, attention):
    net, (x, y) = tiny.network(name, attn_implementation=attention), tiny.batch(name)
    model = tiny.convert(net, cond=cond)
    assert sum(isinstance(m, Conditioned) for m in model.modules()) == (0 if cond == 0 else 4)
    torch.testing.assert_close(
        run_through(model, name, x, y), net(tiny.inputs(name, x, y)).logits, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", tiny.TEXT)
@torch.no_grad()
def test_padding_is_left_out(name):
    net, (x, y) = tiny.network(name), tiny.batch(name)
    x[::2, 6:] = 0
    expected = net(x, attention_mask=(x != 0).long()).logits
    torch.testing.assert_close(run_through(tiny.convert(net), name, x, y), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(net(x).logits, expected, atol=1e-3), "else the mask would make no difference"


@pytest.mark.parametrize("name", tiny.CAUSAL)
@torch.no_grad()
def test_a_next_token_is_read_from_those_before_it_and_its_own_z(name):
    model = tiny.convert(tiny.network(name), 1).eval()
    for layer in model.blocks[0].layers:
        layer.layer.linear.weight.normal_(0, 0.1)
    (x, _), z, level = tiny.batch(name), torch.randn(8, 8, 16), torch.zeros(8, 8)

    def differs(x_, z_):
        """At which places the block's features change."""
        found, before = (model.blocks[0](*given, level, model.stem_head).h for given in ((x_, z_), (x, z)))
        return (found != before).flatten(2).any(-1).any(0).tolist()

    moved, other = z.clone(), x.clone()
    moved[:, 4] += 1
    other[:, 5] = 1
    assert differs(x, moved) == [i == 4 for i in range(8)]
    assert differs(other, z) == [i >= 5 for i in range(8)]


@torch.no_grad()
def losses(model, x, y):
    """Each block's loss at the same noise every time."""
    return [sum(float(model.loss(b, x, y, seed=9, step=s).loss) for s in range(8)) for b in range(2)]


@pytest.mark.parametrize(("name", "shared", "offload"), TRAINED)
def test_blocks_learn_and_files_give_them_back(name, shared, offload, tmp_path):
    net, (x, y) = tiny.network(name), tiny.batch(name)
    before = copy.deepcopy(net.state_dict())
    model = tiny.convert(net, shared=shared)
    trainer = db.Trainer(model, lr=1e-2, device="cpu", offload=offload, folder=tmp_path / "wait", visit=1, seed=0)
    first = losses(model, x, y)
    for _ in range(24):
        trainer.step(x, y)
    assert all(after < 0.9 * start for after, start in zip(losses(model, x, y), first, strict=True))
    assert all(torch.equal(t, before[key]) for key, t in net.state_dict().items()), "the user's network stays"
    model.eval().save_pretrained(tmp_path / "model")
    again, found = db.load(tmp_path / "model"), model(x)
    assert torch.equal(found, again(x))
    assert found.shape == (*y.shape, tiny.VOCAB if y.dim() > 1 else tiny.LABELS)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "ModernBertForMaskedLM", "LlamaForCausalLM"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_network_of_another_dtype_trains_in_it(name, dtype, tmp_path):
    net, (x, y) = tiny.network(name), tiny.batch(name)
    plain, other = tiny.convert(net), tiny.convert(copy.deepcopy(net).to(dtype))
    other.load_state_dict(plain.state_dict())
    assert other.stem_head.stem.noise.rates.dtype == torch.float32, "halves would merge neighbouring noise levels"
    for block in range(2):
        ours, expected = (model.loss(block, x, y, seed=0, step=0).loss for model in (other, plain))
        close = 1e-5 if dtype == torch.float64 else 0.05
        assert float(ours.detach()) == pytest.approx(float(expected.detach()), rel=close)
        ours.backward()
        trained = [p for p in other.blocks[block].parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {dtype}
        before = [p.detach().clone() for p in trained]
        db.BlockAdamW(trained, lr=1e-2).step()
        assert any(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))
        assert all(p.isfinite().all() for p in trained)
    other.eval().save_pretrained(tmp_path)
    assert torch.equal(other(x), db.load(tmp_path)(x))


def test_under_autocast_masks_fit(tmp_path):
    net, (x, y) = tiny.network("Qwen3ForCausalLM"), tiny.batch("Qwen3ForCausalLM")
    trainer = db.Trainer(tiny.convert(net), lr=1e-2, device="cpu", precision="bfloat16", seed=0)
    assert all(trainer.step(x, y).loss.isfinite() for _ in range(4))


@pytest.mark.parametrize("name", TIED)
def test_tied_embeddings_stay_tied_and_are_counted_once(name):
    model = tiny.convert(tiny.network(name))
    stem, head = model.stem_head.stem.embedding.embeddings, model.stem_head.head
    words = stem.word_embeddings if name == "BertForMaskedLM" else stem
    assert head.linear.weight is words.weight
    model = tiny.convert(tiny.network(name), shared="per_block")
    weights = [block.stem_head.head.linear.weight for block in model.blocks]
    assert weights[0] is not weights[1] and torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForSequenceClassification"])
@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
def test_gradient_checkpointing_stays_on_and_changes_no_gradient(name):
    net, (x, y) = tiny.network(name), tiny.batch(name)
    gradients = []
    for on in (False, True):
        if on:
            net.gradient_checkpointing_enable()
        torch.manual_seed(1)  # of the new parts, then of dropout
        model = tiny.convert(net, shared="frozen").train()
        assert model.blocks[1].layers[0].layer.layer.gradient_checkpointing is on
        model.loss(1, x, y, seed=0, step=0).loss.backward()
        gradients.append([p.grad for p in model.blocks[1].parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_checkpointed_layers_change_no_loss():
    found = []
    for checkpoint_layers in (False, True):
        model, (x, y) = tiny.convert(tiny.network("Qwen3ForCausalLM")), tiny.batch("Qwen3ForCausalLM")
        trainer = db.Trainer(model, lr=1e-2, device="cpu", checkpoint_layers=checkpoint_layers, visit=1, seed=0)
        found.append([float(trainer.step(x, y).loss) for _ in range(6)])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_dropout_works_in_training_alone():
    net, (x, y) = tiny.network("GPT2LMHeadModel"), tiny.batch("GPT2LMHeadModel")
    model = tiny.convert(net)
    assert not model.training, "as the network was"
    assert losses(model, x, y) == losses(model, x, y)
    assert losses(model.train(), x, y) != losses(model, x, y)


def test_frozen_weights_stay_frozen():
    net = tiny.network("LlamaForCausalLM")
    net.model.embed_tokens.requires_grad_(False)
    model = tiny.convert(net, shared="per_block")
    assert not any(block.stem_head.head.linear.weight.requires_grad for block in model.blocks)


def test_texts_are_continued_token_by_token():
    x, y = tiny.batch("LlamaForCausalLM", size=32)
    model = tiny.convert(tiny.network("LlamaForCausalLM"), context=0.5)
    trainer = db.Trainer(model, lr=1e-2, device="cpu", seed=0)
    for _ in range(60):
        trainer.step(x, y)
    text = x[:8, :3]
    for _ in range(4):
        model.target.shape = (text.shape[1], 16)
        text = torch.cat([text, db.sample(model, text, steps=4, sampler="euler")[:, -1:]], 1)
    assert (text[:, 3:] == y[:8, 2:6]).float().mean() > 0.8, text


def test_the_way_of_attention_is_kept_in_files(tmp_path):
    model = tiny.convert(tiny.network("BertForMaskedLM", layers=2, attn_implementation="eager"))
    model.save_pretrained(tmp_path)
    again = db.load(tmp_path)
    assert again.stem_head.stem.embedding.additive
    assert again.blocks[0].layers[0].layer.layer.attention.self.config._attn_implementation == "eager"


def test_its_options_are_taken():
    net = tiny.network("ViTForImageClassification")
    model = tiny.convert(net, (1, 3), shared="per_block", overlap=0.1, cond=6, context=0.25)
    assert (model.shared, model.partition.overlap, model.context) == ("per_block", 0.1, 0.25)
    assert model.partition.layers == (1, 3) and model.blocks[1].layers[0].layer.linear.in_features == 6
    contexts = {
        name: tiny.convert(tiny.network(name)).context for name in (tiny.IMAGE[0], tiny.MASKED[0], tiny.CAUSAL[0])
    }
    assert list(contexts.values()) == [0.5, 0.0, 0.9]


@pytest.mark.parametrize(
    ("name", "asked_of_x"), [(tiny.IMAGE[0], True), (tiny.MASKED[0], False), (tiny.CAUSAL[0], True)]
)
def test_without_conditioning_labels_and_next_tokens_are_read_from_x_by_all_blocks(name, asked_of_x):
    model, (x, y) = tiny.convert(tiny.network(name), cond=0), tiny.batch(name)
    assert model.ensemble is asked_of_x and model.sees_z is not asked_of_x
    if asked_of_x:
        z = torch.zeros(len(x), *model.target.sample_shape(y))
        found = model.eval().denoise(x, z, model.partition.sigma_max).raw
        torch.testing.assert_close(found.softmax(-1), model.logits(x).softmax(-1))


@torch.no_grad()
def test_the_clean_stream_has_no_noise_level():
    model = tiny.convert(tiny.network("LlamaForCausalLM"))
    layer = model.blocks[0].layers[0]
    layer.layer.linear.weight.normal_(0, 0.1)
    layer.layer.linear.bias.normal_(0, 0.1)
    x, _ = tiny.batch("LlamaForCausalLM")
    tokens, cond = model.stem_head.stem(x, torch.zeros(8, 8, 16), torch.zeros(8, 8))
    clean, noisy = layer(tokens, cond).h.chunk(2, 1)
    plain = layer.layer.layer(tokens.h, **tokens.arguments["full_attention"])
    torch.testing.assert_close(clean, plain[:, :8], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(noisy, plain[:, 8:], atol=1e-2)


def test_a_large_vocabulary_has_a_narrow_codebook():
    net = tiny.network("LlamaForCausalLM", layers=1, vocab_size=300, hidden_size=160)
    assert tiny.convert(net, 1).target.table.shape == (300, 128)
