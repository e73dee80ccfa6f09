"""transformers' Vision Transformer, pretrained or not, as diffusion blocks."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import DiffusionBlocks
from ..denoiser import StemHead
from ..noise.partition import spread_layers
from ..targets.codebook import spread_codebook
from ..targets.labels import LabelTarget
from .conditioning import Z_GAIN, Conditioned, NoiseEmbedding, embed
from .layers import CONTEXT, partition_for
from .registry import register


class ViTStem(nn.Module):
    """The patch and position embeddings of transformers' ViT; z is added to the [CLS] token."""

    takes_float32 = True

    def __init__(self, embeddings: nn.Module, cond: int):
        super().__init__()
        own = next(embeddings.parameters())
        self.embeddings, self.noise = embeddings, NoiseEmbedding(cond).to(own.device)
        self.noise.mlp.to(own.dtype)  # the angles stay float32: halves would merge neighbouring noise levels

    def forward(self, x: Tensor, z: Tensor, c_noise: Tensor) -> tuple[Tensor, Tensor]:
        patches = embed(self.embeddings.patch_embeddings, x.to(self.embeddings.cls_token.dtype))  # (B, N, D)
        token = self.embeddings.cls_token + (Z_GAIN * z).unsqueeze(1)
        tokens = torch.cat([token.to(patches.dtype), patches], dim=1)  # (B, 1 + N, D)
        return tokens + self.embeddings.position_embeddings, self.noise(c_noise)


class ViTHead(nn.Module):
    """transformers' final norm and classifier."""

    def __init__(self, norm: nn.Module, classifier: nn.Module):
        super().__init__()
        self.norm, self.classifier = norm, classifier

    def features(self, h: Tensor) -> Tensor:
        return self.norm(h)[:, 0]

    def forward(self, h: Tensor, cond: Tensor) -> Tensor:
        return self.classifier(h)


def build_vit(config: dict[str, Any]) -> nn.Module:
    """Return an untrained ViTForImageClassification of a config."""
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig.from_dict(config))


@register(
    "transformers.models.vit.modeling_vit.ViTForImageClassification",
    describe=lambda network: json.loads(network.config.to_json_string(use_diff=False)),
    build=build_vit,
)
def convert_vit(
    network: nn.Module, blocks: int, *, shared: str = "shared", overlap: float = 0.05, cond: int | None = None
) -> DiffusionBlocks:
    """Return transformers' ViTForImageClassification as `blocks` denoisers; its modules are used in place.

    New modules get the network's device and dtype.

    Args:
        network: Pretrained or not.
        blocks: How many.
        shared: "shared", "per_block" or "frozen", as for DiffusionBlocks.
        overlap: Share of its width in ln sigma by which each block's range of noise is widened in training.
        cond: Width of the noise conditioning; a quarter of the hidden size by default.

    Raises: ValueError if blocks exceeds its layers.
    """
    config: Any = network.config
    width = config.hidden_size
    cond = cond or width // 4
    encoder: Any = network.vit
    layers = encoder.layers if hasattr(encoder, "layers") else encoder.encoder.layer
    around = StemHead(ViTStem(encoder.embeddings, cond), ViTHead(encoder.layernorm, network.classifier))
    table = spread_codebook(config.num_labels, width).to(network.classifier.weight.device)
    target = LabelTarget(config.num_labels, width, table=table)
    partition = partition_for(target, spread_layers(len(layers), blocks), overlap=overlap)
    return DiffusionBlocks(
        [copy.deepcopy(around) for _ in range(blocks)] if shared == "per_block" else around,
        [Conditioned(layer, width, cond) for layer in layers],
        target,
        partition,
        shared=shared,
        context=CONTEXT,
    )
