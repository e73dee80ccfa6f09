"""The progress of a training: a bar in a terminal, else a line now and then."""

from __future__ import annotations

import io
import re
import sys
import types

import pytest

import diffusionblocks as db
import small
from diffusionblocks.training import progress as module
from diffusionblocks.training.progress import Progress

ROW = {"block": 2, "loss": 0.1234, "allocated": 3 << 20}


def trainer(steps):
    return types.SimpleNamespace(steps_done=steps)


def test_the_last_step_is_always_told(capsys):
    with Progress(10, "vit") as bar:
        for step in range(3, 8):  # resumed after two steps
            if step == 5:
                bar.on_log(trainer(step), ROW)
            bar.on_step_end(trainer(step), None)
    *_, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"vit 7/10 block 2 loss 0\.123 3\.0 MiB [\d.]+ steps/s, \d+ s left", last)


def test_lines_come_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Progress(100) as bar:
        for step in range(1, 31):
            now[0] = step * 1.0
            bar.on_step_end(trainer(step), None)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["11/100", "22/100", "30/100"], "every ten seconds, and at the end"
    assert lines[-1].endswith("1.0 steps/s, 70 s left")


def test_without_a_step_nothing_is_told(capsys):
    with Progress(10):
        pass
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_by_rich_in_a_terminal(monkeypatch):
    pytest.importorskip("rich")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(4, "vit") as bar:
        bar.on_log(trainer(3), ROW)
        bar.on_step_end(trainer(4), None)
        assert bar.bar is not None and bar.bar.tasks[0].completed == 4
    assert "block 2 loss 0.123" in terminal.getvalue() and "steps/s" not in terminal.getvalue()


def test_without_rich_lines_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(4) as bar:
        bar.on_step_end(trainer(4), None)
    assert bar.bar is None and "training 4/4" in terminal.getvalue()


def test_fit_shows_it_and_lets_go_of_it(capsys):
    made = db.Trainer(small.model(), device="cpu", log_every=2)
    made.fit(small.Loader(), steps=3)
    assert "training 3/3 block" in capsys.readouterr().err and made.callbacks == []
    made.fit(small.Loader(), steps=4, progress=False)
    assert capsys.readouterr().err == ""
