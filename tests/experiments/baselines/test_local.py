"""The local baseline: no gradient crosses blocks, one block's activations are held at a time, and it learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional

import tiny
from blobs import task
from diffusionblocks.experiments.baselines.end_to_end import end_to_end
from diffusionblocks.experiments.baselines.local import Local, local
from diffusionblocks.offload.memory import SavedTensors

CPU = torch.device("cpu")


def moved():
    """A network whose heads, which begin at zero, pass gradients on."""
    torch.manual_seed(0)
    network = Local(tiny.MODEL, (2, 1))
    for head in network.heads:
        torch.nn.init.normal_(head.head.linear.weight)
    return network


def test_it_learns_at_the_rate_that_validation_chooses(tmp_path):
    result = local(task(tmp_path, steps=60, tune_lr=(1e-6, 1e-2)), CPU)
    assert result.name == "local" and result.choice["lr"] == 1e-2 and len(result.tried) == 2
    assert result.test["accuracy"] > 40  # ten classes


def test_no_gradient_crosses_blocks():
    network, x, y = moved(), torch.randn(8, 1, 8, 8), torch.arange(8)
    for i, logits in enumerate(network.outputs(x)):
        network.zero_grad()
        functional.cross_entropy(logits, y).backward()
        layers = [j for j, layer in enumerate(network.layers) if any(p.grad is not None for p in layer.parameters())]
        heads = [j for j, head in enumerate(network.heads) if any(p.grad is not None for p in head.parameters())]
        assert layers == [[0, 1], [2]][i] and heads == [i]
        assert (network.stem.patch.weight.grad is not None) == (i == 0), "the stem is the first block's"


def test_loss_and_gradient_are_those_of_the_blocks():
    network, x, y = moved(), torch.randn(8, 1, 8, 8), torch.arange(8)
    loss = network.loss(x, y, seed=0, step=0)
    loss.backward()
    gradients = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    losses = [functional.cross_entropy(logits, y) for logits in network.outputs(x)]
    sum(losses).backward()
    assert loss.item() == pytest.approx(sum(losses).item() / 2, rel=1e-5)
    for ours, p in zip(gradients, network.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-4, atol=1e-6)
    assert torch.equal(network(x), [*network.outputs(x)][-1])


def test_it_holds_one_blocks_activations(tmp_path):
    network = Local(tiny.MODEL, (1, 1, 1))
    with SavedTensors(network.parameters()).count() as saved:
        network.loss(torch.randn(32, 1, 8, 8), torch.arange(32) % 10, seed=0, step=0).backward()
    whole = end_to_end(task(tmp_path, steps=1), CPU).memory["activations"]  # of as large a batch
    assert saved.bytes < 0.5 * whole
