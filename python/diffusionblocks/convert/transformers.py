"""transformers' networks as diffusion blocks: images and texts to labels, masked tokens, next tokens."""

from __future__ import annotations

import copy
import functools
import importlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..blocks import DiffusionBlocks
from ..denoiser import StemHead
from ..noise.information import closed_form_density
from ..noise.partition import spread_layers
from ..targets.base import Target
from ..targets.codebook import CodebookTarget, spread_codebook
from ..targets.labels import LabelTarget
from ..targets.tokens import TokenTarget
from .checks import check_network, layers_name
from .conditioning import Conditioned, NoiseEmbedding
from .embedding import Head, ImageEmbedding, Layer, TokenEmbedding, padding_of
from .families import FAMILIES, Family
from .layers import CONTEXT, partition_for
from .registry import Converter
from .stems import CausalStem, ConditionedNoisy, LabelStem, MaskedStem, WindowTarget, z_projection

CODE_DIM = 128  # of a vocabulary's codebook, at most: enough to tell 100,000 tokens apart
CODE_ROWS = 256  # of a codebook that the noise is laid out by: K rows move its range by the root of ln K only
CAUSAL_CONTEXT = 0.9  # at the highest noise the loss is the ordinary cross-entropy (docs/method.md)


def convert_transformers(
    network: nn.Module,
    blocks: int | Sequence[int],
    *,
    family: Family,
    shared: str = "shared",
    overlap: float = 0.05,
    context: float | None = None,
    cond: int | None = None,
    mask_token_id: int | None = None,
) -> DiffusionBlocks:
    """Return one of transformers' networks as denoising blocks; its modules are used in place.

    New modules get the network's device and dtype.

    Args:
        network: Pretrained or not.
        blocks: How many, or the layers of each.
        family: Where it keeps its parts.
        shared: "shared", "per_block" or "frozen", as for DiffusionBlocks.
        overlap: Share of its width in ln sigma by which each block's range of noise is widened in training.
        context: Share of a batch at the highest noise; by default 0.5 for labels, 0.9 for next tokens, else 0.
        cond: Width of the noise conditioning; a quarter of the hidden size by default. 0: none, layers stay as they
            are; labels and next tokens are then read from x alone, by the mean of all blocks.
        mask_token_id: Of the tokenizer; masked language models need it.

    Raises: ValueError on a network or an option that doesn't fit.
    """
    check_network(network, family, mask_token_id)
    config: Any = network.config
    layers = network.get_submodule(layers_name(network, family))
    counts = spread_layers(len(layers), blocks) if isinstance(blocks, int) else tuple(blocks)
    cond = config.hidden_size // 4 if cond is None else cond
    target = _target(network, family)
    stem = _stem(network, family, target, cond, mask_token_id)
    around = StemHead(stem, _head(network, family, noisy=family.kind == "causal" and cond > 0))
    around.to(next(layers.parameters()).device)
    wrap = ConditionedNoisy if family.kind == "causal" else Conditioned
    kinds = stem.embedding.kinds
    model = DiffusionBlocks(
        [copy.deepcopy(around) for _ in counts] if shared == "per_block" else around,
        [
            Layer(wrap(layer, config.hidden_size, cond) if cond else layer, kind, conditioned=cond > 0)
            for layer, kind in zip(layers, kinds, strict=True)
        ],
        target.to(next(layers.parameters()).device),
        _partition(target, counts, overlap),
        shared=shared,
        context=_context(target) if context is None else context,
        ensemble=not cond and isinstance(target, CodebookTarget),
    )
    return model.train(network.training)


def _target(network: Any, family: Family) -> Target:
    config = network.config
    if family.kind == "masked":
        return WindowTarget(config.vocab_size, padding_of(config))
    if family.kind == "causal":
        return TokenTarget(spread_codebook(config.vocab_size, min(config.hidden_size, CODE_DIM)))
    return LabelTarget(config.num_labels, config.hidden_size)


def _stem(network: Any, family: Family, target: Target, cond: int, mask_token_id: int | None) -> Any:
    dtype = next(network.parameters()).dtype
    noise = NoiseEmbedding(cond) if cond else None
    if noise is not None:
        noise.mlp.to(dtype)  # the angles stay float32: halves would merge neighbouring noise levels
    if mask_token_id is not None:
        return MaskedStem(TokenEmbedding(network, family), mask_token_id, noise)
    z = z_projection(target.table.shape[1], network.config.hidden_size).to(dtype) if cond else None
    if family.kind == "causal":
        return CausalStem(TokenEmbedding(network, family), z, noise)
    embedding = ImageEmbedding if family.kind == "images" else TokenEmbedding
    return LabelStem(embedding(network, family), z, noise)


def _head(network: Any, family: Family, *, noisy: bool) -> Head:
    before, after = ([network.get_submodule(name) for name in names] for names in (family.before, family.after))
    pool = family.pool
    if pool == "classifier_pooling":
        pool = {"cls": "first", "mean": "mean"}[network.config.classifier_pooling]
    return Head(before, pool, after, noisy=noisy)


def _partition(target: Target, counts: Sequence[int], overlap: float) -> Any:
    large = isinstance(target, CodebookTarget) and len(target.table) > CODE_ROWS
    density = closed_form_density(target.table[:CODE_ROWS]) if large else None
    return partition_for(target, counts, density=density, overlap=overlap)


def _context(target: Target) -> float:
    if isinstance(target, TokenTarget):
        return CAUSAL_CONTEXT
    return CONTEXT if isinstance(target, CodebookTarget) else 0.0


def describe(network: Any) -> dict[str, Any]:
    """Return JSON values that `build` makes a network like this one from."""
    return {
        "config": json.loads(network.config.to_json_string(use_diff=False)),
        "dtype": str(next(network.parameters()).dtype).removeprefix("torch."),
        "attention": network.config._attn_implementation,
    }


def build(described: dict[str, Any], *, kind: str) -> nn.Module:
    """Return an untrained network of class `kind`, as described."""
    made: Any = getattr(importlib.import_module("transformers"), kind)
    network = made(made.config_class.from_dict(described["config"])).to(getattr(torch, described["dtype"]))
    network.set_attn_implementation(described["attention"])
    return network


CONVERTERS = {
    name: Converter(
        functools.partial(convert_transformers, family=family),
        describe,
        functools.partial(build, kind=name.rpartition(".")[2]),
    )
    for name, family in FAMILIES.items()
}
