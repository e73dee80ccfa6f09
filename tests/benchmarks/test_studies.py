"""Studies: every variant is a run that can be made, at the budget its name says; a table is rewritten as rows come."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffusionblocks.experiments.presets import RUNS
from diffusionblocks.experiments.tasks import task_of

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in ("study", "variants", "tables", "pages", "summary", "apart"):
        sys.modules.pop(name, None)


def test_every_variant_is_another_run_that_can_be_made(benchmarks):
    studies = benchmarks("variants").STUDIES
    for name in ("vit-digits", "dit-digits", "mdlm-text", "lm-text", "recurrent-sums"):
        base = RUNS[name][1]
        for study, make in studies[base.architecture].items():
            # a soup is of several runs of one config, which is a variant, too
            variants = {variant: config for variant, config in make(base).items() if not variant.startswith("soup")}
            assert len(set(map(str, variants.values()))) == len(variants), f"{name} {study}: two variants are the same"
            assert all(config.total_steps > 0 for config in variants.values())


def test_equal_compute_and_equal_updates_are_what_they_say(benchmarks):
    base = RUNS["dit-digits"][1]
    for name, config in benchmarks("variants").STUDIES["dit"]["blocks"](base).items():
        if name.endswith("compute"):
            assert config.steps == base.steps
        else:
            assert abs(config.total_steps - base.total_steps) < config.blocks


def test_layers_are_split_and_noise_is_cut_as_asked(benchmarks):
    base = RUNS["dit-digits"][1]
    tiny = replace(base.model, dim=16, heads=2, mlp=16, cond=8)
    for name, config in benchmarks("variants").STUDIES["dit"]["partition"](base).items():
        cut = task_of(replace(config, model=tiny)).model().partition
        assert name.endswith("-".join(map(str, cut.layers))) and sum(cut.layers) == 6
        high, low = cut.edges[0] - cut.edges[1], cut.edges[1] - cut.edges[2]
        assert (abs(high / low - 1) < 1e-4) == name.startswith("uniform")
    with pytest.raises(ValueError, match=r"split=\(1, 2\) must share 6 layers among 3"):
        replace(base, split=(1, 2))
    with pytest.raises(ValueError, match="every block a layer"):
        replace(base, split=(6, 0, 0))
    assert replace(base, split=(1, 2, 3)).in_one_block().layer_counts == (6,)
    assert replace(base, split=(1, 2, 3)).in_blocks(2).layer_counts == (3, 3)


def test_a_study_goes_on_where_it_stopped_and_writes_its_table(benchmarks, tmp_path, monkeypatch, capsys):
    study = benchmarks("study")
    ran = []

    def pretend(adapter):
        ran.append((adapter.config.blocks, adapter.config.seed))
        score = {"frechet": 5.0 + adapter.config.seed, "class_accuracy": 90.0, "loss": 0.5, "layer_evaluations": 100.0}
        return {"val": score, "test": {**score, "sampling_seconds": 1.0}, "memory": {"weights": 10**6}}

    monkeypatch.setattr(study, "block_wise", pretend)
    settings = study.Study(run="dit-digits", folder=tmp_path, seeds=(0, 1), only=("B=2", "B=3"), part="0/2")
    study.main(settings)
    assert ran == [(2, 0), (2, 1)]
    study.main(replace(settings, part="0/1"))
    assert ran == [(2, 0), (2, 1), (3, 0), (3, 1)]
    rows = [json.loads(line) for line in (tmp_path / "dit_digits_main.jsonl").read_text().splitlines()]
    assert [row["variant"] for row in rows] == ["B=2", "B=2", "B=3", "B=3"]
    assert "| B=3 | 0 1 | 5.50 ± 0.71 |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="study must be one of"):
        study.main(replace(settings, study="moon"))


def test_averaged_networks_are_read_as_one(benchmarks, tmp_path):
    """Two networks of one block's depth, of different seeds: the mean of their logits, not of their losses."""
    study, path = benchmarks("study"), tmp_path / "text.txt"
    path.write_text("one two buckle my shoe, " * 300)
    base = RUNS["lm-text"][1]
    small = replace(base.model, dim=16, heads=2, mlp=16, vocab_size=16, layers=2)
    config = replace(base, text=str(path), length=24, steps=30, lr=1e-2, model=small, evaluated=480)
    alone, both = (study.shallow_averaged(task_of(replace(config, blocks=blocks))) for blocks in (1, 2))
    other = study.shallow_averaged(task_of(replace(config, blocks=1, seed=1000, model=replace(small, layers=1))))
    assert both["memory"]["weights"] < alone["memory"]["weights"], "each has one block's depth"
    assert both["test"]["bits"] < 3.9 and both["test"]["bits"] != other["test"]["bits"]
    networks, x = [torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)], torch.randn(5, 3)
    torch.testing.assert_close(study.Mean(networks)(x), (networks[0](x) + networks[1](x)) / 2)


@pytest.mark.parametrize("name", ["vit-digits", "dit-digits", "mdlm-text", "lm-text"])
def test_every_architecture_takes_a_split_of_its_layers(name):
    base = RUNS[name][1]
    split = (1,) * (base.blocks - 1) + (base.layers - base.blocks + 1,)
    model = task_of(replace(base, split=split)).model()
    assert model.partition.layers == split == tuple(len(block.layers) for block in model.blocks)
    assert replace(base, split=split).total_steps == base.total_steps


def test_the_pages_of_results_have_the_figures_of_the_rows(benchmarks):
    pages = benchmarks("pages")
    for path in pages.PAGES:
        page = path.read_text()
        assert pages.renewed(page) == page, f"python benchmarks/pages.py renews {path.name}"
        assert len(pages.MARKED.findall(page)) >= (8 if path.name == "lab-book.md" else 1)


def test_the_summary_marks_the_best_way(benchmarks):
    summary = benchmarks("summary")
    (line,) = [line for line in summary.LINES if line.task == "DiT, digits"]
    *_, ordinary, blocks, alone, memory = summary.cells(line)
    assert alone.startswith("**4.52 ±") and not ordinary.startswith("**") and blocks.endswith("(B = 3)")
    assert 0 < float(memory) < 1


def test_unconnected_machines_are_compared_on_the_same_seeds(benchmarks, tmp_path, monkeypatch):
    apart = benchmarks("apart")

    def write(study, values):
        flat = [(variant, seed, bits) for variant, own in values.items() for seed, bits in own.items()]
        rows = [{"variant": variant, "seed": seed, "test": {"bits": bits}} for variant, seed, bits in flat]
        (tmp_path / f"{study}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    ways = {"B=3, apart": {0: 2.0, 1: 2.0}, "lone, 1/3 of the updates": {0: 3.0, 1: 2.0}, "soup of 3": {0: 4.0, 1: 4.0}}
    write("run_controls", ways)
    write("run_main", {"2 layers alone": {0: 1.0, 1: 1.0, 7: 9.0}})
    monkeypatch.setattr(apart, "RESULTS", tmp_path)
    line = apart.Line("text", "bits ↓", "run", "bits", 1, False)
    assert apart.cells(line) == ["text", "bits ↓", "**2.0 ± 0.0**", "2.5 ± 0.7", "", "4.0 ± 0.0", "1.0 ± 0.0"]
    best = apart.cells(line._replace(highest=True))
    assert best[2] == "2.0 ± 0.0" and best[5] == "**4.0 ± 0.0**"
