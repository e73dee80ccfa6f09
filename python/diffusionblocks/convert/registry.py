"""Converters of known networks, found by the network's class."""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from torch import nn

from ..blocks import DiffusionBlocks
from .checks import check_given
from .likeness import CALLED, check_hooks, check_like, dropout, set_dropout

Convert = TypeVar("Convert", bound=Callable[..., DiffusionBlocks])


class Places(NamedTuple):
    """Where a network has what blocks were made of.

    around: how names begin in a StemHead -> in the network. layers: how those of each layer begin in the network.
    """

    around: dict[str, str]
    layers: list[str]


class Converter(NamedTuple):
    """How networks of a class become blocks, are described in a file and built from that, and are given back.

    describe: network -> JSON values; build: JSON values -> an untrained network like it. None where a file can't hold
    what building takes. cut: JSON values, some of the layers -> those of a network of these layers; places: such a
    network, JSON values of the whole one, the layers -> Places. None where `to_original` gives nothing back.
    """

    convert: Callable[..., DiffusionBlocks]
    describe: Callable[[Any], dict[str, Any]] | None
    build: Callable[[dict[str, Any]], nn.Module] | None
    cut: Callable[[dict[str, Any], range], dict[str, Any]] | None = None
    places: Callable[[nn.Module, dict[str, Any], range], Places] | None = None


_CONVERTERS: dict[str, Converter] = {}  # those that `register` added
_LIBRARIES = ("transformers", "diffusers", "timm")  # each has a module here, with CONVERTERS


def register(
    kind: type | str,
    *,
    describe: Callable[[Any], dict[str, Any]] | None = None,
    build: Callable[[dict[str, Any]], nn.Module] | None = None,
) -> Callable[[Convert], Convert]:
    """Return a decorator that makes a function the converter of networks of class `kind`.

    Args:
        kind: The class, or its dotted name where importing it would cost too much.
        describe: Returns JSON values that describe a network, so that `load` can build one like it.
        build: Returns an untrained network from that description.

    Examples:
        >>> import torch, diffusionblocks as db
        >>> class Net(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.stem, self.head = torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)
        ...         self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))
        >>> @db.register(Net)
        ... def convert_net(network, blocks, **options):
        ...     return db.from_layers(network.layers, stem=network.stem, head=network.head,
        ...                           target=db.LabelTarget(3, 8), blocks=blocks, **options)
        >>> len(db.convert(Net(), blocks=2).blocks)
        2
    """

    def keep(function: Convert) -> Convert:
        _CONVERTERS[kind if isinstance(kind, str) else _name(kind)] = Converter(function, describe, build)
        return function

    return keep


def convert(network: nn.Module, blocks: int | Sequence[int], **options: Any) -> DiffusionBlocks:
    """Return a network of a known class as denoising blocks, which train a copy: the network stays as it is.

    Known: transformers' ViT, DeiT and DINOv2, BERT and ModernBERT, Llama, Qwen, Mistral and GPT-2, with the heads
    listed in docs/guides/transformers.md, timm's ViT, DeiT and EVA-02, diffusers' DiT, PixArt, SD3, Flux and Wan
    (docs/guides/diffusers.md), and what `register` added. For others see `from_layers`.

    Args:
        network: Pretrained or not. `del network` afterwards frees its memory.
        blocks: How many blocks, or the layers of each.
        options: The converter's own, e.g. shared="per_block", overlap=0.05, cond=0.

    Raises: TypeError if the class or an option isn't known; ValueError if the network or an option doesn't fit.
    """
    check_given(network)
    name, found = _found(type(network))
    _check_options(found.convert, type(network).__name__, options)
    if name.startswith("transformers.") and name not in _CONVERTERS and getattr(network, "peft_config", None):
        raise ValueError("the network has an adapter: import diffusionblocks.integrations.peft first")
    # A copy: blocks move their weights away, and some have stems and heads of their own.
    model = found.convert(copy.deepcopy(network), blocks, **options)
    if found.describe is not None and found.build is not None:
        described = found.describe(network)
        if built_in(name) is not None:
            rebuilt = check_like(network, found.build, described)
            check_hooks(network, model)
            described |= {"dropout": dropout(network, rebuilt)}
        counts = list(blocks) if isinstance(blocks, Sequence) else blocks
        model.origin = {"kind": name, "network": described, "blocks": counts, "options": options}
    return model


