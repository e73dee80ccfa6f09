"""Steps of a Trainer: whose turn it is, what a step changes, what stops it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import diffusionblocks as db
import small
import tiny
from diffusionblocks.experiments.tasks.base import Addresses
from diffusionblocks.training.branch import branch
from diffusionblocks.training.finite import NonFiniteLoss
from diffusionblocks.training.schedule import turn
from small import everything


class Rows(list):
    """A callback that keeps the log's rows."""

    def on_log(self, trainer, row):
        self.append(row)


def run(trainer, batches=None):
    rows = Rows()
    trainer.callbacks.append(rows)
    trainer.fit(Addresses(), batch=(batches or tiny.RandomBatches()).batch, progress=False)
    return rows


@settings(max_examples=30, deadline=None)
@given(blocks=st.integers(1, 4), seed=st.integers(0, 99), rounds=st.integers(1, 4))
def test_every_block_gets_the_same_number_of_visits(blocks, seed, rounds):
    turns = Counter(turn(visit, blocks, seed=seed) for visit in range(rounds * blocks))
    assert turns == dict.fromkeys(range(blocks), rounds)


def test_a_visit_belongs_to_one_block(tmp_path):
    trainer, seen = tiny.trainer(tiny.config(tmp_path, steps=6, visit=3)), []
    for step in range(18):
        seen.append(trainer.step(*tiny.RandomBatches().batch(step)).block)
    assert [len(set(seen[i : i + 3])) for i in range(0, 18, 3)] == [1] * 6


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path):
    trainers = [tiny.trainer(tiny.config(tmp_path / str(i), seed=seed)) for i, seed in enumerate((0, 0, 1))]
    for trainer in trainers:
        run(trainer)
    one, same, other = map(everything, trainers)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("shared", ["shared", "per_block"])
@pytest.mark.parametrize("offload", ["disk", "cpu"])
def test_blocks_branch_off_one_that_was_trained_for_all_noise(tmp_path, shared, offload):
    trainer = tiny.trainer(tiny.config(tmp_path, branch=0.5, shared=shared, offload=offload, steps=20))
    seen, levels = {}, []

    draw = trainer.model.draw_sigma

    def watched(block, *args, **kwargs):
        if block is not None and not seen:  # the blocks have just branched
            seen.update(everything(trainer))
        sigma = draw(block, *args, **kwargs)
        levels.append((block, sigma))
        return sigma

    trainer.model.draw_sigma = watched
    before = everything(trainer)
    rows = run(trainer)
    names = [name.removeprefix("block_0/") for name in before if name.startswith("block_0/")]
    for name in names:
        first, *others = (seen[f"block_{b}/{name}"] for b in range(3))
        assert all(torch.equal(first, other) for other in others)
        assert len({t.data_ptr() for t in (first, *others)}) == 3
    assert any(not torch.equal(before[f"block_0/{name}"], seen[f"block_0/{name}"]) for name in names)
    numbers = {int(t) for name, t in seen.items() if "/next_step/" in name}
    assert numbers == {31}, "updates are copied, too"
    assert [block for block, _ in levels[:30]] == [None] * 30
    whole, partition = torch.cat([sigma for _, sigma in levels[:30]]), trainer.model.partition
    assert {int(b) for b in partition.block_of(whole)} == {0, 1, 2}
    after = everything(trainer)
    assert all(any(not torch.equal(after[f"block_{b}/{n}"], seen[f"block_{b}/{n}"]) for n in names) for b in range(3))
    whole = (partition.sigma_min, partition.sigma_max)
    assert [(row["sigma_low"], row["sigma_high"]) == whole for row in rows] == [True, False, False]


def test_a_block_with_fewer_layers_copies_those_and_one_with_more_keeps_its_own(tmp_path):
    for split in ((2, 1), (1, 2)):
        trainer = tiny.trainer(tiny.config(tmp_path / str(split), blocks=2, split=split))
        before = everything(trainer)
        branch(trainer.offloader)
        after = everything(trainer)
        for name, t in after.items():
            if name.startswith("block_1/"):
                trunk = after.get(name.replace("block_1", "block_0"), before[name])
                assert torch.equal(t, trunk)


def test_loss_falls_for_every_block(tmp_path):
    trainer = tiny.trainer(tiny.config(tmp_path, steps=150, visit=25, lr=1e-2))
    rows = run(trainer, tiny.RandomBatches(64))
    for block in range(3):
        losses = [row["loss"] for row in rows if row["block"] == block]
        assert losses[-1] < 0.8 * losses[0], f"block {block}: {losses}"


def test_a_step_changes_its_block_and_the_shared_part_alone(tmp_path):
    trainer = tiny.trainer(tiny.config(tmp_path, visit=1))
    before = everything(trainer)
    trainer.changed.clear()
    block = trainer.step(*tiny.RandomBatches().batch(0)).block
    after = everything(trainer)
    changed = {
        name.split("/")[0] for name, t in after.items() if name not in before or not torch.equal(t, before[name])
    }
    assert changed == trainer.changed == {"shared", f"block_{block}"}


def test_frozen_ends_stay_as_they_are(tmp_path):
    trainer = tiny.trainer(tiny.config(tmp_path, shared="frozen"))
    before = everything(trainer)
    run(trainer)
    after = everything(trainer)
    assert all(torch.equal(t, before[name]) for name, t in after.items() if name.startswith("shared/"))
    assert any(not torch.equal(t, before[name]) for name, t in after.items())


