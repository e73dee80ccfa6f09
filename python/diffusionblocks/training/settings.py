"""Values of settings, checked by their fields' types: a wrong one is named, and what is meant is stored."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import numbers
import operator
import os
import types
import typing
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy

Config = TypeVar("Config")


def settings_from(kind: type[Config], config: Config | None, settings: dict[str, Any], *others: str) -> Config:
    """Return a config with other settings in place of its own.

    others: Arguments that are given beside settings, and may be what a mistyped name meant.
    Raises: TypeError, naming what isn't a setting.
    """
    if config is not None and not isinstance(config, kind):
        raise TypeError(
            f"config must be a {kind.__name__}, got {type(config).__name__}: settings are keywords, e.g. lr=1e-3"
        )
    known = [f.name for f in dataclasses.fields(kind if config is None else type(config))]  # type: ignore[arg-type]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *others], 1)
            raise TypeError(
                f"there is no setting {name!r}; {f'perhaps {near[0]}' if near else 'known: ' + ', '.join(known)}"
            )
    return kind(**settings) if config is None else dataclasses.replace(config, **settings)  # type: ignore[type-var]


def take_types(config: Any) -> None:
    """Give every field of a frozen config a value of its type, e.g. a tuple for a list, an int for numpy's.

    Raises: ValueError, naming the field whose value has another type, isn't finite, or isn't among the choices.
    """
    for name, type_ in _types(type(config)).items():  # type: ignore[arg-type]
        object.__setattr__(config, name, typed(name, type_, getattr(config, name)))


@functools.cache
def _types(kind: Hashable) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}  # type: ignore[arg-type]


def typed(name: str, type_: Any, value: Any) -> Any:
    """Return a value as a type: None, a number, a switch, a path, a choice, or a tuple of such; others as they are."""
    options = typing.get_args(type_) if typing.get_origin(type_) in (typing.Union, types.UnionType) else (type_,)
    if value is None and type(None) in options:
        return None
    (type_,) = [option for option in options if option is not type(None)]
    if type_ is bool or typing.get_origin(type_) is Literal:
        choices = (False, True) if type_ is bool else typing.get_args(type_)
        return _choice(name, (None, *choices) if type(None) in options else choices, value)
    if typing.get_origin(type_) is tuple:
        return _tuple(name, typing.get_args(type_), value)
    if type_ in (int, float):
        return _number(name, type_, value)
    if type_ is Path:
        if not isinstance(value, (str, os.PathLike)):
            raise ValueError(f"{name} must be a path, got {value!r}")
        return Path(value)
    return value


def _choice(name: str, choices: Sequence[Any], value: Any) -> Any:
    plain = value.item() if isinstance(value, numpy.generic) else value
    for choice in choices:
        if type(plain) is type(choice) and plain == choice:
            return choice
    raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _number(name: str, type_: type, value: Any) -> int | float:
    wanted: Any = numbers.Integral if type_ is int else numbers.Real
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise ValueError(f"{name} must be a {'whole ' if type_ is int else ''}number, got {value!r}")
    if type_ is int:
        return operator.index(value)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def _tuple(name: str, items: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    if isinstance(value, str) and typing.get_origin(items[0]) is Literal:
        value = (value,)
    count = None if items[-1] is Ellipsis else len(items)
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != (count or len(value)):
        example = "(2, 4)" if items[0] is int else "(1e-3, 2e-3)" if items[0] is float else "('a', 'b')"
        raise ValueError(f"{name} must be a tuple{f' of {count}' if count else ''}, e.g. {example}, got {value!r}")
    return tuple(typed(f"each of {name}", items[0], item) for item in value)
