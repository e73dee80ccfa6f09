"""timm's vision transformers as diffusion blocks: images to labels."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..arguments import check_whole
from ..blocks import DiffusionBlocks
from ..denoiser import StemHead
from ..targets.labels import LabelTarget
from .checks import check_timm_network
from .conditioning import Conditioned
from .embedding import Images, Tokens
from .layers import layer_counts
from .likeness import cast, dtypes
from .registry import Converter, Places
from .stems import LabelStem, entrances
from .transformers import assemble

HEAD = ("norm", "attn_pool", "fc_norm", "head_drop", "head", "head_dist")  # what stands behind the layers


def convert_timm(
    network: Any,
    blocks: int | Sequence[int],
    *,
    shared: str = "shared",
    overlap: float = 0.05,
    context: float | None = None,
    cond: int | None = None,
) -> DiffusionBlocks:
    """Return one of timm's vision transformers as denoising blocks; its modules are used in place.

    Args:
        network: From timm.create_model, pretrained or not.
        blocks: How many, or the layers of each.
        shared: "shared", "per_block" or "frozen", as for DiffusionBlocks.
        overlap: Share of its width in ln sigma by which each block's range of noise is widened in training.
        context: Share of a batch at the highest noise; half by default.
        cond: Width of the noise conditioning; a quarter of the hidden size by default. 0: none, layers stay as they
            are, and labels are read from x alone, by the mean of all blocks.

    Raises: ValueError on a network or an option that doesn't fit; TypeError for blocks that are no numbers.
    """
    check_timm_network(network)
    layers, width = list(network.blocks), network.embed_dim
    counts = layer_counts(len(layers), blocks)
    cond = width // 4 if cond is None else cond
    check_whole("cond", cond, 0)
    target = LabelTarget(network.num_classes, width)
    stem = LabelStem(TimmEmbedding(network), *entrances(width, width, cond, next(network.parameters()).dtype))
    if cond:
        layers = [Conditioned(layer, width, cond) for layer in layers]
    around = StemHead(stem, TimmHead(network))
    model = assemble(around, layers, target, counts, shared=shared, overlap=overlap, context=context)
    return model.train(network.training)


class TimmEmbedding(Images):
    """Images to tokens, by what stands before a network's layers."""

    def __init__(self, network: Any):
        patches = network.patch_embed
        super().__init__(network.in_chans, patches.img_size, patches.patch_size, any_size=network.dynamic_img_size)
        self.network = _part(network, [name for name, _ in network.named_children() if name not in ("blocks", *HEAD)])
        self.kinds = ["full_attention"] * len(network.blocks)

    def forward(self, x: Tensor) -> Tokens:
        network = self.network
        h = network._pos_embed(network.patch_embed(x.to(network.patch_embed.proj.weight.dtype)))
        h, rope = h if isinstance(h, tuple) else (network.patch_drop(h), None)
        return Tokens(network.norm_pre(h), {"full_attention": {} if rope is None else {"rope": rope}})


class TimmHead(nn.Module):
    """Tokens to logits, by what stands behind a network's layers."""

    def __init__(self, network: Any):
        super().__init__()
        self.network = _part(network, HEAD)
        self.network._parameters = {}

    def features(self, tokens: Tokens) -> Tensor:
        h: Tensor = self.network.norm(tokens.h)
        return h

    def forward(self, h: Tensor, cond: Any) -> Tensor:
        logits: Tensor = self.network.forward_head(h)
        return logits


def _part(network: nn.Module, children: Sequence[str]) -> Any:
    """Return a network that shares these of its modules, and lacks the others."""
    part = copy.copy(network)
    part._modules = {name: module for name, module in network._modules.items() if name in children}
    return part


def describe(network: Any) -> dict[str, Any]:
    """Return JSON values that `build` makes a network like this one from.

    Raises: ValueError unless timm.create_model made it.
    """
    if not getattr(network, "pretrained_cfg", None):
        raise ValueError(f"{type(network).__name__} has no name of an architecture: make it by timm.create_model(name)")
    patches = network.patch_embed
    return {
        "architecture": network.pretrained_cfg["architecture"],
        "arguments": {
            "img_size": list(patches.img_size),
            "patch_size": list(patches.patch_size),
            "in_chans": network.in_chans,
            "num_classes": network.num_classes,
            "global_pool": network.global_pool,
            "embed_dim": network.embed_dim,
            "depth": len(network.blocks),
            "num_heads": network.blocks[0].attn.num_heads,
            "dynamic_img_size": network.dynamic_img_size,
        },
        **dtypes(network),
    }


def build(described: dict[str, Any]) -> nn.Module:
    """Return an untrained network, as described; stochastic depth is the architecture's."""
    timm = importlib.import_module("timm")
    network: nn.Module = timm.create_model(described["architecture"], **described["arguments"])
    cast(network, described["dtype"], described.get("buffers", {}))
    return network


def cut(described: dict[str, Any], layers: range) -> dict[str, Any]:
    """Return the description of a network of these layers alone."""
    return {**described, "arguments": {**described["arguments"], "depth": len(layers)}}


def places(network: nn.Module, described: dict[str, Any], layers: range) -> Places:
    """Return where a network has what blocks were made of."""
    around = {"stem.embedding.network.": "", "head.network.": ""}
    return Places(around, [f"blocks.{i}." for i in range(len(layers))])


CONVERTERS = {
    f"timm.models.{name}": Converter(convert_timm, describe, build, cut, places)
    for name in ("vision_transformer.VisionTransformer", "deit.VisionTransformerDistilled", "eva.Eva")
}
