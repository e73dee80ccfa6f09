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
from diffusionblocks.experiments.tasks.vit import ViTTask


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
    assert stop.value.kept == "saved" and stop.value.number == signal.SIGINT
    assert files.read_state(tmp_path / "run" / "checkpoint").state["step"] == 4
    resumed = commands.resume(tmp_path / "run")["results"]["block-wise"]["test"]
    assert json.dumps(resumed) == json.dumps(whole)


@pytest.mark.parametrize(
    ("number", "done", "kept"),
    [(1, set(), "the training is saved, its evaluation begins anew"),
     (2, {"block-wise"}, "block-wise and its results are saved"),
     (3, {"block-wise"}, "this baseline begins anew"),
     (4, {"block-wise", "end-to-end"}, "end-to-end and its results are saved")],
)  # fmt: skip
def test_a_signal_stops_an_evaluation_after_its_split(number, done, kept, tmp_path, monkeypatch):
    evaluated = []
    config = tiny.config(tmp_path / "run", baseline=("end-to-end", "shallow"), tune_lr=(1e-3,), tune_warmup=(0.1,))
    for name in ("evaluate", "score"):
        real = getattr(ViTTask, name)

        def signalled_(self, network, split, *args, real=real, **options):
            evaluated.append(split)
            if len(evaluated) == number:
                os.kill(os.getpid(), signal.SIGINT)
            return real(self, network, split, *args, **options)

        monkeypatch.setattr(ViTTask, name, signalled_)
    with pytest.raises(Stopped) as stop:
        commands.start(config)
    assert len(evaluated) == number and stop.value.kept == kept
    assert {path.stem for path in (tmp_path / "run" / "results").glob("*")} == done


def test_a_signal_in_the_last_evaluation_lets_the_run_finish(tmp_path, monkeypatch):
    real = ViTTask.evaluate

    def evaluate(self, model, split, **options):
        os.kill(os.getpid(), signal.SIGINT) if split == "test" else None
        return real(self, model, split, **options)

    monkeypatch.setattr(ViTTask, "evaluate", evaluate)
    assert commands.start(tiny.config(tmp_path / "run"))["results"]["block-wise"]["test"]


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
