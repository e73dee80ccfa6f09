"""transformers' Vision Transformer, pretrained or not, as diffusion blocks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import DiffusionBlocks
from ..denoiser import Ends
from ..noise.information import closed_form_density
from ..noise.partition import make_partition
from ..targets.labels import ClassTarget, spread_codebook
from .conditioning import Conditioned, NoiseEmbedding

Z_GAIN = 0.1  # of z beside the first token
CONTEXT = 0.5  # share of a batch at sigma_max, where the answer must come from x alone


class HuggingFaceStem(nn.Module):
    """The patch and position embeddings of transformers' ViT; z is added to the [CLS] token."""

    def __init__(self, embeddings: nn.Module, cond: int):
        super().__init__()
        own = next(embeddings.parameters())
        self.embeddings, self.noise = embeddings, NoiseEmbedding(cond).to(own.device)
        self.noise.mlp.to(own.dtype)  # the angles stay float32: halves would merge neighbouring noise levels

    def forward(self, x: Tensor, z: Tensor, c_noise: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.embeddings.patch_embeddings(x.to(self.embeddings.cls_token.dtype))
        token = self.embeddings.cls_token + (Z_GAIN * z).unsqueeze(1)
        tokens = torch.cat([token.to(patches.dtype), patches], dim=1)
        return tokens + self.embeddings.position_embeddings, self.noise(c_noise)


class HuggingFaceHead(nn.Module):
    """transformers' final norm and classifier."""

    def __init__(self, norm: nn.Module, classifier: nn.Module):
        super().__init__()
        self.norm, self.classifier = norm, classifier

    def features(self, h: Tensor) -> Tensor:
        return self.norm(h)[:, 0]

    def forward(self, h: Tensor, cond: Tensor) -> Tensor:
        return self.classifier(h)


def huggingface_vit(
    network: nn.Module, blocks: int, *, shared: str = "shared", overlap: float = 0.05, cond: int | None = None
) -> DiffusionBlocks:
    """transformers' ViTForImageClassification, pretrained or not, as `blocks` denoisers; its modules are used in place.

    What is added has the network's device and dtype. cond: width of the noise conditioning, a quarter of the hidden
    size by default.
    Raises: TypeError if `network` is another model; ValueError if blocks exceeds its layers.
    """
    from transformers import ViTForImageClassification

    if not isinstance(network, ViTForImageClassification):
        raise TypeError(f"network must be a transformers ViTForImageClassification, got {type(network).__name__}")
    config: Any = network.config
    width = config.hidden_size
    cond = cond or width // 4
    encoder = network.vit
    layers = encoder.layers if hasattr(encoder, "layers") else encoder.encoder.layer
    ends = Ends(HuggingFaceStem(encoder.embeddings, cond), HuggingFaceHead(encoder.layernorm, network.classifier))
    target = ClassTarget(spread_codebook(config.num_labels, width).to(network.classifier.weight.device))
    partition = make_partition(closed_form_density(target.embeddings()), len(layers), blocks, overlap=overlap)
    return DiffusionBlocks(
        [copy.deepcopy(ends) for _ in range(blocks)] if shared == "per_block" else ends,
        [Conditioned(layer, width, cond) for layer in layers],
        target,
        partition,
        shared=shared,
        context=CONTEXT,
    )
