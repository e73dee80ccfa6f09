"""The reference Vision Transformer: gradients, AdaLN-Zero, checks."""

from __future__ import annotations

import pytest
import torch

from diffusionblocks.experiments.models.vit import Layer, NoiseEmbedding, Stem, ViT, ViTConfig, modulate
from diffusionblocks.experiments.tasks.vit import ViTRun

SMALL = {
    "image_size": 4,
    "channels": 2,
    "num_classes": 5,
    "patch": 2,
    "dim": 8,
    "layers": 2,
    "heads": 2,
    "mlp": 16,
    "cond": 6,
}


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def randomise(module: torch.nn.Module) -> None:
    """AdaLN and the head start at zero, which hides what is behind them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))


def logits(network: ViT, x: torch.Tensor) -> torch.Tensor:
    """A pass with noise, written as a user would."""
    z = torch.randn(len(x), 8, generator=torch.Generator().manual_seed(2))
    h, cond = network.stem(x, z, torch.linspace(-1.5, 1, len(x)))
    for layer in network.layers:
        h = layer(h, cond)
    return network.head(network.head.features(h), cond)


@pytest.mark.parametrize("silu_after", [False, True])
def test_gradients_reach_every_parameter_with_noise(silu_after):
    network = ViT(ViTConfig(**SMALL, silu_after=silu_after), conditioned=True)
    randomise(network)
    torch.nn.functional.cross_entropy(logits(network, images()), torch.tensor([0, 1, 2])).backward()
    # The key's bias shifts all logits of a query alike, so softmax drops it: a true zero, up to rounding.
    dead = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-9]
    assert dead == []
    for layer in network.layers:
        assert layer.qkv.bias.grad[8:16].abs().max() < 1e-6
        assert layer.qkv.bias.grad[:8].abs().max() > 1e-6 and layer.qkv.bias.grad[16:].abs().max() > 1e-6


def test_gradients_reach_every_parameter_of_the_ordinary_classifier():
    network = ViT(ViTConfig(**SMALL), conditioned=False)
    randomise(network)
    torch.nn.functional.cross_entropy(network(images()), torch.tensor([0, 1, 2])).backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-9] == []
    assert network.stem.noise is None and network.head.modulation is None


def test_gradients_reach_image_and_z():
    network = ViT(ViTConfig(**SMALL), conditioned=True)
    randomise(network)
    x, z = images().requires_grad_(), torch.randn(3, 8, requires_grad=True)
    h, cond = network.stem(x, z, torch.zeros(3))
    for layer in network.layers:
        h = layer(h, cond)
    network.head(network.head.features(h), cond).sum().backward()
    assert x.grad.abs().max() > 0 and z.grad.abs().max() > 0


@pytest.mark.parametrize("silu_after", [False, True])
def test_a_layer_with_closed_gates_starts_as_the_identity(silu_after):
    h, cond = torch.randn(3, 5, 8), torch.randn(3, 6)
    assert torch.equal(Layer(ViTConfig(**SMALL, gate_start=0, silu_after=silu_after), True)(h, cond), h)
    # Positive control: with open gates it is the plain residual layer.
    layer = Layer(ViTConfig(**SMALL, gate_start=1, silu_after=silu_after), True)
    after = h + layer.attend(layer.norm1(h))
    after = after + layer.mlp(layer.norm2(after))
    assert torch.allclose(layer(h, cond), after, atol=1e-6) and not torch.allclose(after, h)


def test_attention_is_softmax_attention_by_hand():
    layer = Layer(ViTConfig(**SMALL), False)
    h = torch.randn(2, 5, 8)
    q, k, v = (h @ layer.qkv.weight.T + layer.qkv.bias).split(8, dim=-1)
    heads = []
    for a in (slice(0, 4), slice(4, 8)):
        scores = q[..., a] @ k[..., a].transpose(1, 2) / 4**0.5
        heads.append(scores.softmax(-1) @ v[..., a])
    want = torch.cat(heads, -1) @ layer.proj.weight.T + layer.proj.bias
    assert torch.allclose(layer.attend(h), want, atol=1e-6)  # float32 sums of 8


def test_samples_do_not_see_each_other():
    network = ViT(ViTConfig(**SMALL), conditioned=True)
    randomise(network)
    x = images()
    whole = logits(network, x)
    x[2] += 1
    changed = logits(network, x)
    assert torch.equal(whole[:2], changed[:2]) and not torch.equal(whole[2], changed[2])


def test_the_first_token_is_z_and_patches_follow_in_reading_order():
    config = ViTConfig(**SMALL)
    stem = Stem(config, conditioned=True)
    x, z = images(), torch.randn(3, 8)
    tokens, cond = stem(x, z, torch.zeros(3))
    assert tokens.shape == (3, 1 + config.tokens, 8) and cond.shape == (3, 6)
    tokens = tokens - stem.position
    assert torch.allclose(tokens[:, 0], config.z_gain * z, atol=1e-6)
    for i, (row, column) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
        patch = x[:, :, row : row + 2, column : column + 2].flatten(1)
        want = patch @ stem.patch.weight.flatten(1).T + stem.patch.bias
        assert torch.allclose(tokens[:, 1 + i], want, atol=1e-5)


def test_noise_embedding_tells_levels_apart():
    torch.manual_seed(0)
    embed = NoiseEmbedding(16)
    levels = torch.tensor([0.002, 0.0021, 0.2, 0.21, 79.0, 80.0]).log() / 4
    out = embed(levels)
    assert torch.pdist(out).min() > 1e-3
    assert torch.allclose(out[:1], embed(levels[:1]), atol=1e-6)  # one level's vector doesn't depend on the others


def test_modulation_is_affine_per_sample():
    h, shift, scale = torch.randn(2, 3, 4), torch.randn(2, 1, 4), torch.randn(2, 1, 4)
    want = torch.stack([h[i, j] * (1 + scale[i, 0]) + shift[i, 0] for i in range(2) for j in range(3)])
    assert torch.allclose(modulate(h, shift, scale).reshape(6, 4), want)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"patch": 3}, "patch"),
        ({"heads": 3}, "heads"),
        *[({size: 0}, size) for size in SMALL],
        ({"dim": -8}, "dim"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, name):
    with pytest.raises(ValueError, match=name):
        ViTConfig(**{**SMALL, **change})


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(0, 2, 4, 4),
        torch.zeros(2, 4, 4),
        torch.zeros(3, 1, 4, 4),
        torch.zeros(3, 2, 4, 5),
        torch.zeros(3, 2, 4, 4, dtype=torch.uint8),
        torch.zeros(3, 2, 4, 4, dtype=torch.float64),
        torch.zeros(3, 2, 4, 4, dtype=torch.bfloat16),
    ],
)
def test_images_that_do_not_fit_are_refused(x):
    with pytest.raises(ValueError, match="images"):
        Stem(ViTConfig(**SMALL), True).check(x)


def test_images_of_another_dtype_are_welcome_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        Stem(ViTConfig(**SMALL), True).check(images().bfloat16())


def test_baselines_that_lack_a_setting_say_so():
    for changes in ({"accumulate": 2}, {"precision": "bfloat16"}):
        with pytest.raises(ValueError, match="forward-forward and noprop know no accumulate and no bfloat16"):
            ViTRun(baseline=("noprop", "forward-forward"), **changes)


def test_what_the_recipe_decides_is_not_set_beside_it():
    with pytest.raises(ValueError, match="gate_start, z_gain, silu_after of the model come with the recipe"):
        ViTRun(blocks=2, model=ViTConfig(**SMALL, z_gain=1.0))
