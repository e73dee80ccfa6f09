"""How commands end early: by Ctrl-C, by a reader that has gone, by errors that name options."""

from __future__ import annotations

import builtins
import subprocess
import sys

import pytest

from diffusionblocks.__main__ import main
from diffusionblocks.experiments.endings import mendable, one_line


def test_ctrl_c_during_the_imports_is_a_line(monkeypatch, capsys):
    real = builtins.__import__

    def interrupted(name, *args, **kwargs):
        if name == "diffusionblocks.experiments.cli":
            raise KeyboardInterrupt
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", interrupted)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130 and capsys.readouterr().err == "dblocks: stopped\n"


@pytest.mark.parametrize("command", ["diffusionblocks --help", "diffusionblocks --version", "dbkernels"])
def test_a_reader_that_has_gone_is_no_error(command):
    process = subprocess.Popen(
        [sys.executable, "-m", *command.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141


def test_settings_to_change_are_named_as_options(capsys):
    advice = "2 of 3 blocks untrained (0, 2): set visit=2 or less"
    assert one_line(advice, UserWarning, "", 0) == f"dblocks: {advice} (--visit 2)\n"
    assert one_line("set adapt=False (--no-adapt)", UserWarning, "", 0).endswith("set adapt=False (--no-adapt)\n")
    with pytest.raises(SystemExit), mendable():
        raise ValueError("all begin as copies of one trunk, so set branch=0")
    assert capsys.readouterr().err.endswith("so set branch=0 (--branch 0)\n")
