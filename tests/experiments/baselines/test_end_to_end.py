"""The baselines: tuned on the validation split alone, and what they claim about memory is so."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as functional

import tiny
from blobs import DATA, task
from diffusionblocks.experiments.baselines.end_to_end import Checkpointed, end_to_end
from diffusionblocks.experiments.baselines.forward_forward import (
    ForwardForward,
    forward_forward,
    goodness,
    wrong_labels,
)
from diffusionblocks.experiments.models import ViT
from diffusionblocks.experiments.tasks.vit import ViTTask
from diffusionblocks.noise.rng import stream
from diffusionblocks.offload.memory import SavedTensors
from diffusionblocks.training.finite import NonFiniteLoss

CPU = torch.device("cpu")


class Rows:
    """A callback that keeps the log."""

    def __init__(self):
        self.rows = []

    def on_log(self, trainer, row):
        self.rows.append(dict(row))


def test_end_to_end_learns_and_repeats(tmp_path):
    log = Rows()
    one, same = (end_to_end(task(tmp_path, steps=150), CPU, log) for _ in range(2))
    assert one.test["accuracy"] > 60 and one.val["accuracy"] > 60
    assert (one.val, one.test, one.memory) == (same.val, same.test, same.memory)
    assert log.rows[-1]["loss"] < 0.6 * log.rows[0]["loss"]
    assert [row["step"] for row in log.rows] == 2 * [25, 50, 75, 100, 125, 150]


def test_the_choice_is_made_on_validation_and_every_try_is_recorded(tmp_path, monkeypatch):
    read, original = [], ViTTask.score
    monkeypatch.setattr(ViTTask, "score", lambda self, *args: read.append(args[1]) or original(self, *args))
    tuned = task(tmp_path, tune_lr=(1e-5, 1e-2), tune_warmup=(0.1, 0.3))
    result = end_to_end(tuned, CPU)
    tried = [(t["lr"], t["warmup"]) for t in result.tried]
    assert tried == [(1e-5, 0.1), (1e-2, 0.1), (1e-2, 0.3)], "all rates, then the other warm-ups at the best rate"
    best = max(result.tried, key=lambda t: t["val"])
    assert result.choice == {"lr": best["lr"], "warmup": best["warmup"]}
    assert result.val["accuracy"] == best["val"]
    assert read == ["val", "val", "val", "test"], "test is read once, at the end"


def test_a_given_choice_is_not_searched(tmp_path):
    choice = {"lr": 3e-3, "warmup": 0.2}
    result = end_to_end(task(tmp_path), CPU, choice=choice)
    assert result.tried == [{**choice, "val": result.val["accuracy"]}] and result.choice == choice


def test_checkpointing_changes_memory_and_nothing_else(tmp_path):
    plain, saved = (end_to_end(task(tmp_path), CPU, name=name) for name in ("end-to-end", "checkpointing"))
    assert saved.name == "checkpointing" and saved.test == plain.test
    assert saved.memory["activations"] < 0.7 * plain.memory["activations"]
    torch.manual_seed(0)
    network, x = ViT(tiny.MODEL, conditioned=False), torch.randn(4, 1, 8, 8)
    gradients = []
    for _ in range(2):
        network.zero_grad()
        network(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
        network.layers = torch.nn.ModuleList(Checkpointed(layer) for layer in network.layers)
    # the same operations in the same order: no rounding differs
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_shallow_network_has_the_depth_of_one_block(tmp_path):
    whole, part = (end_to_end(task(tmp_path), CPU, name=name) for name in ("end-to-end", "shallow"))
    assert part.name == "shallow" and part.memory["activations"] < 0.5 * whole.memory["activations"]


def test_a_loss_that_is_not_finite_stops_with_the_step(tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"end-to-end: the loss or gradient .* at step"):
        end_to_end(task(tmp_path, tune_lr=(1e30,)), CPU)


def test_forward_forward_beats_chance(tmp_path):
    tuned = task(tmp_path, steps=240, tune_lr=(1e-7, 1e-3), tune_warmup=(0.1,))
    result = forward_forward(tuned, CPU)
    assert result.test["accuracy"] > 25  # ten classes
    assert result.choice["lr"] == 4e-3 and [one["lr"] for one in result.tried] == [4e-7, 4e-3]


def test_no_gradient_crosses_layers_of_forward_forward():
    network = ForwardForward(tiny.MODEL)
    x, y = torch.randn(8, 1, 8, 8), torch.arange(8)
    for i, out in enumerate(network.outputs(network.embed(x, y))):
        network.zero_grad()
        goodness(out).sum().backward()
        touched = [j for j, layer in enumerate(network.layers) if any(p.grad is not None for p in layer.parameters())]
        assert touched == [i]
        assert (network.patch.weight.grad is not None) == (i == 0), "the stem is the first layer's"


def test_forward_forward_holds_one_layers_activations(tmp_path):
    network, x, y, alive = ForwardForward(tiny.MODEL), torch.randn(32, 1, 8, 8), torch.arange(32) % 10, []
    hidden: list = []
    for layer in network.layers:
        layer.register_forward_pre_hook(lambda *_: alive.append([ref() is not None for ref in hidden]))
        layer.mlp[0].register_forward_hook(lambda module, inputs, out: hidden.append(weakref.ref(out)))
    with SavedTensors(network.parameters()).count() as saved:
        loss = network.loss(x, y, seed=0, step=0)
    assert alive == [[], [False], [False, False]], "a layer's are freed before the next one's are made"
    loss.backward()
    result = end_to_end(task(tmp_path), CPU)
    assert saved.bytes < 1.5 * 2 * result.memory["activations"] / 3  # two batches through one of three layers


def test_forward_forwards_loss_and_gradient_are_those_of_its_layers():
    network, x, y = ForwardForward(tiny.MODEL), torch.randn(8, 1, 8, 8), torch.arange(8)
    loss = network.loss(x, y, seed=0, step=0)
    loss.backward()
    gradients = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    false = wrong_labels(y, 10, torch.Generator().manual_seed(stream(0, "wrong", 0)))
    losses = [
        functional.softplus(torch.cat([-true, false])).mean() * 2
        for true, false in (
            goodness(out).chunk(2)
            for out in network.outputs(network.embed(x.repeat(2, 1, 1, 1), torch.cat([y, false])))
        )
    ]
    sum(losses).backward()
    assert loss.item() == pytest.approx(sum(losses).item() / 3, rel=1e-5)
    for ours, p in zip(gradients, network.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-4, atol=1e-6)


def test_a_network_in_bfloat16_is_evaluated(tmp_path):
    result = end_to_end(task(tmp_path, steps=150, precision="bfloat16"), CPU)
    assert result.test["accuracy"] > 60


def test_without_an_ordinary_network_it_is_the_same_in_one_block(tmp_path, monkeypatch):
    monkeypatch.setattr(ViTTask, "network", lambda self: None)
    monkeypatch.setattr(ViTTask, "data", DATA)
    log = Rows()
    plain, saved = (
        end_to_end(task(tmp_path, steps=60, log_every=30), CPU, log, name=name)
        for name in ("end-to-end", "checkpointing")
    )
    assert plain.test["accuracy"] > 30 and "bound_bits" in plain.test
    assert saved.test["accuracy"] == plain.test["accuracy"]
    assert saved.memory["activations"] < 0.8 * plain.memory["activations"]
    assert {row["block"] for row in log.rows} == {0} and log.rows[0]["step"] == 30


def test_wrong_labels_are_wrong_and_all_of_them_come():
    y = torch.arange(10).repeat(200)
    wrong = wrong_labels(y, 10, torch.Generator().manual_seed(0))
    assert not (wrong == y).any() and wrong.min() >= 0 and wrong.max() < 10
    assert len(set((wrong - y).remainder(10).tolist())) == 9
