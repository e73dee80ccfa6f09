"""transformers' networks as diffusion blocks: images and texts to labels, masked tokens, next tokens."""

from __future__ import annotations

import copy
import functools
import importlib
import json
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..arguments import check_whole
from ..blocks import DiffusionBlocks
from ..denoiser import StemHead
from ..targets.base import Target
from ..targets.codebook import CodebookTarget, spread_codebook
from ..targets.labels import LabelTarget
from ..targets.tokens import TokenTarget
from .checks import check_network, layers_name
from .conditioning import Conditioned
from .embedding import Head, ImageEmbedding, Layer, TokenEmbedding, padding_of
from .families import FAMILIES, Family
from .layers import CONTEXT, layer_counts, partition_for
from .likeness import cast, dtypes
from .registry import Converter, Places
from .stems import (
    CausalStem,
    ConditionedNoisy,
    LabelStem,
    MaskedStem,
    WindowTarget,
    entrances,
    noise_embedding,
)  # fmt: skip

CODE_DIM = 128  # of a vocabulary's codebook, at most: enough to tell 100,000 tokens apart
NOT_BY_LAYER = ("_size", "_id", "_ids", "architectures")  # ends of names: lists that may chance to be as long
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

    Raises: ValueError on a network or an option that doesn't fit; TypeError for blocks that are no numbers.
    """
    check_network(network, family, mask_token_id)
    config: Any = network.config
    layers = network.get_submodule(layers_name(network, family))
    counts = layer_counts(len(layers), blocks)
    cond = config.hidden_size // 4 if cond is None else cond
    check_whole("cond", cond, 0)
    target = _target(network, family, mask_token_id)
    stem = _stem(network, family, target, cond, mask_token_id)
    around = StemHead(stem, _head(network, family, noisy=family.kind == "causal" and cond > 0))
    wrap = ConditionedNoisy if family.kind == "causal" else Conditioned
    wrapped = [wrap(layer, config.hidden_size, cond) if cond else layer for layer in layers]
    model = assemble(around, wrapped, target, counts, shared=shared, overlap=overlap, context=context)
    return model.train(network.training)


def assemble(
    around: StemHead,
    layers: Sequence[nn.Module],
    target: Target,
    counts: Sequence[int],
    *,
    shared: str,
    overlap: float,
    context: float | None,
) -> DiffusionBlocks:
    """Return blocks of layers that are plain, or Conditioned, and a stem with an `embedding`."""
    device = next(layers[0].parameters()).device
    around.to(device)
    conditioned = isinstance(layers[0], Conditioned)
    kinds: list[str] = around.stem.embedding.kinds
    return DiffusionBlocks(
        [copy.deepcopy(around) for _ in counts] if shared == "per_block" else around,
        [Layer(layer, kind, conditioned=conditioned) for layer, kind in zip(layers, kinds, strict=True)],
        target.to(device),
        partition_for(target, counts, overlap=overlap),
        shared=shared,
        context=_context(target) if context is None else context,
        ensemble=not conditioned and isinstance(target, CodebookTarget),
    )


def _target(network: Any, family: Family, mask_token_id: int | None) -> Target:
    config = network.config
    if mask_token_id is not None:
        return WindowTarget(config.vocab_size, padding_of(config), mask_token_id)
    if family.kind == "causal":
        return TokenTarget(spread_codebook(config.vocab_size, min(config.hidden_size, CODE_DIM)))
    return LabelTarget(config.num_labels, config.hidden_size)


def _stem(network: Any, family: Family, target: Target, cond: int, mask_token_id: int | None) -> Any:
    dtype, width = next(network.parameters()).dtype, network.config.hidden_size
    if mask_token_id is not None:
        return MaskedStem(TokenEmbedding(network, family), mask_token_id, noise_embedding(cond, dtype))
    z, noise = entrances(target.table.shape[1], width, cond, dtype)
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


def _context(target: Target) -> float:
    if isinstance(target, TokenTarget):
        return CAUSAL_CONTEXT
    return CONTEXT if isinstance(target, CodebookTarget) else 0.0


def describe(network: Any) -> dict[str, Any]:
    """Return JSON values that `build` makes a network like this one from."""
    return {
        "config": json.loads(network.config.to_json_string(use_diff=False)),
        **dtypes(network),
        "attention": network.config._attn_implementation,
    }


def build(described: dict[str, Any], *, kind: str) -> nn.Module:
    """Return an untrained network of class `kind`, as described."""
    made: Any = getattr(importlib.import_module("transformers"), kind)
    network = made(made.config_class.from_dict(described["config"]))
    cast(network, described["dtype"], described.get("buffers", {}))
    network.set_attn_implementation(described["attention"])
    return network


def cut(described: dict[str, Any], layers: range, *, family: Family) -> dict[str, Any]:
    """Return the description of a network of these layers alone."""
    stages = ("stage_names", "out_features", "out_indices")  # of backbones; they name layers, and follow from the depth
    config = {name: value for name, value in described["config"].items() if name not in stages}
    if layers.start and config.get("scale_attn_by_inverse_layer_idx"):
        raise ValueError(
            "scale_attn_by_inverse_layer_idx=True scales layers by their place: block 0 alone is a network"
        )
    depths = [name for name in ("num_hidden_layers", "n_layer") if name in config]
    for name, value in config.items():
        if isinstance(value, list) and len(value) == config[depths[0]] and not name.endswith(NOT_BY_LAYER):
            config[name] = value[layers.start : layers.stop]
    return {**described, "config": config | {name: len(layers) for name in depths}}


def around(family: Family) -> dict[str, str]:
    """Return where a network has what a StemHead was made of: prefixes of names in both."""
    found = {"stem.embedding.embeddings.": f"{family.embeddings}."}
    for part, paths in (
        ("stem.embedding.positions", family.positions), ("head.before", family.before), ("head.after", family.after)
    ):  # fmt: skip
        found |= {f"{part}.{i}.": f"{path}." for i, path in enumerate(paths)}
    return found


def places(network: nn.Module, described: dict[str, Any], layers: range, *, family: Family) -> Places:
    """Return where a network has what blocks were made of."""
    return Places(around(family), [f"{layers_name(network, family)}.{i}." for i in range(len(layers))])


CONVERTERS = {
    name: Converter(
        functools.partial(convert_transformers, family=family),
        describe,
        functools.partial(build, kind=name.rpartition(".")[2]),
        functools.partial(cut, family=family),
        functools.partial(places, family=family),
    )
    for name, family in FAMILIES.items()
}
