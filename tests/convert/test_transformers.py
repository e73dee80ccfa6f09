"""transformers' own ViT as diffusion blocks."""

from __future__ import annotations

import pytest
import torch

import diffusionblocks as db


def network():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4,
        num_channels=3, num_labels=5,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


@pytest.mark.parametrize("shared", ["shared", "per_block"])
def test_its_blocks_train(shared):
    torch.manual_seed(0)
    model = db.convert(network(), 2, shared=shared)
    y = torch.arange(40) % 5
    x = torch.randn(40, 3, 16, 16) * 0.1 + (y.float() / 2 - 1).view(-1, 1, 1, 1)
    for block in range(2):
        parts = [model.parts()["shared"], model.parts()[f"block_{block}"]]
        trained = [p for part in parts for p in part.parameters() if p.requires_grad]
        optimizer = db.BlockAdamW(trained, lr=3e-3)
        losses = []
        for step in range(40):
            loss = model.loss(block, x, y, seed=0, step=step).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert sum(losses[-5:]) < 0.7 * sum(losses[:5]), f"block {block}: {losses}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_network_of_another_dtype_trains_in_it(dtype):
    torch.manual_seed(0)
    net = network()
    plain, other = db.convert(net, 2), db.convert(network().to(dtype), 2)
    other.load_state_dict(plain.state_dict())
    x, y = torch.randn(8, 3, 16, 16), torch.arange(8) % 5  # images in float32, as loaders give them
    for block in range(2):
        ours, expected = (model.loss(block, x, y, seed=0, step=0).loss for model in (other, plain))
        assert float(ours.detach()) == pytest.approx(
            float(expected.detach()), rel=1e-5 if dtype == torch.float64 else 0.05
        )
        ours.backward()
        trained = [p for p in other.blocks[block].parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {dtype}
        before = [p.detach().clone() for p in trained]
        db.BlockAdamW(trained, lr=1e-2).step()
        assert any(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))
        assert all(p.isfinite().all() for p in trained)


def test_at_the_start_the_wrapped_layers_are_the_networks_own():
    torch.manual_seed(0)
    net = network().eval()
    model = db.convert(net, 2).eval()
    h, cond = torch.randn(2, 17, 32), torch.randn(2, 8)
    layers = net.vit.layers if hasattr(net.vit, "layers") else net.vit.encoder.layer
    for wrapped, layer in zip([layer for block in model.blocks for layer in block.layers], layers, strict=True):
        out = layer(h)
        torch.testing.assert_close(wrapped(h, cond), out[0] if isinstance(out, tuple) else out, rtol=1e-5, atol=1e-5)


def test_it_predicts_and_its_options_are_taken():
    model = db.convert(network(), blocks=4, shared="per_block", overlap=0.1, cond=6).eval()
    assert model(torch.randn(3, 3, 16, 16)).shape == (3, 5)
    assert (model.shared, model.partition.overlap, model.context) == ("per_block", 0.1, 0.5)
    assert model.blocks[3].layers[0].linear.in_features == 6


def test_more_blocks_than_layers_are_refused():
    with pytest.raises(ValueError, match="layers"):
        db.convert(network(), 5)
