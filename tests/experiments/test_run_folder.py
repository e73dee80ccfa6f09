"""Files of a run: written whole or not at all, named in errors, cleared without touching others'."""

from __future__ import annotations

import errno
import os

import pytest

import tiny
from diffusionblocks.experiments.config import from_yaml, to_yaml
from diffusionblocks.experiments.run_folder import (
    clear,
    identity,
    new_folder,
    peak_memory,
    read_config,
    trim_metrics,
    with_absolute_paths,
    write,
)


def test_a_full_disk_is_named_and_the_old_file_kept(tmp_path, monkeypatch):
    write(tmp_path / "a.json", "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"can't write .*a.json \(No space left on device\); the old file is kept"):
        write(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(OSError, match="nothing was written"):
        write(tmp_path / "b.json", "new")


def test_a_bad_row_is_named(tmp_path):
    config, log = tiny.config(tmp_path), tmp_path / "metrics.jsonl"
    log.write_text('{"run": "block-wise", "step": 1}\nnot json\n')
    for reading in (lambda: trim_metrics(log, 9, ()), lambda: peak_memory(config)):
        with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is no row .*remove that line"):
            reading()


def test_metrics_of_steps_to_come_again_are_dropped(tmp_path):
    log = tmp_path / "metrics.jsonl"
    rows = ['{"run": "block-wise", "step": 1}', '{"run": "block-wise", "step": 2}', '{"run": "end-to-end", "step": 9}']
    log.write_text("\n".join(rows) + '\n{"run": "cut sho')
    trim_metrics(log, 1, ["end-to-end"])
    assert log.read_text() == f"{rows[0]}\n{rows[2]}\n"


def test_clearing_leaves_what_is_not_the_runs(tmp_path):
    folder = tmp_path / "run"
    for name in ("config.yaml", "samples/a.txt", "samples-2/a.txt", "checkpoint/x", "loss.png", "mine.txt"):
        write(folder / name, "")
    clear(folder)
    assert [p.name for p in folder.iterdir()] == ["mine.txt"]
    (folder / "mine.txt").unlink()
    clear(folder)
    assert not folder.exists()


def test_a_folder_with_files_is_never_taken(tmp_path):
    assert new_folder(tmp_path / "samples") == tmp_path / "samples"
    write(tmp_path / "samples" / "a", "")
    assert new_folder(tmp_path / "samples") == tmp_path / "samples-2"
    write(tmp_path / "samples-2", "a file")
    assert new_folder(tmp_path / "samples") == tmp_path / "samples-3"


def test_paths_of_data_become_absolute(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    config = from_yaml("{architecture: vit, data: folder, data_folder: images}")
    assert with_absolute_paths(config).data_folder == tmp_path / "images"
    lm = from_yaml("{architecture: causal_lm}")
    (tmp_path / "topics").write_text("not the embedded text")
    assert with_absolute_paths(lm) == lm


def test_a_run_that_was_moved_is_the_same(tmp_path):
    config = tiny.config(tmp_path / "a")
    write(tmp_path / "b" / "config.yaml", to_yaml(config))
    assert read_config(tmp_path / "b").out == tmp_path / "b"
    assert identity(read_config(tmp_path / "b")) == identity(config)


@pytest.mark.parametrize("line", ["lr: 1e-3", "tune_lr: [1e-3, 5e-4]", "model: {norm_eps: 1e-6}", "lr: 1"])
def test_numbers_of_yaml_are_numbers(line):
    config = from_yaml(f"architecture: vit\n{line}")
    values = (config.lr, *config.tune_lr, config.model.norm_eps)
    assert all(isinstance(value, float) for value in values)


@pytest.mark.parametrize(
    ("text", "fault"),
    [("lr: fast", "lr must be a number"), ("rate: 1", "has no rate"), ("model: {depth: 3}", "model has no depth"),
     ("model: 3", "model must hold"), ("- 1", "names and values"), ("blocks: [", "not a run's config.yaml")],
)  # fmt: skip
def test_other_configs_are_refused(text, fault):
    with pytest.raises(ValueError, match=fault):
        from_yaml(text if text.startswith("-") or "[" in text else f"architecture: vit\n{text}")