def _found(kind: type) -> tuple[str, Converter]:
    """Return the converter of a class or of the nearest that it is derived from, with its name."""
    for base in kind.__mro__:
        found = find(_name(base))
        if found is not None:
            if own := [name for name in CALLED if getattr(kind, name, None) is not getattr(base, name, None)]:
                raise TypeError(
                    f"{kind.__name__} has a {own[0]} of its own, which blocks made as of a {base.__name__} would leave "
                    f"out: @register({kind.__name__}) a converter, or convert a {base.__name__}"
                )
            return _name(base), found
    raise TypeError(_unknown(kind))


def _check_options(converter: Callable[..., DiffusionBlocks], name: str, options: dict[str, Any]) -> None:
    """Raise TypeError unless a converter takes these options."""
    converter = inspect.unwrap(converter)  # of a network with an adapter: that of one without
    bound = getattr(converter, "keywords", {})
    parameters = [p for p in list(inspect.signature(converter).parameters.values())[2:] if p.name not in bound]
    known = [p.name for p in parameters]
    wrong = [name for name in options if name not in known]
    if wrong and not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        raise TypeError(f"convert has no option {wrong[0]!r} for a {name}, only {', '.join(known)}")


def _unknown(kind: type) -> str:
    known = {*_CONVERTERS, *(name for library in _LIBRARIES for name in _converters(library))}
    near = {name for name in known if name.rpartition(".")[0] == kind.__module__}  # e.g. with a head, where it has none
    listed = ", ".join(sorted(name.rpartition(".")[2] for name in near or known))
    return (
        f"no converter for {_name(kind)}; known{' beside it' if near else ''}: {listed}. Load the network as one of "
        "these, use from_layers(layers, stem=, head=, target=, blocks=), or @register(Class) a converter"
    )


def rebuild(origin: dict[str, Any]) -> DiffusionBlocks:
    """Return an untrained model like the one that `convert` made.

    Raises: ValueError if its class has no converter here.
    """
    found = _converter(origin)
    model = found.convert(rebuild_network(origin), origin["blocks"], **origin["options"])
    model.origin = origin
    return model


def rebuild_network(origin: dict[str, Any]) -> nn.Module:
    """Return an untrained network like the one that was converted.

    Raises: ValueError if its class has no converter here.
    """
    build = _converter(origin).build
    assert build is not None
    if "adapter" in origin["network"] and "diffusionblocks.integrations.peft" not in sys.modules:
        raise ValueError("the network has an adapter: import diffusionblocks.integrations.peft first")
    network = build(origin["network"])
    set_dropout(network, origin["network"].get("dropout", {}))
    return network


def _converter(origin: dict[str, Any]) -> Converter:
    found = find(origin["kind"])
    if found is None or found.build is None:
        raise ValueError(f"no converter builds {origin['kind']}: import the module that registers it, or pass model")
    return found


def find(name: str) -> Converter | None:
    """Return the converter of a class by its dotted name, None if there is none."""
    return _CONVERTERS.get(name) or built_in(name)


def built_in(name: str) -> Converter | None:
    """Return this package's own converter of a class by its dotted name, None if there is none."""
    library = name.partition(".")[0]
    return _converters(library).get(name) if library in _LIBRARIES else None


def _converters(library: str) -> dict[str, Converter]:
    found: dict[str, Converter] = importlib.import_module(f".{library}", __package__).CONVERTERS
    return found


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
