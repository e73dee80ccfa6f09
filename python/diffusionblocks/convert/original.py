"""Trained blocks given back as networks of the class that they were converted from, or in the place of one."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import DiffusionBlocks
from ..offloadable import plain_name
from ..targets.scheduled import ScheduledTarget
from .left_out import warn_of_left_out
from .likeness import PASSING, differences, set_dropout, weightless
from .registry import Converter, Places, built_in, rebuild_network
from .routed import Routed

_COPY = re.compile(r"\.modules_to_save\.[^.]+\.")  # where peft keeps a module's trained copy, beside the module


def to_original(model: DiffusionBlocks, block: int | None = None) -> nn.Module:
    """Return a network of the converted one's class with the trained weights, averaged where there are any.

    Its save_pretrained, or timm's state dict, is what others load. AdaLN that was added has no place in such a network,
    so one of transformers or timm must have been converted with cond=0.

    Args:
        model: From `convert` with a network of transformers or timm and cond=0, or one of diffusers.
        block: A network of this block's layers alone, which computes what that block does: model.logits(x, block), or
            of masked tokens and latents the block's denoiser (with averages, under model.averages()). None: of one
            block the whole network. Of several blocks of diffusers' network a module in its place, which asks the block
            that owns the timestep: `pipe.transformer = db.to_original(model)`. Of several blocks otherwise all layers,
            which were never trained to follow each other: a start for training end to end, and a warning says so.

    Returns:
        A network on the CPU, in evaluation mode; the module in its place works on the model itself.

    Raises: ValueError if the class has no place for something that was trained.
    """
    if block is not None:
        model.partition.check_block(block)
    converter = _converter_of(model)
    chosen = list(range(len(model.blocks))) if block is None else [block]
    if len(chosen) > 1:
        if isinstance(model.target, ScheduledTarget):
            return Routed(model)
        if model.shared == "per_block":
            raise ValueError(
                "each block has a stem and head of its own: to_original(model, block=...) gives one block's"
            )
        warnings.warn(
            "the blocks' layers weren't trained to follow each other: as one network they need training end to end; "
            "to_original(model, block=...) gives a network that computes what that block does",
            stacklevel=2,
        )
    assert model.origin is not None and converter.cut is not None and converter.places is not None
    described, first = model.origin["network"], sum(model.partition.layers[: chosen[0]])
    layers = range(first, first + sum(model.partition.layers[b] for b in chosen))
    network = rebuild_network({**model.origin, "network": {**converter.cut(described, layers), "dropout": {}}})
    found = converter.places(network, described, layers)
    _load(network, _state(model, chosen, found))
    whole = weightless(rebuild_network, model.origin)
    places = converter.places(whole, described, range(sum(model.partition.layers)))
    renamed = dict(zip(places.layers[layers.start : layers.stop], found.layers, strict=True))
    _check_layers(whole, network, renamed)
    _keep_dropout(network, described.get("dropout", {}), places.layers, renamed)
    warn_of_left_out(model)
    return network.eval()


def _converter_of(model: DiffusionBlocks) -> Converter:
    origin = model.origin
    converter = None if origin is None else built_in(origin["kind"])
    if origin is None or converter is None or converter.cut is None:
        raise ValueError("to_original needs a model from `convert` of a network of transformers, diffusers or timm")
    if not isinstance(model.target, ScheduledTarget) and origin["options"].get("cond") != 0:
        raise ValueError(
            f"the layers have AdaLN conditioning, which {origin['kind'].rpartition('.')[2]} has no place for: convert "
            "with cond=0, or keep the model as blocks (save_pretrained and load)"
        )
    return converter


def _state(model: DiffusionBlocks, chosen: list[int], places: Places) -> dict[str, Tensor]:
    """Return the trained weights by the network's names."""
    around = "stem_head." if model.shared != "per_block" else f"blocks.{chosen[0]}.stem_head."
    names = {around + ours: theirs for ours, theirs in places.around.items()}
    ours = [f"blocks.{b}.layers.{i}.layer." for b in chosen for i in range(model.partition.layers[b])]
    names |= dict(zip(ours, places.layers, strict=True))
    with model.averages():
        parts = ["shared", *(f"block_{b}" for b in chosen)]
        given = [item for part in parts for item in model.part_weights(part).items()]
        weights = {plain_name(name): t.detach().cpu() for name, t in given}
    return {
        theirs + name.removeprefix(ours): t
        for ours, theirs in names.items()
        for name, t in weights.items()
        if name.startswith(ours)
    }


def _check_layers(whole: nn.Module, network: nn.Module, renamed: dict[str, str]) -> None:
    """Raise ValueError unless layers compute what they do in the whole network. renamed: their names there and here."""
    for old, new in renamed.items():
        layers = network.get_submodule(new[:-1]), whole.get_submodule(old[:-1])
        if wrong := next(differences(*layers, ignored=(*PASSING, "layer_idx")), None):
            raise ValueError(
                f"{old[:-1]} depends on its place: as {new[:-1]} of a network of its own {wrong}; keep the model as "
                "blocks (save_pretrained and load)"
            )


def _keep_dropout(network: nn.Module, changed: dict[str, float], layers: list[str], renamed: dict[str, str]) -> None:
    """Set dropout as it was changed by hand in the whole network. layers: names there; renamed: those that are here."""
    for name, value in changed.items():
        old = next((layer for layer in layers if name.startswith(layer)), "")
        if not old or old in renamed:
            set_dropout(network, {renamed.get(old, "") + name.removeprefix(old): value})


def _load(network: Any, state: dict[str, Tensor]) -> None:
    """Load all weights. Raises: ValueError unless every one has its place, and every place a weight."""
    own = network.state_dict()
    copies = {_COPY.sub(".", name): name for name in own if _COPY.search(name)}
    for name in copies.keys() & state.keys():
        copy = copies[name]
        state[copy] = state[_COPY.sub(".original_module.", copy)] = state.pop(name)
    for name, source in (getattr(network, "_tied_weights_keys", None) or {}).items():
        if name in state and source not in state:  # untied, it isn't used: BERT's bias beside its decoder's
            state[source] = state[name]
    other = [name for name in state if name in own and own[name].shape != state[name].shape]
    state = {name: t for name, t in state.items() if name not in other}
    missing, extra = network.load_state_dict(state, strict=False)
    loaded = {own[name].data_ptr() for name in state if name in own}
    missing = [name for name in missing if own[name].data_ptr() not in loaded]  # tied to another, it has its weight
    changed = [name for name in state if name in own and not torch.equal(own[name], state[name].to(own[name].dtype))]
    if wrong := {*other, *missing, *extra, *changed}:
        raise ValueError(f"{type(network).__name__} of these layers has no place for {', '.join(sorted(wrong)[:4])}")
