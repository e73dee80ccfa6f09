"""The progress of a training: a bar in a terminal, else a line now and then."""

from __future__ import annotations

import io
import re
import sys
import time
import types

import pytest

import diffusionblocks as db
import small
from diffusionblocks.training import progress as module
from diffusionblocks.training.progress import Progress, stage

ROW = {"block": 2, "loss": 0.1234, "allocated": 3 << 20}


STEP = types.SimpleNamespace(block=2)


def trainer(steps, blocks=3, own=None):
    own = frozenset(range(blocks) if own is None else own)
    return types.SimpleNamespace(steps_done=steps, own=own, model=types.SimpleNamespace(blocks=[None] * blocks))


def test_the_last_step_is_always_told(capsys):
    with Progress(10, "vit") as bar:
        for step in range(3, 8):  # resumed after two steps
            if step == 5:
                bar.on_log(trainer(step), ROW)
            bar.on_step_end(trainer(step), STEP)
    *_, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"vit 7/10 block 2 loss 0\.123 3\.0 MiB [\d.]+ steps/s, \d+ s left", last)


def test_lines_come_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Progress(100) as bar:
        for step in range(1, 31):
            now[0] = step * 1.0
            bar.on_step_end(trainer(step), STEP)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["11/100", "22/100", "30/100"], "every ten seconds, and at the end"
    assert lines[-1].endswith("1.0 steps/s, 70 s left")


def test_a_line_is_not_told_twice(capsys, monkeypatch):
    monkeypatch.setattr(module, "EVERY", -1.0)
    with Progress(2) as bar:
        for step in (1, 2):
            bar.on_step_end(trainer(step), STEP)
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["1/2", "2/2"]


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
    monkeypatch.setenv("TERM", "xterm")
    with Progress(4, "vit") as bar:
        bar.on_log(trainer(3), ROW)
        bar.on_step_end(trainer(4), STEP)
        assert bar.bar is not None and bar.bar.tasks[0].completed == 4
    assert "block 2 loss 0.123" in terminal.getvalue() and "steps/s" not in terminal.getvalue()


def test_without_rich_lines_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(4) as bar:
        bar.on_step_end(trainer(4), STEP)
    assert bar.bar is None and "training 4/4" in terminal.getvalue()


def test_fit_shows_it_and_lets_go_of_it(capsys):
    made = db.Trainer(small.model(), device="cpu", log_every=2)
    made.fit(small.Loader(), steps=3)
    assert "training 3/3 block" in capsys.readouterr().err and made.callbacks == []
    made.fit(small.Loader(), steps=4, progress=False)
    assert capsys.readouterr().err == ""


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_slow_first_step_does_not_spoil_the_estimate(capsys, clock):
    with Progress(1002) as bar:
        for step, seconds in ((1, 300.0), (2, 2.0), (3, 2.0)):  # it loads and compiles
            clock[0] += seconds
            bar.on_step_end(trainer(step), STEP)
    *_, last = capsys.readouterr().err.splitlines()
    assert last == "training 3/1002  2.0 s a step, 33:18 left"


@pytest.mark.parametrize("seconds, shown", [(7, "7 s"), (119, "119 s"), (200, "3:20"), (3723, "1:02:03")])
def test_durations_are_read_at_a_glance(seconds, shown):
    assert module._clock(seconds) == shown


@pytest.mark.parametrize("columns", [80, 200])
def test_a_bar_fits_into_a_line_of_the_terminal(monkeypatch, columns):
    pytest.importorskip("rich")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    with Progress(12000, "checkpointing, lr 0.0016") as bar:
        bar.on_log(trainer(9999), {"block": 11, "loss": 12.3456, "allocated": 1000 << 20})
        bar.on_step_end(trainer(10000), STEP)
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]", terminal.getvalue())]
    assert max(map(len, lines)) <= columns
    assert re.search(
        r"checkpointing, lr 0\.0016 .*10000/12000 block 11 loss 12\.346 1000\.0 MiB \S+( s)? left", lines[-2]
    )
    assert ("\u2501" in lines[-2]) == (columns > 80), "a bar, where there is room for it"


def test_a_stage_without_steps_is_told_at_its_beginning_and_its_end(capsys, clock):
    with stage("evaluating on val"):
        assert capsys.readouterr().err == "evaluating on val ...\n"
        clock[0] += 148.0
    assert capsys.readouterr().err == "evaluating on val: 148.0 s\n"


def test_a_long_stage_is_told_of_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(module, "STILL", 0.02)
    said = ""
    with stage("evaluating on val"):
        while said.count("so far\n") < 2:
            said += capsys.readouterr().err
    assert re.match(r"evaluating on val \.\.\.\nevaluating on val: 0 s so far\n", said)
    assert capsys.readouterr().err.endswith(" s\n")
    time.sleep(0.1)
    assert not capsys.readouterr().err


def test_a_stage_in_a_terminal(monkeypatch):
    pytest.importorskip("rich")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with stage("evaluating on val"):
        pass
    said = terminal.getvalue()
    assert "evaluating on val" in said and "..." not in said
    assert said.endswith("\x1b[2Kevaluating on val: 0.0 s\n"), "the spinner is gone, a line of what it took stays"


def test_a_dumb_terminal_gets_lines(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "dumb")
    with Progress(4) as bar, stage("evaluating"):
        bar.on_step_end(trainer(4), STEP)
    assert bar.bar is None and "\x1b" not in terminal.getvalue() and "training 4/4" in terminal.getvalue()


def test_steps_of_blocks_trained_elsewhere_count_for_no_rate(capsys, clock, monkeypatch):
    monkeypatch.setattr(module, "EVERY", -1.0)
    with Progress(12) as bar:
        for step in range(1, 10):  # visits of one step: blocks 0, 1, 2, ...; only block 1 takes time
            block = (step - 1) % 3
            clock[0] += 2.0 * (block == 1)
            bar.on_step_end(trainer(step, own=(1,)), types.SimpleNamespace(block=block))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].strip() == "training 1/12", "no rate before a step that trains"
    assert lines[-1] == "training 9/12  2.0 s a step, 2 s left"


def test_a_network_of_one_block_has_no_number(capsys):
    with Progress(2) as bar:
        bar.on_log(trainer(1, blocks=1), ROW | {"block": 0})
        bar.on_step_end(trainer(1, blocks=1), types.SimpleNamespace(block=0))
    assert "training 1/2 loss 0.123 3.0 MiB" in capsys.readouterr().err
