"""Converters of known networks, found by the network's class."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from torch import nn

from ..blocks import DiffusionBlocks

Convert = TypeVar("Convert", bound=Callable[..., DiffusionBlocks])


class Converter(NamedTuple):
    """How networks of a class become blocks, and are described in a file and built from that.

    describe: network -> JSON values; build: JSON values -> an untrained network like it. None where a file can't hold
    what building takes.
    """

    convert: Callable[..., DiffusionBlocks]
    describe: Callable[[Any], dict[str, Any]] | None
    build: Callable[[dict[str, Any]], nn.Module] | None


_CONVERTERS: dict[str, Converter] = {}
_KNOWN = {"transformers.models.vit.modeling_vit.ViTForImageClassification": "transformers"}  # its module here


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


def convert(network: nn.Module, blocks: int, **options: Any) -> DiffusionBlocks:
    """Return a network of a known class as `blocks` denoising blocks; its modules are used in place.

    Known: transformers' ViTForImageClassification, and what `register` added. For others see `from_layers`.

    Args:
        network: Pretrained or not.
        blocks: How many blocks.
        options: The converter's own, e.g. shared="per_block", overlap=0.05.

    Raises: TypeError if the class isn't known; ValueError if blocks exceeds the network's layers.
    """
    names = [_name(kind) for kind in type(network).__mro__]
    for name in names:
        found = _find(name)
        if found is not None:
            model = found.convert(network, blocks, **options)
            if found.describe is not None and found.build is not None:
                network_config = found.describe(network)
                model.origin = {"kind": name, "network": network_config, "blocks": blocks, "options": options}
            return model
    raise TypeError(
        f"no converter for {names[0]}; known: {', '.join(sorted({*_CONVERTERS, *_KNOWN}))}. Use from_layers(layers, "
        "stem=, head=, target=, blocks=), or @register(Class) a converter"
    )


def rebuild(origin: dict[str, Any]) -> DiffusionBlocks:
    """Return an untrained model like the one that `convert` made.

    Raises: ValueError if its class has no converter here.
    """
    found = _find(origin["kind"])
    if found is None or found.build is None:
        raise ValueError(f"no converter builds {origin['kind']}: import the module that registers it, or pass model")
    return convert(found.build(origin["network"]), origin["blocks"], **origin["options"])


def _find(name: str) -> Converter | None:
    if name in _KNOWN and name not in _CONVERTERS:
        importlib.import_module(f".{_KNOWN[name]}", __package__)
    return _CONVERTERS.get(name)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
