"""The first signal ends a training after its step, with a checkpoint; the second one ends it at once."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading

import pytest

import tiny
from diffusionblocks.checkpoint import files
from diffusionblocks.experiments import cli, commands
from diffusionblocks.experiments.config import to_yaml
from diffusionblocks.experiments.interrupts import Interrupts, Stopped
from diffusionblocks.experiments.run_folder import write


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_is_remembered_and_handlers_come_back(number, capfd):
    before = signal.getsignal(number)
    with Interrupts().watched() as interrupts:
        assert interrupts.number is None
        os.kill(os.getpid(), number)
        assert interrupts.number == number
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(number) == before
    assert "stopping after this step" in capfd.readouterr().err


def test_a_second_one_stops_at_once():
    with pytest.raises(KeyboardInterrupt), Interrupts().watched():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)


def test_other_threads_watch_nothing():
    seen = []

    def work():
        with Interrupts().watched() as interrupts:
            seen.append(interrupts.number)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]


def signalled(monkeypatch, number, at):
    """Send a signal to this process after `at` steps."""
    note = commands.RunLog.on_step_end

    def on_step_end(self, trainer, output):
        if trainer.steps_done == at:
            os.kill(os.getpid(), number)
        note(self, trainer, output)

    monkeypatch.setattr(commands.RunLog, "on_step_end", on_step_end)


def test_a_stopped_run_is_saved_and_goes_on_bit_for_bit(tmp_path, monkeypatch):
    whole = commands.start(tiny.config(tmp_path / "whole"))["results"]["block-wise"]["test"]
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGINT, at=4)
        with pytest.raises(Stopped) as stop:
            commands.start(tiny.config(tmp_path / "run"))
    assert stop.value.saved and stop.value.number == signal.SIGINT
    assert files.read_state(tmp_path / "run" / "checkpoint").state["step"] == 4
    resumed = commands.resume(tmp_path / "run")["results"]["block-wise"]["test"]
    assert json.dumps(resumed) == json.dumps(whole)


def test_the_command_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    write(tmp_path / "run" / "config.yaml", to_yaml(tiny.config(tmp_path / "run")))
    signalled(monkeypatch, signal.SIGTERM, at=2)
    monkeypatch.setattr(sys, "argv", ["dblocks", "resume", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 143
    assert f"stopped by SIGTERM; saved. Go on with: dblocks resume {tmp_path / 'run'}" in capsys.readouterr().err


@pytest.mark.parametrize(("written", "words"), [
    ((), "stopped before the first step; nothing was written"),
    (("config.yaml",), "there is no checkpoint yet, it begins anew. Go on with: dblocks resume"),
    (("config.yaml", "checkpoint/manifest.json"), "the last checkpoint is kept. Go on with: dblocks resume"),
])  # fmt: skip
def test_a_stop_at_once_says_what_is_left(tmp_path, monkeypatch, capsys, written, words):
    def stopped(config, overwrite):
        for name in written:
            write(config.out / name, "")
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "start", stopped)
    with pytest.raises(SystemExit) as stop:
        cli.train(tiny.config(tmp_path / "run"))
    assert stop.value.code == 130 and words in capsys.readouterr().err
