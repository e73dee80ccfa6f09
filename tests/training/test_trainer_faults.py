"""A trainer that is interrupted, misused or mid-step: it goes on right, or refuses."""

from __future__ import annotations

import pytest
import torch

import diffusionblocks as db
import small
from small import assert_alike


def trainer(seed=0, **settings):
    return db.Trainer(small.model(seed=seed), **{"device": "cpu", "visit": 2, "ema": 0.9, **settings})


def run(made, first, last):
    for step in range(first, last):
        made.step(*small.batch(step=step))
    return made


class Raising(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise MemoryError


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_backward_pass_that_fails_leaves_no_gradient(accumulate):
    made = run(trainer(accumulate=accumulate), 0, 2 * accumulate + accumulate - 1)
    hook = made.model.blocks[made.block].layers[0].register_forward_hook(lambda module, given, h: Raising.apply(h))
    with pytest.raises(MemoryError):
        run(made, 20, 21)
    hook.remove()
    run(made, 2 * accumulate, 4 * accumulate)
    assert_alike(made, run(trainer(accumulate=accumulate), 0, 4 * accumulate))


def test_gradients_of_ones_own_are_not_mixed_into_a_step():
    made = run(trainer(), 0, 2)
    made.model.loss(made.block, *small.batch(), seed=0, step=0).loss.backward()
    assert_alike(run(made, 2, 4), run(trainer(), 0, 4))


def test_sampling_between_accumulated_batches_changes_nothing():
    made = run(trainer(accumulate=2), 0, 1)
    db.sample(made.model, small.batch()[0], steps=3)
    assert_alike(run(made, 1, 4), run(trainer(accumulate=2), 0, 4))


def test_a_save_amid_a_step_is_refused_and_a_load_forgets_half_a_step(tmp_path):
    made = run(trainer(accumulate=2), 0, 4)
    made.save(tmp_path)
    run(made, 4, 5)
    with pytest.raises(RuntimeError, match="1 of a step's 2 batches"):
        made.save(tmp_path)
    made.load(tmp_path)
    assert_alike(run(made, 4, 8), run(trainer(accumulate=2), 0, 8))


def test_averages_are_neither_trained_nor_saved_nor_loaded_over(tmp_path):
    made = run(trainer(), 0, 4)
    made.save(tmp_path)
    with made.averages():
        calls = {"step": lambda: run(made, 4, 5), "save": lambda: made.save(tmp_path),
                 "load": lambda: made.load(tmp_path), "release": made.offloader.release}  # fmt: skip
        for name, call in calls.items():
            with pytest.raises(RuntimeError, match=f"{name}: the weights are their averages"):
                call()
    assert_alike(run(made, 4, 6), run(trainer(), 0, 6))


@pytest.mark.parametrize("offload", [None, "cpu", "disk"])
def test_a_trainer_that_released_its_model_does_nothing_more(tmp_path, offload):
    made = run(trainer(offload=offload, folder=tmp_path / "waiting"), 0, 3)
    made.offloader.release()
    calls = {"step": lambda: run(made, 3, 4), "save": lambda: made.save(tmp_path / "saved"),
             "release": made.offloader.release}  # fmt: skip
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=f"{name}: the model was released"):
            call()


def test_a_model_that_is_managed_is_not_touched_by_a_second_trainer():
    made = trainer()
    with pytest.raises(ValueError, match="managed already"):
        db.Trainer(made.model, device="cpu", precision="bfloat16")
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}


def test_training_goes_on_from_a_checkpoint_after_a_bad_step(tmp_path):
    made = run(trainer(log_every=1), 0, 2)
    made.save(tmp_path)
    x, y = small.batch()
    with pytest.raises(db.NonFiniteLoss, match="mend the data"):
        made.step(x * float("nan"), y)
    made.load(tmp_path)
    assert_alike(run(made, 2, 4), run(trainer(), 0, 4))
    made.check()


def test_blocks_with_frozen_layers_branch_off():
    model = small.model()
    frozen = model.blocks[1].layers[0].layer.linear.requires_grad_(False)
    made = db.Trainer(model, device="cpu", branch=0.5, steps=4)
    run(made, 0, 3)
    assert torch.equal(frozen.weight, model.blocks[0].layers[0].layer.linear.weight) or made.block == 0
    assert "ema/layers.0.layer.linear.weight" not in made.offloader.tensors("block_1")
