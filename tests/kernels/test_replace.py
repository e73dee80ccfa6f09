"""replace: what is swapped computes the same, what differs stays, and a call that changed nothing says so."""

import copy

import pytest
import torch
from torch import nn

from dbkernels import replace
from dbkernels._drop_in import DropInLayerNorm, DropInRMSNorm


class Offset(nn.Module):
    """A norm in the manner of Gemma: named like the others, but it scales by 1 + weight."""

    def __init__(self, dim):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.full((dim,), 0.5)), 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


class LlamaLikeRMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.linspace(0.5, 2, dim)), 1e-5

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


OffsetRMSNorm = type("OffsetRMSNorm", (Offset,), {})


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.LayerNorm(48),
        nn.Linear(48, 32),
        nn.Sequential(nn.LayerNorm(32, eps=1e-3, elementwise_affine=False), nn.GELU(), nn.RMSNorm(32)),
        LlamaLikeRMSNorm(32),
        nn.LayerNorm(32, bias=False),
    )


def test_the_model_computes_the_same_and_learns_the_same():
    model = network()
    before = copy.deepcopy(model)
    report = replace(model)
    assert [str(r) for r in report] == [
        "0: LayerNorm -> DropInLayerNorm (ada_layer_norm)",
        "2.0: LayerNorm -> DropInLayerNorm (ada_layer_norm)",
        "4: LayerNorm -> DropInLayerNorm (ada_layer_norm)",
        "2.2: RMSNorm -> DropInRMSNorm (ada_rms_norm)",
        "3: LlamaLikeRMSNorm -> DropInRMSNorm (ada_rms_norm)",
    ]
    x = torch.randn(5, 7, 48)
    out, was = model(x), before(x)
    torch.testing.assert_close(out, was, rtol=1e-5, atol=1e-5)
    out.square().mean().backward()
    was.square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_parameters_keep_identity_names_and_mode():
    model = network().eval()
    names, parameters = list(model.state_dict()), {id(p) for p in model.parameters()}
    replace(model)
    assert list(model.state_dict()) == names and {id(p) for p in model.parameters()} == parameters
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    model = network().to(dtype)
    assert len(replace(model)) == 5
    assert model(torch.randn(3, 48, dtype=dtype)).dtype == dtype


def test_only_the_named_op():
    model = network()
    replace(model, ops=["ada_rms_norm"])
    assert type(model[0]) is nn.LayerNorm and type(model[3]) is DropInRMSNorm


def test_a_norm_that_computes_something_else_stays():
    model = nn.Sequential(nn.RMSNorm(8), OffsetRMSNorm(8))
    assert [r.name for r in replace(model, ops="ada_rms_norm")] == ["0"]
    with pytest.raises(ValueError, match=r"nothing in the model matches ada_rms_norm.*OffsetRMSNorm"):
        replace(nn.Sequential(OffsetRMSNorm(8)), ops="ada_rms_norm")


def test_a_norm_with_hooks_or_over_two_dimensions_stays():
    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm((2, 8)))
    model[0].register_forward_hook(lambda module, args, out: out * 2)
    assert [r.name for r in replace(model, ops="ada_layer_norm")] == ["1"]


def test_one_module_in_two_places_stays_one():
    norm = nn.LayerNorm(8)
    model = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)})
    assert [r.name for r in replace(model, ops="ada_layer_norm")] == ["a", "b.0"]
    assert model["a"] is model["b"][0]


def test_nothing_changes_when_one_op_matches_nothing():
    model = nn.Sequential(nn.LayerNorm(8))
    with pytest.raises(ValueError, match="nothing in the model matches ada_rms_norm: its norms are LayerNorm"):
        replace(model, ops=["ada_layer_norm", "ada_rms_norm"])
    assert type(model[0]) is nn.LayerNorm


def test_without_ops_it_takes_whichever_match_and_raises_if_none_does():
    assert [r.op for r in replace(nn.Sequential(nn.LayerNorm(8), OffsetRMSNorm(8)))] == ["ada_layer_norm"]
    assert [r.op for r in replace(nn.Sequential(nn.RMSNorm(8)))] == ["ada_rms_norm"]
    with pytest.raises(ValueError, match=r"matches ada_layer_norm, ada_rms_norm: its norms are OffsetRMSNorm; remove"):
        replace(nn.Sequential(OffsetRMSNorm(8), nn.Linear(8, 8)))


class TimmLikeLayerNorm(nn.LayerNorm):
    """timm.layers.LayerNorm: a subclass with a switch for a faster call."""

    _fast_norm = False

    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class ChannelsFirst(nn.LayerNorm):
    """timm's LayerNorm2d: over the channels of images."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TimmLikeRmsNorm(LlamaLikeRMSNorm):
    """timm.layers.RmsNorm: another spelling."""


def test_subclasses_and_spellings_are_taken_where_they_compute_the_same():
    model = nn.Sequential(TimmLikeLayerNorm(8), ChannelsFirst(8), TimmLikeRmsNorm(8))
    assert [(r.name, r.was) for r in replace(model)] == [("0", "TimmLikeLayerNorm"), ("2", "TimmLikeRmsNorm")]


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
        replace(3)
    for ops in (["edm_loss"], []):
        with pytest.raises(ValueError, match="ops must name some of ada_layer_norm, ada_rms_norm"):
            replace(network(), ops=ops)


def models():
    """Yield networks as a user has them, with inputs and the number of their norms."""
    from diffusionblocks.experiments.models.vit import ViT, ViTConfig

    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    tokens, images = torch.arange(10).view(1, 10), torch.randn(2, 3, 16, 16)
    llama = transformers.LlamaConfig(vocab_size=16, num_key_value_heads=2, **sizes)
    gpt2 = transformers.GPT2Config(vocab_size=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    vit = transformers.ViTConfig(image_size=16, patch_size=8, **sizes)
    yield transformers.LlamaForCausalLM(llama), tokens, 5
    yield transformers.GPT2LMHeadModel(gpt2), tokens, 5
    yield transformers.ViTForImageClassification(vit), images, 5
    yield nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), torch.randn(2, 5, 32), 2
    yield ViT(ViTConfig(image_size=16, channels=3, layers=2), conditioned=False), images, 5


def test_models_of_every_kind_without_naming_ops():
    torch.manual_seed(0)
    for model, x, count in models():
        before = model.eval()(x)
        assert len(replace(model)) == count, type(model).__name__
        now = model(x)
        torch.testing.assert_close(getattr(now, "logits", now), getattr(before, "logits", before), rtol=1e-4, atol=1e-5)


def test_a_llama_and_a_vit_of_transformers():
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    torch.manual_seed(0)
    llama = transformers.LlamaModel(transformers.LlamaConfig(vocab_size=16, num_key_value_heads=2, **sizes)).eval()
    vit = transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **sizes)).eval()
    for model, op, x, count in (
        (llama, "ada_rms_norm", torch.arange(10).view(1, 10), 5),
        (vit, "ada_layer_norm", torch.randn(2, 3, 16, 16), 5),
    ):
        before = model(x).last_hidden_state
        assert len(replace(model, ops=op)) == count
        torch.testing.assert_close(model(x).last_hidden_state, before, rtol=1e-4, atol=1e-5)
    assert type(vit.layernorm) is DropInLayerNorm
