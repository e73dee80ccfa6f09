"""How a command ends early, said in a line: by a signal, or by an error that its user can mend."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from ..training.finite import NonFiniteLoss
from .interrupts import Stopped


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Say how to go on after a training that ended early, and exit as shells expect."""
    try:
        yield
    except Stopped as stop:
        print(f"{stop}; {stop.kept}. Go on with: dblocks resume {folder}", file=sys.stderr)
        sys.exit(128 + stop.number)
    except KeyboardInterrupt:
        if not (folder / "config.yaml").exists():
            print("dblocks: stopped before the first step; nothing was written", file=sys.stderr)
        else:
            any_ = (folder / "checkpoint" / "manifest.json").exists()
            state = "the last checkpoint is kept" if any_ else "there is no checkpoint yet, it begins anew"
            print(f"dblocks: stopped at once; {state}. Go on with: dblocks resume {folder}", file=sys.stderr)
        sys.exit(130)
    except NonFiniteLoss as error:
        kept = (folder / "checkpoint" / "manifest.json").exists()
        way = f"dblocks resume {folder} --lr LOWER" if kept else "train again with a lower --lr, and --overwrite"
        print(f"dblocks: {error}. Go on with: {way}", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def mendable() -> Iterator[None]:
    """Print an error that a user can mend in one line, and exit with code 2."""
    try:
        yield
    except KeyboardInterrupt:
        print("dblocks: stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # of the output, whose reader has gone: no one is left to tell
        raise
    except OSError as error:
        named = f": {error.filename}" if error.filename else ""
        print(f"dblocks: {error.strerror or error}{named}", file=sys.stderr)
        sys.exit(2)
    except (ValueError, TypeError, ImportError) as error:
        print(f"dblocks: {_with_options(str(error))}", file=sys.stderr)
        sys.exit(2)


def one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Return a warning as a line without the code that gave it, which a command's user didn't write."""
    return f"dblocks: {_with_options(str(message))}\n"


def _with_options(text: str) -> str:
    """Name the option behind each setting that the library, which knows no options, says to set to a number."""

    def named(found: re.Match[str]) -> str:
        return f"{found[0]} (--{found[1].replace('_', '-')} {found[2]})"

    return re.sub(r"\bset (\w+)=(\d+)\b(?: or less)?(?! \(--)", named, text)
