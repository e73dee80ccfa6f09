"""Byte-pair tokens: no text is lost, a run stores them, and figures are per character as for characters."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from diffusionblocks.experiments import commands
from diffusionblocks.experiments.data.vocabulary import BytePairs, from_facts
from diffusionblocks.experiments.export import export, open_exported
from diffusionblocks.experiments.models.causal_lm import CausalLMConfig
from diffusionblocks.experiments.models.masked_lm import MaskedLMConfig
from diffusionblocks.experiments.tasks import task_of
from diffusionblocks.experiments.tasks.causal_lm import CausalLMRun
from diffusionblocks.experiments.tasks.masked_lm import MASK, MaskedLMRun

pytest.importorskip("tokenizers")
WORDS = "it is said that a bird in the hand is worth two in the bush, they say. "
SIZES = dict(dim=16, layers=2, heads=2, mlp=24, cond=8, vocab_size=270)
COMMON = dict(tokens="bpe", length=12, batch_size=4, blocks=2, steps=2, visit=1, baseline=(), sampling_steps=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(WORDS * 60, encoding="utf-8")
    return path


def run(name, text, out):
    kinds = {
        "causal": (CausalLMRun, CausalLMConfig, {"evaluated": 96}),
        "masked": (MaskedLMRun, MaskedLMConfig, {"levels": 2}),
    }
    kind, model, more = kinds[name]
    return kind(model=model(**SIZES), text=str(text), out=out, **COMMON, **more)


def test_any_text_survives_and_the_stored_tokens_are_the_same():
    pairs = BytePairs.train(WORDS * 9, 280)
    again = from_facts(json.loads(json.dumps(pairs.facts())))
    for words in (WORDS, " é☃ \n\n\tx", ""):
        tokens = pairs.encode(words)
        assert pairs.decode(tokens) == again.decode(tokens) == words and torch.equal(tokens, again.encode(words))
    assert len(pairs.encode(WORDS)) < 0.6 * len(WORDS) and int(pairs.encode(WORDS).max()) < 280
    windows = pairs.encode("the bird " * 8).view(2, -1)
    assert pairs.rate(windows) == windows.numel() / 72
    with pytest.raises(ValueError, match="at least 256, one per byte, got 64"):
        BytePairs.train(WORDS, 64)
    with pytest.raises(ValueError, match=r"gives \d+ byte-pair tokens, not 999: lower"):
        BytePairs.train(WORDS, 999)


@pytest.mark.parametrize("name", ["causal", "masked"])
def test_a_run_needs_no_text_to_write_and_counts_bits_per_character(name, text, tmp_path):
    copy = tmp_path / "words.txt"
    copy.write_text(text.read_text())
    config = run(name, copy, tmp_path / "run")
    task = task_of(config)
    model, vocabulary = task.model(), task.data.vocabulary
    found = task.evaluate(model, "val", steps=2)
    windows = task.windows("val") if name == "masked" else task.windows("val", torch.device("cpu"))
    error = 4 * found.get("standard_error", 0.01)
    assert found["bits"] == pytest.approx(math.log2(270) * vocabulary.rate(windows), abs=error)
    assert 0.2 < vocabulary.rate(windows) < 0.8
    facts = json.loads(json.dumps(task.facts))
    task_of(config, facts).check_data()
    copy.write_text(text.read_text().upper())
    with pytest.raises(ValueError, match="the data are not those it was trained on"):
        task_of(config, facts).check_data()
    copy.unlink()
    export(task, model, tmp_path / "out")
    task, model = open_exported(tmp_path / "out")
    prompt = f"the b{MASK}rd" if name == "masked" else "the bird"
    files = commands.sample(task, model, tmp_path / "samples", count=2, seed=0, prompt=prompt, length=12)
    assert files[0].read_text(encoding="utf-8").startswith("the b" if name == "masked" else "the bird")


def test_too_few_tokens_for_bytes_are_refused(text, tmp_path):
    config = run("causal", text, tmp_path)
    with pytest.raises(ValueError, match="one per byte"):
        task_of(replace(config, model=replace(config.model, vocab_size=64))).batches(torch.device("cpu"))
