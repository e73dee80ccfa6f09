"""Trained blocks given back as networks of the class that they were converted from, or in the place of one."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import DiffusionBlocks
from . import diffusers
from .checks import layers_name
from .families import FAMILIES, Family
from .registry import rebuild_network
from .routed import Routed


def to_original(model: DiffusionBlocks, block: int | None = None) -> nn.Module:
    """Return a network of the converted one's class with the trained weights, averaged where there are any.

    Its save_pretrained writes what transformers or diffusers loads. AdaLN that was added has no place in such a
    network, so one of transformers' must have been converted with cond=0.

    Args:
        model: From `convert` with one of transformers' networks and cond=0, or one of diffusers'.
        block: A network of this block's layers alone, which computes what that block does: model.logits(x, block), or
            of masked tokens and latents the block's denoiser (with averages, under model.averages()). None: of one
            block the whole network. Of several blocks of diffusers' network a module in its place, which asks the block
            that owns the timestep: `pipe.transformer = db.to_original(model)`. Of several blocks of transformers'
            network all layers, which were never trained to follow each other: a start for training end to end, and a
            warning says so.

    Returns:
        A network on the CPU, in evaluation mode; the module in its place works on the model itself.

    Raises: ValueError if the class has no place for something that was trained.
    """
    if block is not None:
        model.partition.check_block(block)
    if model.origin is not None and model.origin["kind"] in diffusers.FAMILIES:
        return Routed(model) if block is None and len(model.blocks) > 1 else _latent_network(model, block or 0)
    family = _family_of(model)
    chosen = list(range(len(model.blocks))) if block is None else [block]
    if block is None and model.shared == "per_block" and len(chosen) > 1:
        raise ValueError("each block has a stem and head of its own: to_original(model, block=...) gives one block's")
    if len(chosen) > 1:
        warnings.warn(
            "the blocks' layers weren't trained to follow each other: as one network they need training end to end; "
            "to_original(model, block=...) gives a network that computes what that block does",
            stacklevel=2,
        )
    network = _network_of(model, chosen)
    state = _state(model, chosen, network, family)
    _load(network, state)
    return network.eval()


def _family_of(model: DiffusionBlocks) -> Family:
    origin = model.origin
    if origin is None or origin["kind"] not in FAMILIES:
        raise ValueError("to_original needs a model that `convert` made of one of transformers' or diffusers' networks")
    if origin["options"].get("cond") != 0:
        raise ValueError(
            f"the layers have AdaLN conditioning, which {origin['kind'].rpartition('.')[2]} has no place for: convert "
            "with cond=0, or keep the model as blocks (save_pretrained and load)"
        )
    return FAMILIES[origin["kind"]]


def _network_of(model: DiffusionBlocks, chosen: list[int]) -> Any:
    """Return an untrained network as deep as the chosen blocks."""
    assert model.origin is not None
    described = model.origin["network"]
    stages = ("stage_names", "out_features", "out_indices")  # of backbones; they name layers, and follow from the depth
    config = {name: value for name, value in described["config"].items() if name not in stages}
    counts = model.partition.layers
    first = sum(counts[: chosen[0]])
    depth = sum(counts[b] for b in chosen)
    if first and config.get("scale_attn_by_inverse_layer_idx"):
        raise ValueError(
            "scale_attn_by_inverse_layer_idx=True scales layers by their place: block 0 alone is a network"
        )
    for name in ("num_hidden_layers", "n_layer"):
        if name in config:
            config[name] = depth
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][first : first + depth]
    return rebuild_network({**model.origin, "network": {**described, "config": config}})


def _state(model: DiffusionBlocks, chosen: list[int], network: Any, family: Family) -> dict[str, Tensor]:
    """Return the trained weights by the network's names."""
    around = "stem_head." if model.shared != "per_block" else f"blocks.{chosen[0]}.stem_head."
    names = {f"{around}stem.embedding.embeddings.": family.embeddings}
    for part, paths in (("stem.embedding.positions", family.positions), ("head.before", family.before)):
        names |= {f"{around}{part}.{i}.": path for i, path in enumerate(paths)}
    names |= {f"{around}head.after.{i}.": path for i, path in enumerate(family.after)}
    place = 0
    for b in chosen:
        for i in range(model.partition.layers[b]):
            names[f"blocks.{b}.layers.{i}.layer."] = f"{layers_name(network, family)}.{place}"
            place += 1
    return _renamed(model, chosen, {prefix: f"{path}." for prefix, path in names.items()})


def _renamed(model: DiffusionBlocks, chosen: list[int], names: dict[str, str]) -> dict[str, Tensor]:
    """Return the weights of what all blocks share and of the chosen blocks, with other beginnings of their names."""
    with model.averages():
        parts = ["shared", *(f"block_{b}" for b in chosen)]
        ours = {name: t.detach().cpu() for part in parts for name, t in model.part_weights(part).items()}
    return {
        path + name.removeprefix(prefix): t
        for prefix, path in names.items()
        for name, t in ours.items()
        if name.startswith(prefix)
    }


def _latent_network(model: DiffusionBlocks, block: int) -> nn.Module:
    """Return one of diffusers' networks of a block's layers."""
    assert model.origin is not None
    described, first = model.origin["network"], sum(model.partition.layers[:block])
    config, depth = dict(described["config"]), model.partition.layers[block]
    around = "stem_head." if model.shared != "per_block" else f"blocks.{block}.stem_head."
    names, offset = {f"{around}stem.": "", f"{around}head.": ""}, 0
    for path, count in diffusers.FAMILIES[model.origin["kind"]].layers:
        ours = range(max(first, offset), min(first + depth, offset + config[count]))
        names |= {f"blocks.{block}.layers.{i - first}.layer.": f"{path}.{i - ours.start}." for i in ours}
        offset, config[count] = offset + config[count], len(ours)
    if "dual_attention_layers" in config:
        config["dual_attention_layers"] = [i - first for i in config["dual_attention_layers"] if i >= first]
    network = rebuild_network({**model.origin, "network": {**described, "config": config}})
    _load(network, _renamed(model, [block], names))
    return network.eval()


def _load(network: Any, state: dict[str, Tensor]) -> None:
    """Load all weights. Raises: ValueError unless every one has its place, and every place a weight."""
    own = network.state_dict()
    other = [name for name in state if name in own and own[name].shape != state[name].shape]
    state = {name: t for name, t in state.items() if name not in other}
    missing, extra = network.load_state_dict(state, strict=False)
    loaded = {own[name].data_ptr() for name in state if name in own}
    missing = [name for name in missing if own[name].data_ptr() not in loaded]  # tied to another, it has its weight
    changed = [name for name in state if name in own and not torch.equal(own[name], state[name].to(own[name].dtype))]
    if wrong := {*other, *missing, *extra, *changed}:
        raise ValueError(f"{type(network).__name__} of these layers has no place for {', '.join(sorted(wrong)[:4])}")
