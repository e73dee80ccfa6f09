"""Parse the command line: presets as subcommands, and errors in a line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import io
import itertools
import re
import shutil
import sys
import types as types_
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from .config import Hidden, from_yaml
from .presets import RUNS

_COLOUR = r"\x1b\[[\d;]*m"  # tyro colours what it prints if stdout is a terminal
RENAMED = {"--to": "--out"}  # export and sample had another name for what is --out everywhere
_WHOLE = r"^Error parsing [\w.-]*config[\w.-]*: "  # of a whole preset: the fault names the setting
_SEVERAL = r"^Error parsing (\S+): (?:no type matching .* could be instantiated from|.*for arguments:) \['(.*?)'\]"
_WRONG = r"^Error parsing (\S+): (must be .*)"
_KINDS = {int: "a whole number", float: "a number", str: "a text", Path: "a path"}
FLAGS = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.CascadeSubcommandArgs)


def presets_of(arguments: list[str]) -> Any:
    """Return the presets as subcommands; the settings of `--config FILE`, which is removed, are the named one's
    defaults, and what the file leaves out stays as the preset has it."""
    runs = {name: config for name, (_, config) in RUNS.items()}
    if "--config" in arguments:
        at = arguments.index("--config")
        if at + 1 == len(arguments):
            raise ValueError("--config needs a file, e.g. runs/vit-digits/config.yaml")
        path = Path(arguments[at + 1])
        del arguments[at : at + 2]
        named = [name for name in runs if name in arguments]
        if not named:
            raise ValueError(f"--config: name a preset, too, e.g. dblocks train vit-digits --config {path}")
        preset = runs[named[0]]
        try:
            runs[named[0]] = dataclasses.replace(from_yaml(path.read_text(), preset), out=preset.out)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error
    more = {name: f"{text}. Options for special cases: see dblocks train --help" for name, (text, _) in RUNS.items()}
    texts = {name: more[name] if name in arguments else text for name, (text, _) in RUNS.items()}
    return tyro.extras.subcommand_type_from_defaults(runs, texts, prefix_names=False)


def parse(table: dict[str, Callable[..., Any]], arguments: list[str], description: str) -> Callable[[], Any]:
    """Return the command with its arguments; what can't be parsed is two lines instead of the parser's forty."""

    def later(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def bound(*args: Any, **values: Any) -> Any:
            return functools.partial(command, *args, **values)

        return bound

    arguments = [RENAMED.get(argument, argument) for argument in arguments]
    _check_names(list(table), arguments)
    _check_tuned(arguments)
    Hidden.shown = not {"-h", "--help"} & set(arguments)
    commands_ = {name: later(command) for name, command in table.items()}
    said, shown = io.StringIO(), _Help(sys.stdout)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(shown), _rules():
            call: Callable[[], Any] = tyro.extras.subcommand_cli_from_dict(
                commands_, prog="dblocks", description=description, args=arguments, config=FLAGS
            )
    except SystemExit as stop:
        if stop.code:
            path = " ".join(["dblocks", *(a for a in arguments[:2] if a in table or a in RUNS)])
            print(f"dblocks: {_short(said.getvalue()).rstrip('.')}; see {path} --help", file=sys.stderr)
        print(_fitting(shown.getvalue(), "PRESET" if arguments[:1] in (["train"], ["plan"]) else "COMMAND"), end="")
        raise
    return call


class _Help(io.StringIO):
    """Takes the help in a stream's place: with colours if that is a terminal, with frames if its encoding has them."""

    encoding = ""  # io.StringIO's can't be set

    def __init__(self, stream: TextIO):
        super().__init__()
        self.isatty, self.encoding = stream.isatty, stream.encoding  # type: ignore[method-assign,assignment]


def _fitting(help_: str, name: str) -> str:
    """Return a help whose first line, of usage, fits into the terminal: by a name for choices that are listed below."""
    usage, newline, rest = help_.partition("\n")
    if len(re.sub(_COLOUR, "", usage)) > shutil.get_terminal_size().columns:
        usage = re.sub(r"\{.*\}", name, usage)
    return usage + newline + rest


