"""`python -m diffusionblocks`: the `dblocks` command."""

import sys


def main() -> None:
    """Run the command, or say which extra it needs."""
    try:
        from diffusionblocks.experiments.cli import main as run
    except ModuleNotFoundError as error:
        print(f"dblocks needs {error.name}: pip install 'diffusionblocks[experiments]'", file=sys.stderr)
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
