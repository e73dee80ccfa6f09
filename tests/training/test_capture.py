"""Steps as graphs: bit for bit the steps without, one recording per place, and one line that says why there is none."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import diffusionblocks as db
import small
from captured import SETTINGS, STEPS, assert_alike, both, dense, train, trainer
from diffusionblocks.training.optimizer import BlockAdamW


@pytest.mark.parametrize("kind", small.KINDS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("offload", [None, "cpu"])
def test_graphs_change_no_bit(graphs, kind, precision, offload):
    both(kind=kind, precision=precision, offload=offload)
    # All blocks come to the one slot; where they stay, each has a graph of its own, after two steps without. An image's
    # shape is learnt in the first step, which makes it another one.
    places, early = (1, 2) if offload else (3, 6)
    assert graphs.recordings == places
    assert STEPS - early - 1 <= graphs.replays <= STEPS - early


@pytest.mark.parametrize("shared", ["per_block", "frozen"])
@pytest.mark.parametrize("slots", [1, 2])
def test_blocks_with_ends_of_their_own_share_a_graph(graphs, shared, slots):
    both(lambda kind: dense(kind, shared=shared), offload="cpu", slots=slots, steps=39)
    assert graphs.recordings == slots and graphs.replays == 39 - 2 * slots


def test_blocks_of_other_sizes_have_graphs_of_their_own(graphs):
    both(lambda kind: small.model(kind, blocks=3, layers=4), offload="cpu")
    assert graphs.recordings == 2


def test_without_clipping_and_averages(graphs):
    both(offload="cpu", ema=0.0, clip=0.0)
    assert graphs.recordings == 1


def test_learning_rates_by_group(graphs):
    def make(params):
        return BlockAdamW([{"params": params[:1], "lr": 0.03}, {"params": params[1:], "betas": (0.8, 0.9)}], lr=0.01)

    made = []
    for captured in (True, False):
        settings = {k: v for k, v in SETTINGS.items() if k != "lr"}
        made.append(
            db.Trainer(dense("labels"), optimizer=make, offload="cpu", capture=captured, device="cpu", **settings)
        )
    assert train(made[0]) == train(made[1])
    assert_alike(*made)
    assert graphs.recordings == 1


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_branching_noise_cut_anew_and_all_that_comes_between_steps(graphs, offload, tmp_path):
    made = [trainer(captured, offload=offload, branch=0.25)[0] for captured in (True, False)]
    found = []
    for one in made:
        losses = train(one, 0, 14)  # branches after ten
        losses.append(db.sample(one.model, small.batch()[0], steps=3).tolist())  # brings other blocks
        losses += train(one, 14, 15)
        with one.averages():
            losses.append(one.model.eval()(small.batch()[0]).tolist())
        losses += train(one, 15, 18)
        one.save(tmp_path / "saved")
        train(one, 18, 20)
        one.load(tmp_path / "saved")
        losses += train(one, 18, 40)
        found.append(losses)
    assert found[0] == found[1]
    assert_alike(*made)
    assert graphs.replays > 20


@pytest.mark.parametrize("at", [3, 9, 15])
def test_a_step_that_is_not_finite_is_skipped_and_named(graphs, at):
    messages = []
    for captured in (True, False):
        made, _ = trainer(captured, dense("images"), offload="cpu", log_every=100)
        for step in range(20):
            x, y = small.batch("images", step)
            made.step(x, y * math.nan if step == at else y)
        with pytest.raises(db.NonFiniteLoss, match=f"at step {at} ") as caught:
            made.check()
        messages.append((str(caught.value), {n: t.tolist() for n, t in small.everything(made).items()}))
    assert messages[0] == messages[1]
    assert graphs.replays == 17


def test_batches_of_other_sizes_are_recorded_a_few_times(graphs):
    made = [trainer(captured, offload="cpu")[0] for captured in (True, False)]
    sizes = [8, 8, 8, 5, 8, 5, 5, 8, 3, 3, 3, 2, 2, 2, 1, 1, 1, 8, 1, 5, 3]
    found = [[train(one, i, i + 1, size=size) for i, size in enumerate(sizes)] for one in made]
    assert found[0] == found[1]
    assert_alike(*made)
    assert graphs.recordings == 4  # and never batches of one
    assert graphs.replays == 9


class Scaled(nn.Module):
    """A layer with a setting of its own."""

    def __init__(self, inner, scale):
        super().__init__()
        self.inner, self._scale = inner, scale

    def forward(self, h):
        return self.inner(h) * self._scale


@pytest.mark.parametrize("change", ["private", "dropout", "tensor", "frozen", "decay"])
def test_blocks_that_compute_something_else_do_not_share_a_graph(graphs, change):
    def model(kind):
        torch.manual_seed(0)
        scales = [torch.full((2000,), 1.0 + b / 10)[999] if change == "tensor" else 1.0 for b in range(3)]
        scales[1] = 1.5 if change == "private" else scales[1]
        layers = [
            Scaled(small.Residual(8, 0.5 if change == "dropout" and b == 1 else 0.1), s) for b, s in enumerate(scales)
        ]
        made = db.from_layers(
            layers, blocks=3, dim=8, stem=nn.Linear(6, 8), head=nn.Linear(8, 3), target=db.LabelTarget(3, 8)
        )
        if change == "frozen":
            made.blocks[1].layers[0].layer.inner.linear.bias.requires_grad_(False)
        return made

    ours, plain = (trainer(captured, model("labels"), offload="cpu")[0] for captured in (True, False))
    if change == "decay":
        for one in (ours, plain):
            one.optimizers["block_1"].param_groups[0]["weight_decay"] = 0.5
    assert train(ours) == train(plain)
    assert_alike(ours, plain)
    assert graphs.recordings == (3 if change == "tensor" else 2)


@pytest.mark.filterwarnings("ignore:.*new tensors in place")
@pytest.mark.parametrize("change", ["dropout", "frozen"])
def test_a_setting_changed_between_visits_is_seen(graphs, change):
    class Schedule:
        def on_block_start(self, trainer, block):
            if trainer.steps_done < 12:
                return
            for layer in (m for m in trainer.model.blocks[block].modules() if isinstance(m, small.Residual)):
                if change == "dropout":
                    layer.dropout.p = 0.4
                else:
                    layer.norm.bias.requires_grad_(False)

    made = [trainer(captured, offload="cpu")[0] for captured in (True, False)]
    for one in made:
        one.callbacks.append(Schedule())
    assert train(made[0]) == train(made[1])
    assert_alike(*made)
    assert change == "frozen" or graphs.recordings == 2  # what is frozen has a count of updates of its own from now on


def test_a_loss_of_ones_own_may_depend_on_the_block(graphs):
    class Own(db.DiffusionBlocks):
        def loss_at(self, block, *args, **options):
            loss = super().loss_at(block, *args, **options)
            return loss._replace(loss=loss.loss * (block + 1))

    def model(kind):
        made = dense(kind)
        made.__class__ = Own
        return made

    both(model, kind="images", offload="cpu")
    assert graphs.recordings == 3
