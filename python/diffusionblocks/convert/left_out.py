"""What was changed about a converted model's modules, or hangs on them: files and `to_original` don't have it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from .likeness import HOOKS, differences, dropout, weightless
from .registry import built_in, rebuild_network

OURS = __name__.partition(".")[0]
LIBRARIES = ("transformers", "diffusers", "peft", "accelerate")  # their hooks come with what a file says


def warn_of_left_out(model: Any) -> None:
    """Warn of what a model's modules have and the network that is built anew hasn't: hooks, other methods."""
    found = [*_hooked(model), *_changed(model)]
    if found:
        warnings.warn(
            f"what was changed after convert is left out: {'; '.join(found[:4])}. Change in the same way what "
            "db.load or to_original gives",
            stacklevel=3,
        )


def _hooked(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        hooks = (hook for kind in HOOKS for hook in getattr(module, kind).values())
        if any(_library(hook) not in (*LIBRARIES, OURS) for hook in hooks):
            yield f"a hook on {name or 'the model'}"


def _library(thing: Any) -> str:
    function = thing.func if isinstance(thing, functools.partial) else thing
    return str(getattr(function, "__module__", "")).partition(".")[0]


def _inmost(modules: dict[str, nn.Module], name: str) -> str:
    """Return the name of the network's own layer within what we put around it."""
    while f"{name}.layer" in modules and _library(type(modules[name])) == OURS:
        name += ".layer"
    return name


def _changed(model: Any) -> Iterator[str]:
    converter = None if model.origin is None else built_in(model.origin["kind"])
    if converter is None or converter.places is None:
        return
    built = weightless(rebuild_network, model.origin)
    counts = model.partition.layers
    places = converter.places(built, model.origin["network"], range(sum(counts)))
    ours = [f"blocks.{b}.layers.{i}.layer." for b, count in enumerate(counts) for i in range(count)]
    pairs = list(zip(ours, places.layers, strict=True))
    arounds = ["stem_head."] if model.shared != "per_block" else [f"blocks.{b}.stem_head." for b in range(len(counts))]
    pairs += [(around + own, theirs) for around in arounds for own, theirs in places.around.items()]
    own, whole = dict(model.named_modules()), dict(built.named_modules())
    for here, there in ((_inmost(own, here.rstrip(".")), there) for here, there in pairs):
        inner = [""] if there else [name for name, _ in own[here].named_children()]  # of a stem that has the network's
        for at in inner:
            module, wanted = own.get(f"{here}.{at}".rstrip(".")), whole.get((there + at).rstrip("."))
            if module is not None and wanted is not None:  # else a parameter, or ours
                changed = {key: value for key, value in dropout(module, wanted).items() if key.endswith(".p")}
                told = [*differences(module, wanted), *(f"{key} is {value}" for key, value in changed.items())]
                yield from (f"{here}.{at}.{said}".replace("..", ".") for said in told)
