"""Loggers of a run: named on the command line, block-wise rows go to them."""

from __future__ import annotations

import sys
import types

import pytest

from diffusionblocks.experiments import cli


@pytest.fixture
def wandb(monkeypatch):
    rows, folders = [], []
    run = types.SimpleNamespace(log=lambda values, step: rows.append((step, values)))
    made = types.SimpleNamespace(init=lambda dir, project: folders.append(dir) or run)
    monkeypatch.setitem(sys.modules, "wandb", made)
    return rows, folders


def test_a_run_logs_where_it_is_told_to(tmp_path, monkeypatch, wandb):
    sizes = ("--model.dim", "16", "--model.heads", "2", "--model.mlp", "32", "--steps", "20")
    arguments = ["train", "vit-digits", "--out", str(tmp_path / "run"), "--loggers", "jsonl", "wandb", *sizes]
    monkeypatch.setattr(sys, "argv", ["dblocks", *arguments, "--device", "cpu", "--baseline"])
    cli.main()
    rows, folders = wandb
    assert folders == [str(tmp_path / "run" / "logs")]
    assert rows and rows[-1][0] == 60 and "loss" in rows[-1][1]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(rows), "the run's own log has each row once"
    assert not (tmp_path / "run" / "logs" / "metrics.jsonl").exists()
