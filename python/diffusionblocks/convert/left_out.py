"""What was changed about a converted model's modules, or hangs on them: files and `to_original` don't have it."""

from __future__ import annotations

import contextlib
import functools
import types
import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .likeness import HOOKS, differences, dropout, is_close, tables, ties, weightless
from .registry import built_in, rebuild_network

OURS = __name__.partition(".")[0]
LIBRARIES = ("transformers", "diffusers", "peft", "accelerate")  # their hooks come with what a file says


def warn_of_left_out(model: Any) -> None:
    """Warn of what a model's modules have and the network that is built anew hasn't: hooks, other methods."""
    converter = None if model.origin is None else built_in(model.origin["kind"])
    if converter is None or converter.places is None:  # what else builds it may make hooks, too
        return
    found = [*_hooked(model), *_replaced(model)]
    built = None
    # What can't be built anew isn't compared: a warning costs no save, nor a whole network's memory
    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError, ImportError):
        built = weightless(rebuild_network, model.origin, else_whole=False)
    if built is not None:
        found += _changed(model, built, _pairs(model, converter, built))
        if model.offloader is None:  # else some wait elsewhere
            found += _recomputed(model, built)
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


def _replaced(model: nn.Module) -> Iterator[str]:
    """Yield methods of modules of this package that were replaced."""
    for name, module in model.named_modules():
        for key in vars(module) if _library(type(module)) == OURS else ():
            if isinstance(getattr(type(module), key, None), types.FunctionType):
                yield f"{name}.{key} was replaced"


def _library(thing: Any) -> str:
    function = thing.func if isinstance(thing, functools.partial) else thing
    return str(getattr(function, "__module__", "")).partition(".")[0]


def _pairs(model: Any, converter: Any, built: nn.Module) -> list[tuple[str, str]]:
    """Return how names begin in the model and in the network."""
    counts = model.partition.layers
    places = converter.places(built, model.origin["network"], range(sum(counts)))
    own = dict(model.named_modules())
    ours = [_inmost(own, f"blocks.{b}.layers.{i}.layer") for b, count in enumerate(counts) for i in range(count)]
    arounds = ["stem_head."] if model.shared != "per_block" else [f"blocks.{b}.stem_head." for b in range(len(counts))]
    around = [(begin + name, theirs) for begin in arounds for name, theirs in places.around.items()]
    return [*zip((f"{name}." for name in ours), places.layers, strict=True), *around]


def _inmost(modules: dict[str, nn.Module], name: str) -> str:
    """Return the name of the network's own layer within what we, or torch.compile, put around it; of no module if that
    was replaced."""
    head, _, last = name.rpartition(".")
    if name not in modules:  # the module that should hold it may be compiled
        name = f"{head}._orig_mod.{last}"
    while inner := next((f"{name}.{at}" for at in ("_orig_mod", "layer") if f"{name}.{at}" in modules), None):
        if inner.endswith(".layer") and _library(type(modules[name])) != OURS:  # the network's own may have one
            break
        name = inner
    return name


def _changed(model: nn.Module, built: nn.Module, pairs: list[tuple[str, str]]) -> Iterator[str]:
    own, whole = dict(model.named_modules()), dict(built.named_modules())
    for here, there in ((here.rstrip("."), there) for here, there in pairs):
        if here not in own and ".layers." in here:
            yield f"{here.replace('._orig_mod', '')} is missing"
        inner = [""] if there else [name for name, _ in own[here].named_children()]  # of a stem that has the network's
        for at in inner:
            name, other = f"{here}.{at}".rstrip("."), (there + at).rstrip(".")
            if name in own and other in whole and type(whole[other]).__name__ != "ModulesToSaveWrapper":
                yield from (f"{name}.{said}" for said in _said(own[name], whole[other]))
    yield from _untied(model, built, pairs)


def _said(module: nn.Module, wanted: nn.Module) -> Iterator[str]:
    yield from differences(module, wanted)
    yield from (f"{key} is {value}" for key, value in dropout(module, wanted).items() if key.endswith(".p"))
    made = dict(wanted.named_modules())
    for name, adapter in module.named_modules():  # of peft
        for key in ("scaling", "merged_adapters", "_disable_adapters"):
            if key in vars(adapter) and vars(adapter)[key] != vars(made.get(name, adapter)).get(key):
                yield f"{name}.{key.lstrip('_')} is {vars(adapter)[key]}"


def _recomputed(model: nn.Module, built: nn.Module) -> Iterator[str]:
    """Yield buffers in no file, such as angles, that are none of the network's of that name."""
    made: dict[str, list[Tensor]] = {}
    for _, name, t in tables(built):
        made.setdefault(name, []).append(t)
    for at, name, t in tables(model):
        if name in made and not any(is_close(t, wanted) for wanted in made[name]):
            yield f"the values of {at}.{name}"


def _untied(model: nn.Module, built: nn.Module, pairs: list[tuple[str, str]]) -> Iterator[str]:
    """Yield weights that the network ties and the model doesn't, and the reverse."""

    def theirs(name: str) -> str | None:
        return next((there + name.removeprefix(here) for here, there in pairs if name.startswith(here)), None)

    known = {found for name, _ in model.named_parameters(remove_duplicate=False) if (found := theirs(name))}
    own = {frozenset(filter(None, map(theirs, names))) for names in ties(model)}
    whole = {names & known for names in ties(built)}
    for names in {names for names in own ^ whole if len(names) > 1}:
        yield f"{' and '.join(sorted(names))} are {'tied' if names in own else 'not tied'}"
