"""The baselines: tuned on the validation split alone, and what they claim about memory is so."""

from __future__ import annotations

import pytest
import torch

import tiny
from blobs import adapter
from diffusionblocks.experiments.baselines.end_to_end import Checkpointed, end_to_end
from diffusionblocks.experiments.baselines.forward_forward import (
    ForwardForward,
    forward_forward,
    goodness,
    train_layers,
    wrong_labels,
)
from diffusionblocks.experiments.models import ViT
from diffusionblocks.experiments.session import NonFiniteLoss
from diffusionblocks.experiments.tasks.vit import ViTAdapter

CPU = torch.device("cpu")


def test_end_to_end_learns_and_repeats(tmp_path):
    rows: list = []
    one, same = (end_to_end(adapter(tmp_path, steps=150), CPU, on_log=rows.append) for _ in range(2))
    assert one.test["accuracy"] > 60 and one.val["accuracy"] > 60
    assert (one.val, one.test, one.memory) == (same.val, same.test, same.memory)
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"] and {row["run"] for row in rows} == {"end-to-end"}


def test_the_choice_is_made_on_validation_and_every_try_is_recorded(tmp_path, monkeypatch):
    read, original = [], ViTAdapter.score
    monkeypatch.setattr(ViTAdapter, "score", lambda self, *args: read.append(args[1]) or original(self, *args))
    tuned = adapter(tmp_path, tune_lr=(1e-5, 1e-2), tune_warmup=(0.1, 0.3))
    result = end_to_end(tuned, CPU, on_log=lambda row: None)
    tried = [(t["lr"], t["warmup"]) for t in result.tried]
    assert tried == [(1e-5, 0.1), (1e-2, 0.1), (1e-2, 0.3)], "all rates, then the other warm-ups at the best rate"
    best = max(result.tried, key=lambda t: t["val"])
    assert result.choice == {"lr": best["lr"], "warmup": best["warmup"]}
    assert result.val["accuracy"] == best["val"]
    assert read == ["val", "val", "val", "test"], "test is read once, at the end"


def test_a_given_choice_is_not_searched(tmp_path):
    choice = {"lr": 3e-3, "warmup": 0.2}
    result = end_to_end(adapter(tmp_path), CPU, on_log=lambda row: None, choice=choice)
    assert result.tried == [{**choice, "val": result.val["accuracy"]}] and result.choice == choice


def test_checkpointing_changes_memory_and_nothing_else(tmp_path):
    plain, saved = (
        end_to_end(adapter(tmp_path), CPU, on_log=lambda row: None, name=name)
        for name in ("end-to-end", "checkpointing")
    )
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
    whole, part = (
        end_to_end(adapter(tmp_path), CPU, on_log=lambda row: None, name=name) for name in ("end-to-end", "shallow")
    )
    assert part.name == "shallow" and part.memory["activations"] < 0.5 * whole.memory["activations"]


def test_a_loss_that_is_not_finite_stops_with_the_step(tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"end-to-end: .* at or before step"):
        end_to_end(adapter(tmp_path, tune_lr=(1e30,)), CPU, on_log=lambda row: None)


def test_forward_forward_beats_chance(tmp_path):
    tuned = adapter(tmp_path, steps=400, tune_lr=(1e-7, 1e-3), tune_warmup=(0.1,))
    result = forward_forward(tuned, CPU, on_log=lambda row: None)
    assert result.test["accuracy"] > 25  # ten classes
    assert result.choice["lr"] == 4e-3 and [one["lr"] for one in result.tried] == [4e-7, 4e-3]


def test_no_gradient_crosses_layers_of_forward_forward(tmp_path):
    network = ForwardForward(adapter(tmp_path).config)
    x, y = torch.randn(8, 1, 8, 8), torch.arange(8)
    for i, out in enumerate(network.outputs(network.embed(x, y))):
        network.zero_grad()
        goodness(out).sum().backward()
        touched = [j for j, layer in enumerate(network.layers) if any(p.grad is not None for p in layer.parameters())]
        assert touched == [i]
        assert (network.patch.weight.grad is not None) == (i == 0), "the stem is the first layer's"


def test_forward_forward_holds_one_layers_activations(tmp_path):
    network = ForwardForward(adapter(tmp_path).config)
    x, y = torch.randn(32, 1, 8, 8), torch.arange(32) % 10
    loss, most = train_layers(network, x, y)
    result = end_to_end(adapter(tmp_path), CPU, on_log=lambda row: None)
    assert loss > 0 and most < 0.7 * result.memory["activations"]


def test_wrong_labels_are_wrong_and_all_of_them_come():
    y = torch.arange(10).repeat(200)
    wrong = wrong_labels(y, 10, torch.Generator().manual_seed(0))
    assert not (wrong == y).any() and wrong.min() >= 0 and wrong.max() < 10
    assert len(set((wrong - y).remainder(10).tolist())) == 9
