"""`python -m diffusionblocks` is the command; without its extra it names the missing package."""

from __future__ import annotations

import builtins
import subprocess
import sys

import pytest

from diffusionblocks.__main__ import main


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "diffusionblocks", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("diffusionblocks ")


def test_a_missing_extra_is_named(monkeypatch, capsys):
    real = builtins.__import__

    def without_tyro(name, *args, **kwargs):
        if name == "diffusionblocks.experiments.cli":
            raise ModuleNotFoundError("No module named 'tyro'", name="tyro")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tyro)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "pip install 'diffusionblocks[experiments]'" in capsys.readouterr().err
