"""Noise level and z beside somebody's modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffusionblocks.convert.conditioning import Z_GAIN, Conditioned, NoiseEmbedding, PlainHead, PlainStem, takes


def test_noise_levels_are_told_apart():
    embedding = NoiseEmbedding(16)
    levels = torch.linspace(-1.6, 1.1, 50)
    found = embedding(levels)
    assert found.shape == (50, 16) and embedding(levels.view(5, 10)).shape == (5, 10, 16)
    distances = torch.pdist(found.detach())
    assert distances.min() > 1e-3
    assert "rates" not in embedding.state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_angles_are_float32_whatever_the_weights_are(dtype):
    embedding = NoiseEmbedding(4)
    wanted = embedding(torch.tensor([0.5, 0.501]))
    embedding.mlp.to(dtype)
    found = embedding(torch.tensor([0.5, 0.501]))
    assert found.dtype == dtype and embedding.rates.dtype == torch.float32
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=0.02 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("shape", [(3, 4), (3, 5, 4)])
def test_a_conditioned_layer_does_nothing_at_the_start(shape):
    layer = nn.Linear(4, 4)
    made = Conditioned(layer, 4, 6)
    h = torch.randn(shape)
    torch.testing.assert_close(made(h, torch.randn(3, 6)), layer(h), rtol=1e-6, atol=1e-6)


def test_shift_scale_and_gate():
    made = Conditioned(nn.Linear(2, 2), 2, 1)
    with torch.no_grad():
        made.linear.bias.copy_(torch.tensor([0.5, 0.5, 1.0, 1.0, -1.0, -1.0]))  # shift 1/2, scale 1, gate -1
    h = torch.randn(3, 2)
    torch.testing.assert_close(made(h, torch.zeros(3, 1)), h)  # the gate shuts the layer out
    with torch.no_grad():
        made.linear.bias[4:] = 1.0
    out = made.layer(2 * h + 0.5)
    torch.testing.assert_close(made(h, torch.zeros(3, 1)), h + 2 * (out - h))


@pytest.mark.parametrize("per_token", [False, True])
def test_conditioning_of_all_tokens_or_of_each(per_token):
    made = Conditioned(nn.Identity(), 2, 3)
    nn.init.normal_(made.linear.weight)
    h, cond = torch.randn(2, 4, 2), torch.randn(2, 4, 3)
    found = made(h, cond if per_token else cond[:, 0])
    for token in range(4):
        alone = made(h[:, token], cond[:, token if per_token else 0])
        torch.testing.assert_close(found[:, token], alone)


def test_a_layer_that_returns_a_tuple_gives_its_first():
    class Layer(nn.Linear):
        def forward(self, h):
            return super().forward(h), "attention"

    layer, h = Layer(2, 2), torch.randn(3, 2)
    torch.testing.assert_close(Conditioned(layer, 2, 3)(h, torch.zeros(3, 3)), layer(h)[0])


def test_new_parts_have_the_layers_dtype():
    assert Conditioned(nn.Linear(2, 2).double(), 2, 3).linear.weight.dtype == torch.float64
    assert Conditioned(nn.Identity(), 2, 3).linear.weight.dtype == torch.float32


def test_z_is_small_beside_the_features():
    stem = PlainStem(nn.Linear(3, 8), dim=8, z_dim=8, cond=4)
    z = nn.functional.normalize(torch.randn(5, 8), dim=-1)
    assert stem.z(z).norm(dim=-1).tolist() == pytest.approx([Z_GAIN] * 5, rel=1e-5), "orthogonal"
    h, cond = stem(torch.zeros(5, 3), z.double(), torch.zeros(5))
    torch.testing.assert_close(h, stem.stem.bias + stem.z(z), rtol=1e-4, atol=1e-6)
    assert cond.shape == (5, 4)


def test_only_a_whole_linear_head_is_linear():
    class Scaled(nn.Linear):
        def forward(self, h):
            return 2 * super().forward(h)

    linear = nn.Linear(4, 3)
    assert PlainHead(linear).linear is linear
    assert PlainHead(nn.Sequential(linear)).linear is None and PlainHead(Scaled(4, 3)).linear is None
    h = torch.randn(2, 4)
    assert torch.equal(PlainHead(linear)(PlainHead(linear).features(h), None), linear(h))


class Forward(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.forward = forward


@pytest.mark.parametrize(("forward", "expected"), [
    (lambda h: h, False), (lambda h, cond: h, True), (lambda x, c: x, True), (lambda h, mask=None: h, False),
    (lambda h, cond=None: h, True), (lambda h, *args: h, False), (lambda h, *, cond: h, True),
])  # fmt: skip
def test_conditioned_layers_are_told_by_their_arguments(forward, expected):
    assert takes(Forward(forward), "h", "cond") == expected
    assert not takes(nn.TransformerEncoderLayer(8, 2), "h", "cond")