def _rules() -> ConstructorRegistry:
    """Return how tyro takes numbers, texts and paths, optional or not: the help shows the type without `{None}|`."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def simple(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        types = [info.type]
        if info.type_origin in (typing.Union, types_.UnionType):
            types = [type_ for type_ in typing.get_args(info.type) if type_ is not type(None)]
        if len(types) != 1 or types[0] not in _KINDS:
            return None
        kind, optional = types[0], types != [info.type]

        def read(words: list[str]) -> Any:
            try:
                return None if optional and words == ["None"] else kind(words[0])
            except ValueError:
                raise ValueError(f"must be {_KINDS[kind]}, got {words[0]}") from None

        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=kind.__name__.upper(),
            instance_from_str=read,
            is_instance=lambda value: (optional and value is None) or isinstance(value, kind),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _check_tuned(arguments: list[str]) -> None:
    """Raise ValueError on settings of baselines where none is trained."""
    following = [*arguments, "-"][arguments.index("--baseline") + 1] if "--baseline" in arguments else ""
    if following.startswith("-") and (named := [a for a in arguments if a.startswith("--tune-")]):
        raise ValueError(f"{named[0]} is for baselines, and --baseline without a name trains none: leave one out")


def _short(text: str) -> str:
    """Return the parser's error without colours, frame, help texts and other commands' options."""
    lines = [line.strip("│╭╮╰╯+| ") for line in re.sub(_COLOUR, "", text).splitlines()]
    rules = [i for i, line in enumerate(lines) if len(line) > 9 and set(line) <= {*"─-"}]  # dashes where no UTF-8 is
    begin = 2 if 1 in rules else 1
    rule = next((i for i in rules if i > begin), len(lines))
    fault = re.sub(r"\s+", " ", " ".join(lines[begin:rule])).strip()
    wrong = re.findall(r"--[\w.-]+", fault)
    known = [word for line in lines[rule:] for word in re.findall(r"^(--[\w.-]+)", line)]
    near = difflib.get_close_matches(wrong[0], known, 1, 0.0) if wrong and "nrecognized" in fault else []
    if near:
        return f"unrecognized option {wrong[0]}; perhaps {near[0]}"
    fault = re.sub(_WHOLE, "", fault)
    if wrong_value := re.search(_WRONG, fault):
        return " ".join(wrong_value.groups())
    if several := re.search(_SEVERAL, fault):
        option, words = several[1], several[2].replace("', '", " ")
        return f"{option} doesn't take {words!r}"
    return fault.split(" Arguments are applied")[0] or "bad arguments"


def _check_names(commands: list[str], arguments: list[str]) -> None:
    """Raise ValueError, with a suggestion, on a command or preset that doesn't exist or isn't named."""
    asks = {"-h", "--help"} & set(arguments)
    if arguments and arguments[0].startswith("-") and not asks:
        raise ValueError(
            f"name a command first, e.g. dblocks train vit-digits {arguments[0]}; dblocks --help lists them"
        )
    if arguments[:1] in (["train"], ["plan"]) and arguments[1:2] and arguments[1].startswith("-") and not asks:
        first = f"dblocks {arguments[0]} vit-digits {arguments[1]}"
        raise ValueError(f"name a preset first, e.g. {first}; dblocks {arguments[0]} --help lists them")
    if arguments[:1] in (["presets"], ["list"]):
        raise ValueError("there is no command of that name: dblocks train --help lists the presets")
    for name, known in itertools.chain(
        [(arguments[0], commands)] if arguments else [],
        [(arguments[1], list(RUNS))] if len(arguments) > 1 and arguments[0] in ("train", "plan") else [],
    ):
        if not name.startswith("-") and name not in known:
            near = difflib.get_close_matches(name, known, 1)
            perhaps = f"perhaps {near[0]}" if near else f"known: {', '.join(known)}"
            raise ValueError(f"there is no {name!r}; {perhaps}")
