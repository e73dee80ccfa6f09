"""`python -m diffusionblocks`: the `dblocks` command."""

import os
import sys


def main() -> None:
    """Run the command, and end quietly on Ctrl-C, or where the reader of its output has gone (`| head -1`)."""
    try:
        try:
            _run()
        finally:
            sys.stdout.flush()  # at the interpreter's end it would be too late to catch its error
    except KeyboardInterrupt:  # e.g. while torch is imported, which takes seconds
        print("dblocks: stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        sys.exit(141)  # as shells say of a process that SIGPIPE ended


def _run() -> None:
    """Run the command, or say which extra it needs."""
    try:
        from diffusionblocks.experiments.cli import main as run
    except ModuleNotFoundError as error:
        print(f"dblocks needs {error.name}: pip install 'diffusionblocks[experiments]'", file=sys.stderr)
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
