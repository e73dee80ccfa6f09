"""Layers of the reference models: attention against its definition, for every way in which they attend."""

from __future__ import annotations

import pytest
import torch

import dbkernels
from diffusionblocks.experiments.models.causal_lm import Cache, CausalLayer, CausalLMConfig, merge
from diffusionblocks.experiments.models.layers import ConditionedConfig, Layer, RotaryLayer, rotary

B, N, D, H = 2, 7, 16, 2


def softmax_attention(q, k, v, causal=False):
    """softmax(q·k / sqrt(C))·v of (B, H, N, C), as written."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1) @ v


def split_heads(layer, h):
    """Queries, keys and values (B, H, N, C)."""
    return (part.view(B, N, H, -1).transpose(1, 2) for part in layer.qkv(h).chunk(3, -1))


@pytest.fixture
def calls(monkeypatch):
    """Keyword arguments of every call of `dbkernels.attention`."""
    seen, attention = [], dbkernels.attention
    monkeypatch.setattr(dbkernels, "attention", lambda q, k, v, **rest: seen.append(rest) or attention(q, k, v, **rest))
    return seen


@pytest.mark.parametrize("kind", [Layer, RotaryLayer])
def test_full_attention_is_its_definition(kind, calls):
    layer = kind(ConditionedConfig(dim=D, heads=H), conditioned=True).double()
    h = torch.randn(B, N, D, dtype=torch.float64, requires_grad=True)
    q, k, v = split_heads(layer, h)
    if kind is RotaryLayer:
        q, k = rotary(q), rotary(k)
    want = layer.proj(merge(softmax_attention(q, k, v)))
    have = layer.attend(h)
    torch.testing.assert_close(have, want)
    ours, theirs = (torch.autograd.grad(out.square().sum(), h, retain_graph=True)[0] for out in (have, want))
    torch.testing.assert_close(ours, theirs)
    assert calls == [{}]


def test_causal_attention_is_its_definition_and_what_a_cache_gives(calls):
    layer = CausalLayer(CausalLMConfig(dim=D, heads=H)).double()
    h = torch.randn(B, N, D, dtype=torch.float64)
    q, k, v = split_heads(layer, layer.norm(h, layer.norm1))
    attended = h + layer.proj(merge(softmax_attention(rotary(q), rotary(k), v, causal=True)))
    want = attended + layer.mlp(layer.norm(attended, layer.norm2))
    torch.testing.assert_close(layer(h, None), want)
    assert calls == [{"causal": True}]
    cache = Cache()
    parts = [layer.extend(part, cache) for part in h.split([3, 1, N - 4], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), want)


def test_rotary_scores_depend_on_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 5, 8, dtype=torch.float64)
    scores, later = (rotary(q, first) @ rotary(k, first).transpose(-1, -2) for first in (0, 7))
    torch.testing.assert_close(scores, later, rtol=1e-5, atol=1e-5)  # angles are float32
    torch.testing.assert_close(rotary(q).norm(dim=-1), q.norm(dim=-1), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(scores, q @ k.transpose(-1, -2), atol=1e-2)
