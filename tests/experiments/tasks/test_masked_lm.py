"""The masked language model: an exact bound, a trajectory through every block, a run from text to samples."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from diffusionblocks import DiffusionBlocks, StemHead, make_partition
from diffusionblocks.experiments import commands
from diffusionblocks.experiments.config import from_yaml, to_yaml
from diffusionblocks.experiments.metrics.masked_diffusion import bound, generate, masked_entropy, unigram_bits
from diffusionblocks.experiments.models.masked_lm import MaskedLMConfig
from diffusionblocks.experiments.plan import plan_of
from diffusionblocks.experiments.tasks.base import Addresses
from diffusionblocks.experiments.tasks.masked_lm import MASK, MaskedLMRun, MaskedLMTask
from diffusionblocks.noise import mask_schedule as masking
from diffusionblocks.noise.density import Uniform
from diffusionblocks.noise.partition import step_levels
from diffusionblocks.targets.masked import T_MIN, MaskedTarget

MODEL = MaskedLMConfig(dim=16, layers=3, heads=2, mlp=32, cond=8, vocab_size=12)
CONFIG = MaskedLMRun(
    model=MODEL, length=16, steps=60, visit=5, batch_size=16, checkpoint_every=10**6, baseline=(), sampling_steps=6,
    ema=0.9, lr=5e-3, levels=6,
)  # fmt: skip
CPU = torch.device("cpu")


class Twins(nn.Module):
    """Knows that both tokens of a window are the same, and how likely each is: the exact posterior as features."""

    def __init__(self, chances: torch.Tensor):
        super().__init__()
        self.log_chances = nn.Parameter(chances.log())

    def forward(self, x, z, c_noise):
        other, symbols = z.flip(1), len(self.log_chances)
        told = torch.log(nn.functional.one_hot(other, symbols + 1)[..., :symbols] + 1e-12)
        return torch.where((other == symbols).unsqueeze(-1), self.log_chances, told), c_noise


class Skip(nn.Linear):
    """A layer that adds nothing."""

    def __init__(self):
        super().__init__(1, 1)

    def forward(self, h, cond):
        return h


class Plain(nn.Linear):
    """Features are the logits."""

    def __init__(self, symbols):
        super().__init__(symbols, symbols)
        nn.init.eye_(self.weight)
        nn.init.zeros_(self.bias)

    def features(self, h):
        return h

    def forward(self, h, cond):
        return super().forward(h)


CHANCES = torch.tensor([0.5, 0.25, 0.125, 0.125])  # 1.75 bits


def twins(blocks: int = 3) -> DiffusionBlocks:
    around, partition = (
        StemHead(Twins(CHANCES), Plain(4)),
        make_partition(Uniform(T_MIN, 1.0), blocks, blocks, overlap=0),
    )
    return DiffusionBlocks(around, [Skip() for _ in range(blocks)], MaskedTarget(4), partition)


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_bound_of_the_exact_denoiser_is_the_entropy(blocks):
    """A window of two equal tokens holds 1.75 bits: half of them a token, which no other number of bits is."""
    y = torch.repeat_interleave(torch.arange(4), (CHANCES * 2000).long()).view(-1, 1).repeat(1, 2)
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    found = bound(twins(blocks), y, levels=12)
    assert found["bits"] == pytest.approx(1.75 / 2, abs=4 * found["standard_error"])
    assert found["standard_error"] < 0.02


def test_the_bound_is_what_enumeration_gives():
    """A model that is wrong on purpose: all sets of masks, a fine grid of times, and the two ends."""
    model = twins()
    with torch.no_grad():
        model.stem_head.stem.log_chances.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]).log())
        model.stem_head.head.weight.mul_(0.1)  # unsure of what it sees
    y = torch.tensor([[0, 0], [3, 2]])
    count = 90

    def mean_entropy(t: float, block: int) -> torch.Tensor:
        keep, times = masking.alpha(torch.tensor(t, dtype=torch.float64)), torch.full((2,), t)
        terms = [
            (keep ** (2 - sum(hidden)) * (1 - keep) ** sum(hidden))
            * masked_entropy(model, y, torch.where(torch.tensor([hidden]), 4, y), times, block)
            for hidden in itertools.product((False, True), repeat=2)
        ]
        return torch.stack(terms).sum(0)

    nats = masking.alpha(torch.tensor(1.0)) * mean_entropy(1.0, 0) / (1 - masking.alpha(torch.tensor(1.0))) ** 2
    nats = nats + mean_entropy(T_MIN, 2)
    for i in range(count):
        t = 1 - (1 - T_MIN) * (i + 0.5) / count
        block = int(model.partition.block_of(t))
        nats = nats + (1 - T_MIN) / count * masking.weight(torch.tensor(t)) * mean_entropy(t, block)
    many = y.repeat(2000, 1)
    found = bound(model, many, levels=12)
    assert found["bits"] == pytest.approx(float(nats.mean()) / math.log(2), abs=4 * found["standard_error"])
    assert found["standard_error"] < 0.03
    shares = [found[name] for name in ("block_0", "block_1", "block_2", "prior", "reconstruction")]
    assert sum(shares) == pytest.approx(found["bits"])
    masks, ones = torch.full_like(many, 4), torch.ones(len(many))
    prior = masking.alpha(ones) * masked_entropy(model, many, masks, ones, 0)
    assert found["prior"] == pytest.approx(float(prior.mean()) / math.log(2)) and found["prior"] > 0


def test_each_time_is_evaluated_by_its_owner():
    """Blocks that know nothing spoil their own share of the bound and no other's."""
    model = twins()
    y = torch.arange(4).repeat(500).view(-1, 1).repeat(1, 2)
    good = bound(model, y, levels=12)
    model.blocks[1].layers[0].forward = lambda h, cond: torch.zeros_like(h)
    bad = bound(model, y, levels=12)
    assert bad["block_1"] > good["block_1"] + 0.1
    assert all(bad[name] == good[name] for name in ("block_0", "block_2", "prior", "reconstruction"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text with a plain pattern: each vowel determines the consonants around it."""
    folder = tmp_path_factory.mktemp("text")
    generator = torch.Generator().manual_seed(0)
    words = [["bab ", "cec ", "did "][i] for i in torch.randint(3, (5000,), generator=generator).tolist()]
    (folder / "words.txt").write_text("".join(words))
    return folder


def make_task(folder, **changes) -> MaskedLMTask:
    return MaskedLMTask(replace(CONFIG, text=str(folder / "words.txt"), out=folder / "run", **changes))


@pytest.fixture(scope="module")
def trained(folder):
    task = make_task(folder, steps=150)
    trainer, _ = commands.open_trainer(task)
    trainer.fit(Addresses(), batch=task.batches(CPU).batch, progress=False)
    return task, trainer


def test_training_learns_the_pattern(trained):
    """A word holds log2 3 bits in four characters, .40 each, and a window the four places it may begin at."""
    found = commands.evaluate(*trained, "test")
    assert found["unigram"] > 2.3 and found["bits"] < found["unigram"] - 0.5
    assert found["bits"] > math.log2(3) / 4 - 4 * found["standard_error"]


def test_bits_do_not_depend_on_the_batch(trained, monkeypatch):
    task, model = trained[0], trained[1].model
    whole = task.evaluate(model, "val")
    monkeypatch.setattr("diffusionblocks.experiments.metrics.masked_diffusion.BATCH", 7)
    parts = task.evaluate(model, "val")
    assert parts["bits"] == pytest.approx(whole["bits"], rel=1e-6)
    assert task.evaluate(model, "val", steps=7)["bits"] != whole["bits"]


def test_a_trajectory_visits_every_block_in_order_and_leaves_no_mask(trained):
    model = trained[1].model
    for steps in (3, 4, 7, 16):
        levels = step_levels(model.partition, steps, kind="probability")
        path = list(generate(model, levels, torch.full((5, 16), 12), seed=0))
        blocks = [step.block for step in path]
        assert blocks == sorted(blocks) and set(blocks) == {0, 1, 2} and len(path) == steps
        assert not (path[-1].z == 12).any()
        left = [int((step.z == 12).sum()) for step in path]
        assert left == sorted(left, reverse=True)
        for one, two in itertools.pairwise(path):
            stays = one.z != 12
            assert torch.equal(one.z[stays], two.z[stays]), "what is revealed stays"


def test_tokens_are_revealed_by_the_schedule():
    model = twins()
    levels = [1.0, 0.6, 0.3, 0.0]
    path = list(generate(model, levels, torch.full((4000, 2), 4), seed=0))
    shares = [float((step.z == 4).double().mean()) for step in path]
    assert shares == pytest.approx([0.6, 0.3, 0.0], abs=0.025)  # 4 standard errors
    assert float((path[-1].z[:, 0] == path[-1].z[:, 1]).double().mean()) > 0.6


def test_samples_of_the_exact_denoiser_have_the_exact_distribution():
    model, start = twins(), torch.full((4000, 2), 4)
    path = list(generate(model, step_levels(model.partition, 64, kind="probability"), start, seed=1))
    a, b = path[-1].z.unbind(1)
    assert float((a == b).double().mean()) > 0.96  # but for both revealed in one step
    shares = torch.bincount(a, minlength=4) / 4000
    torch.testing.assert_close(shares, CHANCES, rtol=0, atol=0.03)


def test_given_tokens_stay_and_decide_the_others():
    model, start = twins(), torch.full((400, 2), 4)
    start[:, 1] = torch.arange(400) % 4
    path = list(generate(model, step_levels(model.partition, 6, kind="probability"), start, seed=1))
    assert torch.equal(path[-1].z, start[:, 1:].expand(-1, 2)), "the twin of what is given"
    assert torch.equal(path[0].z[:, 1], start[:, 1])


def test_a_prompt_stays_but_for_its_gaps(trained):
    task, model = trained[0], trained[1].model
    prompt = task.vocabulary.alphabet[:3] + MASK + task.vocabulary.alphabet[3]
    files = commands.sample(task, model, task.config.out / "prompted", count=3, seed=0, prompt=prompt, length=9)
    texts = files[0].read_text()[:-1].split("\n\n----\n\n")
    assert [len(text) for text in texts] == [9] * 3 and MASK not in "".join(texts)
    assert all(text[:3] == prompt[:3] and text[4] == prompt[4] for text in texts)
    with pytest.raises(ValueError, match="don't fit in length=4"):
        commands.sample(task, model, task.config.out / "long", count=1, seed=0, prompt=prompt, length=4)


def test_the_same_seed_gives_the_same_text(trained):
    task, model = trained[0], trained[1].model
    texts = []
    for name, options in (("a", {"seed": 0}), ("b", {"seed": 0}), ("c", {"seed": 1}), ("d", {"seed": 0, "steps": 12})):
        files = commands.sample(task, model, task.config.out / name, count=4, **options)
        assert [file.name for file in files] == ["samples.txt", "trajectory.txt"]
        texts.append(files[0].read_text())
    assert texts[0] == texts[1] and len(set(texts)) == 3 and MASK not in texts[0]
    drafts = files[1].read_text()
    assert all(f"after block {block}" in drafts for block in range(3)) and MASK in drafts
    cold = commands.sample(task, model, task.config.out / "e", count=4, seed=0, temperature=1e-3)[0].read_text()
    narrow = commands.sample(task, model, task.config.out / "f", count=4, seed=0, top_p=1e-3)[0].read_text()
    assert cold == narrow != texts[0], "both take the likeliest"


def test_the_same_step_draws_the_same_batch_and_others_differ(folder):
    batches = make_task(folder).batches(CPU)
    (x, y), (_, same), (_, other) = (batches.batch(step) for step in (0, 0, 1))
    assert x.shape == (16, 0) and torch.equal(y, same) and not torch.equal(y, other)


def test_independent_blocks_have_a_stem_and_head_each(folder):
    model = make_task(folder, shared="per_block").model()
    assert model.stem_head is None and len({id(p) for p in model.parameters()}) == len(list(model.parameters()))


def test_a_frozen_stem_and_head_let_the_blocks_learn(folder):
    task = make_task(folder, shared="frozen")
    model = task.model()
    model.loss(1, *task.batches(CPU).batch(0), seed=0, step=0).loss.backward()
    gates = model.blocks[1].layers[0].modulation.linear.weight.grad
    assert gates is not None and gates.any(), "a head of zeros would pass nothing on"
    assert all(p.grad is None for p in model.stem_head.parameters())


def test_the_plan_holds(folder):
    task = make_task(folder, steps=10, batch_size=64, log_every=1, log_folder=folder / "log")
    trainer, _ = commands.open_trainer(MaskedLMTask(replace(task.config, out=folder / "planned")))
    trainer.fit(Addresses(), batch=task.batches(CPU).batch, progress=False)
    rows = map(json.loads, (folder / "log" / "metrics.jsonl").read_text().splitlines())
    measured = max(row["bytes"]["activations"] for row in rows)
    assert measured == pytest.approx(plan_of(task).rows[3].by_category["activations"], rel=0.05)


def test_the_config_survives_its_file():
    assert from_yaml(to_yaml(CONFIG)) == CONFIG


def test_the_unigram_model_is_counts():
    train_, tokens = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([[0, 1], [2, 0]])
    by_hand = -sum(math.log2(p) for p in (4 / 8, 3 / 8, 1 / 8, 4 / 8)) / 4
    assert unigram_bits(train_, tokens, 3) == pytest.approx(by_hand)


def test_bad_input_is_named(folder):
    with pytest.raises(ValueError, match="two windows or more"):
        bound(twins(), torch.zeros(1, 2, dtype=torch.int64), levels=3)
    with pytest.raises(ValueError, match="levels >= B = 3"):
        bound(twins(), torch.zeros(5, 2, dtype=torch.int64), levels=2)
    with pytest.raises(ValueError, match="windows of length=99999"):
        make_task(folder, length=99999).batches(CPU)
    with pytest.raises(ValueError, match=r"overlap=0\.05 must be 0"):
        replace(CONFIG, overlap=0.05)
    with pytest.raises(ValueError, match="levels=2 must be at least blocks=3"):
        replace(CONFIG, levels=2)
    with pytest.raises(ValueError, match="length must be at least 2"):
        replace(CONFIG, length=0)