def test_accumulation_is_the_mean_over_its_batches(tmp_path):
    """Two micro-batches of one step give the gradient of their mean loss: same weights as computed by hand."""
    config = tiny.config(tmp_path / "a", accumulate=2, steps=1, blocks=1, clip=0.0)
    by_hand = tiny.trainer(tiny.config(tmp_path / "b", blocks=1))
    trainer, batches = tiny.trainer(config), tiny.RandomBatches()
    for step in (0, 1):
        x, y = batches.batch(step)
        (by_hand.model.loss(0, x, y, seed=0, step=step).loss / 2).backward()
    for optimizer in by_hand.optimizers.values():
        optimizer.param_groups[0]["lr"] = config.lr
        optimizer.step()
    run(trainer, batches)
    ours, expected = everything(trainer), everything(by_hand)
    for name, t in ours.items():
        torch.testing.assert_close(t, expected[name], rtol=1e-5, atol=1e-7)  # a joint norm rounds otherwise


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_with_block_step_and_sigma(tmp_path, bad):
    class Poisoned(tiny.RandomBatches):
        def batch(self, step):
            x, y = super().batch(step)
            return (x * bad if step == 8 else x), y

    trainer = tiny.trainer(tiny.config(tmp_path))
    block = turn(8 // 3, 3, seed=0)
    with pytest.raises(NonFiniteLoss, match=rf"block {block} .* at step 8 \(sigma from"):
        run(trainer, Poisoned())
    assert all(t.isfinite().all() for t in everything(trainer).values()), "the bad step must not reach the weights"


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_a_logged_loss_is_the_steps(tmp_path, monkeypatch, accumulate):
    trainer, seen = tiny.trainer(tiny.config(tmp_path, accumulate=accumulate, steps=3)), []
    plain = trainer.model.loss_at
    monkeypatch.setattr(trainer.model, "loss_at", lambda *a, **k: seen.append(plain(*a, **k)) or seen[-1])
    rows = run(trainer)
    last = [loss.per_sample.mean().item() for loss in seen[-accumulate:]]
    assert rows[-1]["loss"] == pytest.approx(sum(last) / accumulate, rel=1e-6)


@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_the_levels_named_are_the_bad_micro_batches(tmp_path, monkeypatch, bad, what):
    trainer, seen = tiny.trainer(tiny.config(tmp_path, accumulate=3)), {}
    plain = trainer.model.loss_at

    def loss(*args, step, **rest):
        made = seen[step] = plain(*args, step=step, **rest)
        if step != 9 + bad:
            return made
        if what == "loss":
            return made._replace(loss=made.loss * float("nan"))
        made.loss.register_hook(lambda grad: grad * float("inf"))
        return made

    monkeypatch.setattr(trainer.model, "loss_at", loss)
    with pytest.raises(NonFiniteLoss) as error:
        run(trainer)
    named = [seen[9 + bad].sigma] if what == "loss" else [seen[step].sigma for step in (9, 10, 11)]
    low, high = torch.cat(named).aminmax()
    assert f"at step 3 (sigma from {low:.4g} to {high:.4g})" in str(error.value)


def test_the_first_bad_step_is_remembered_not_the_last(tmp_path, monkeypatch):
    trainer = tiny.trainer(tiny.config(tmp_path, steps=8))
    plain = trainer.model.loss_at

    def loss(*args, step, **rest):
        made = plain(*args, step=step, **rest)
        return made._replace(loss=made.loss * float("nan")) if step in (5, 7, 9) else made

    monkeypatch.setattr(trainer.model, "loss_at", loss)
    with pytest.raises(NonFiniteLoss, match="at step 5 "):
        run(trainer)


@pytest.mark.parametrize("change", [{"precision": "bfloat16"}, {"shared": "per_block"}, {"blocks": 2}, {"ema": 0.0}])
def test_other_settings_train(tmp_path, change):
    trainer = tiny.trainer(tiny.config(tmp_path, **change))
    rows = run(trainer)
    assert trainer.steps_done == trainer.config.total_steps
    assert all(row["loss"] > 0 for row in rows)


def test_compiled_blocks_train_to_the_same_loss(tmp_path):
    losses = []
    for compiled in (False, True):
        model = small.model(layers=2)  # of few operators: each kernel is a run of the C++ compiler
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # compiled, it draws other numbers
        settings = dict(device="cpu", offload="disk", folder=tmp_path / str(compiled), steps=9, visit=3, lr=1e-2)
        trainer = db.Trainer(model, **settings, compile=compiled)
        losses.append([trainer.step(*small.batch(step=step)).loss.item() for step in range(18)])
    # fused kernels round differently: float32 rounding, amplified over 18 steps of Adam
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert all("_orig_mod" not in name for name in everything(trainer)), "compiled in place"


@pytest.mark.parametrize(
    "change", [{"blocks": 4}, {"steps": 0}, {"sampling_steps": 2}, {"lr": 0.0}, {"ema": 1.0}, {"warmup": 1.0}]
)
def test_impossible_configs_are_refused_by_name(tmp_path, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        tiny.config(tmp_path, **change)


def test_independent_blocks_refuse_a_learned_codebook(tmp_path):
    with pytest.raises(ValueError, match="fixed codebook"):
        tiny.config(tmp_path, recipe="published", shared="per_block")


def test_a_branch_always_comes(tmp_path):
    """However late: blocks that never began as copies would stay as they were initialised."""
    late = tiny.config(tmp_path, branch=0.999, steps=4)
    assert late.trunk_steps == late.total_steps - 1
