"""Rows of the log, and the loggers they go to: TensorBoard and W&B by stand-ins of the same API."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch

import diffusionblocks as db
import small
from diffusionblocks.offload.memory import CATEGORIES
from diffusionblocks.training.config import TrainerConfig
from diffusionblocks.training.log import loggers, numbers


@pytest.fixture
def written(monkeypatch):
    """Put modules named tensorboard and wandb in place; returns what is sent to them."""
    sent = {"tensorboard": [], "wandb": [], "made": [], "flushed": 0}

    class SummaryWriter:
        def __init__(self, log_dir):
            sent["made"].append(("tensorboard", log_dir))

        def add_scalar(self, tag, scalar_value, global_step):
            sent["tensorboard"].append((tag, scalar_value, global_step))

        def flush(self):
            sent["flushed"] += 1

    def init(*, dir, project):
        sent["made"].append(("wandb", dir))
        return types.SimpleNamespace(log=lambda data, step: sent["wandb"].append((data, step)))

    tensorboard, wandb = types.ModuleType("torch.utils.tensorboard"), types.ModuleType("wandb")
    tensorboard.SummaryWriter, wandb.init = SummaryWriter, init
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setattr(torch.utils, "tensorboard", tensorboard, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return sent


class Rows(list):
    def on_log(self, trainer, row):
        self.append(row)


def trained(tmp_path, *, until=4, **settings):
    rows = Rows()
    settings = {"visit": 2, "log_every": 2, "log_folder": tmp_path / "log", **settings}
    trainer = db.Trainer(small.model(), device="cpu", callbacks=[rows], **settings)
    outputs = []
    trainer.callbacks.append(
        types.SimpleNamespace(on_step_end=lambda t, output: outputs.append((output, t.model.partition)))
    )
    trainer.fit(small.Loader(), steps=until, progress=False)
    return trainer, rows, outputs


def test_rows_hold_the_steps_own_numbers(tmp_path):
    _, rows, outputs = trained(tmp_path, until=6, lr=0.5, warmup=10)
    assert [row["step"] for row in rows] == [2, 4, 6]
    for row, (output, partition) in zip(rows, outputs[1::2], strict=True):
        assert row["block"] == output.block
        assert row["loss"] == float(output.loss) and row["grad_norm"] == float(output.grad_norm)
        assert row["lr"] == pytest.approx(0.05 * row["step"])
        assert (row["sigma_low"], row["sigma_high"]) == partition.trained(output.block)
        assert row["bytes"].keys() == set(CATEGORIES)
        assert row["allocated"] == sum(row["bytes"].values()) and row["bytes"]["gradients"] > 0
    lines = (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()
    assert [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines] == [
        json.loads(json.dumps(row)) for row in rows
    ]


def test_a_row_of_accumulated_batches_is_of_their_mean(tmp_path):
    rows = Rows()
    trainer = db.Trainer(small.model(), device="cpu", accumulate=3, log_every=1, callbacks=[rows])
    losses = [float(trainer.step(*small.batch(step=i)).loss) for i in range(3)]
    assert len(rows) == 1 and rows[0]["loss"] == pytest.approx(sum(losses) / 3, rel=1e-6)


def test_before_blocks_branch_the_noise_is_all(tmp_path):
    trainer, rows, _ = trained(tmp_path, until=8, steps=8, branch=0.5, log_every=1)
    partition = trainer.model.partition
    whole = [(row["sigma_low"], row["sigma_high"]) == (partition.sigma_min, partition.sigma_max) for row in rows]
    assert whole == [True] * 4 + [False] * 4


def test_rows_go_to_every_logger_asked_for(tmp_path, written):
    _, rows, _ = trained(tmp_path, loggers=("tensorboard", "wandb", "wandb"))
    folder = str(tmp_path / "log")
    assert written["made"] == [("tensorboard", folder), ("wandb", folder)], "each once"
    assert (tmp_path / "log" / "metrics.jsonl").exists(), "whatever else is asked for"
    assert [(data, step) for data, step in written["wandb"]] == [(numbers(row), row["step"]) for row in rows]
    expected = [(name, value, row["step"]) for row in rows for name, value in numbers(row).items()]
    assert written["tensorboard"] == expected and written["flushed"] == len(rows)


def test_numbers_are_flat_and_by_block():
    row = {"step": 4, "block": 1, "loss": 0.5, "grad_norm": 2.0, "bytes": {"weights": 12}, "note": "text", "none": None}
    assert numbers(row) == {
        "step": 4.0, "block": 1.0, "loss": 0.5, "grad_norm": 2.0, "bytes/weights": 12.0, "loss/block_1": 0.5,
        "grad_norm/block_1": 2.0,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, name):
    module = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}[name]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install 'diffusionblocks\[{name}\]'"):
        loggers(TrainerConfig(log_folder=tmp_path, loggers=(name,)))


def test_without_a_folder_nothing_is_logged(tmp_path, written):
    assert loggers(TrainerConfig(loggers=("wandb",))) == [] and not written["made"]
