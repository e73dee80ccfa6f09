"""transformers' own ViT as diffusion blocks."""

from __future__ import annotations

import pytest
import torch

from diffusionblocks import PartOptimizer, huggingface_vit

transformers = pytest.importorskip("transformers")


def network():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4,
        num_channels=3, num_labels=5,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


@pytest.mark.parametrize("shared", ["shared", "per_block"])
def test_its_blocks_train(shared):
    torch.manual_seed(0)
    model = huggingface_vit(network(), 2, shared=shared)
    y = torch.arange(40) % 5
    x = torch.randn(40, 3, 16, 16) * 0.1 + (y.float() / 2 - 1).view(-1, 1, 1, 1)
    for block in range(2):
        parts = [model.parts()["shared"], model.parts()[f"block_{block}"]]
        optimizers = [PartOptimizer(part.named_parameters()) for part in parts]
        losses = []
        for step in range(40):
            loss = model.loss(block, x, y, seed=0, step=step).loss
            loss.backward()
            for optimizer in optimizers:
                optimizer.step(3e-3)
            losses.append(float(loss))
        assert sum(losses[-5:]) < 0.7 * sum(losses[:5]), f"block {block}: {losses}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_network_of_another_dtype_trains_in_it(dtype):
    torch.manual_seed(0)
    net = network()
    plain, other = huggingface_vit(net, 2), huggingface_vit(network().to(dtype), 2)
    other.load_state_dict(plain.state_dict())
    x, y = torch.randn(8, 3, 16, 16), torch.arange(8) % 5  # images in float32, as loaders give them
    for block in range(2):
        ours, expected = (model.loss(block, x, y, seed=0, step=0).loss for model in (other, plain))
        assert float(ours) == pytest.approx(float(expected), rel=1e-5 if dtype == torch.float64 else 0.05)
        ours.backward()
        trained = [p for p in other.blocks[block].parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {dtype}
        before = [p.detach().clone() for p in trained]
        PartOptimizer(other.blocks[block].named_parameters()).step(1e-2)
        assert any(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))
        assert all(p.isfinite().all() for p in trained)


def test_at_the_start_the_wrapped_layers_are_the_networks_own():
    torch.manual_seed(0)
    net = network().eval()
    model = huggingface_vit(net, 2).eval()
    h, cond = torch.randn(2, 17, 32), torch.randn(2, 8)
    layers = net.vit.layers if hasattr(net.vit, "layers") else net.vit.encoder.layer
    for wrapped, layer in zip([layer for block in model.blocks for layer in block.layers], layers, strict=True):
        out = layer(h)
        torch.testing.assert_close(wrapped(h, cond), out[0] if isinstance(out, tuple) else out, rtol=1e-5, atol=1e-5)


def test_another_model_is_refused():
    with pytest.raises(TypeError, match="ViTForImageClassification"):
        huggingface_vit(torch.nn.Linear(1, 1), 2)
    with pytest.raises(ValueError, match="number of layers"):
        huggingface_vit(network(), 5)
