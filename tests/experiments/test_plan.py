"""A run's plan is what its training takes, and is made without its network."""

from __future__ import annotations

from dataclasses import replace

import pytest

import diffusionblocks as db
from diffusionblocks.experiments import cli
from diffusionblocks.experiments.models import ViTConfig
from diffusionblocks.experiments.plan import plan_of
from diffusionblocks.experiments.tasks import task_of
from diffusionblocks.experiments.tasks.vit import ViTRun

MODEL = ViTConfig(dim=16, layers=3, heads=2, mlp=32, cond=8, patch=4)
CONFIG = ViTRun(model=MODEL, steps=12, visit=1, batch_size=16, baseline=(), device="cpu", log_every=1)


@pytest.mark.parametrize(
    "changes",
    [{}, {"blocks": 2, "split": (1, 2)}, {"shared": "per_block"}, {"precision": "bfloat16"}, {"offload": None}],
    ids=str,
)
def test_a_run_takes_its_plan(tmp_path, changes):
    config = replace(CONFIG, folder=tmp_path, **changes)
    task, rows = task_of(config), []
    trainer = db.Trainer(task.model(), config)
    trainer.callbacks.append(type("Watch", (), {"on_log": lambda self, trainer, row: rows.append(row["bytes"])})())
    for step in range(2 * config.blocks):
        trainer.step(*task.batches(trainer.device).batch(step))
    took = max(rows[config.blocks :], key=lambda row: sum(row.values()))
    assert took == plan_of(task).rows[config.blocks].by_category


def test_a_plan_allocates_no_network():
    huge = replace(CONFIG, model=replace(MODEL, dim=2**14, mlp=2**20), device="cuda", offload="cpu")
    assert plan_of(task_of(huge)).rows[1].total > 2**40


def test_the_command_prints_a_table_and_the_smallest_fit(capsys):
    cli.show_plan(CONFIG, memory="1GiB")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[0] == "B" and len(lines) == 2 + 3 + 1
    assert lines[-1] == "1GiB: B = 1, all blocks on the device"
    cli.show_plan(replace(CONFIG, device="cuda"), memory="250KiB", host_memory="1MiB")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("250KiB and 1MiB of host memory: B = 3, blocks wait on the host, slots = ")
    with pytest.raises(ValueError, match="--host-memory: the CPU's memory is the host's"):
        cli.show_plan(CONFIG, memory="1GiB", host_memory="1MiB")
    with pytest.raises(SystemExit):
        cli.show_plan(CONFIG, memory="1KiB")
    assert "nothing fits in 1KiB" in capsys.readouterr().out


@pytest.mark.parametrize("memory", ["", "24G"])
def test_a_bad_size_is_refused_before_anything_is_printed(capsys, memory):
    with pytest.raises(ValueError, match="memory must be like"):
        cli.show_plan(CONFIG, memory=memory)
    assert capsys.readouterr().out == ""
