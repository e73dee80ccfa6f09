"""What can't be recorded as a graph trains as ever, and one warning says why."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import diffusionblocks as db
import small
from captured import STEPS, assert_alike, dense, train, trainer
from diffusionblocks.noise.rng import stream
from diffusionblocks.training import step as training_step
from diffusionblocks.training.optimizer import clipped_step
from recorded_graphs import RecordedGraphs, Recorder


class Reading(nn.Module):
    """A layer that counts its calls in a buffer, and then does what a graph can't."""

    def __init__(self, inner, do):
        super().__init__()
        self.inner, self.do = inner, do
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, h):
        self.calls += 1
        return self.do(self, self.inner(h))


def item(layer, h):
    return h * (1.0 if h.abs().max().item() >= 0 else 2.0)


def refuse_a_graph(layer, h):
    if torch._C._len_torch_dispatch_stack():
        raise NotImplementedError("not\nhere")
    return h


def replace_a_buffer_in_a_graph(layer, h):
    if any(isinstance(mode, Recorder) for mode in _get_current_dispatch_mode_stack()):
        layer.calls, layer.seen = layer.calls * 1.0, True
    return h


class Halfway(torch.autograd.Function):
    """Reads a value in the middle of the backward pass."""

    @staticmethod
    def forward(ctx, h):
        return h.clone()

    @staticmethod
    def backward(ctx, gradient):
        if torch._C._len_torch_dispatch_stack():
            raise NotImplementedError("halfway")
        return gradient


def fail_halfway(layer, h):
    return Halfway.apply(h)


def count_in_python(layer, h):
    layer.seen = getattr(layer, "seen", 0) + 1
    return h * layer.seen


@pytest.mark.parametrize("watching", [True, False])
@pytest.mark.parametrize(
    ("do", "reason"),
    [
        (item, "reads values"),
        (refuse_a_graph, "NotImplementedError: not "),
        (fail_halfway, "halfway"),
        (replace_a_buffer_in_a_graph, "in place of a block's"),
        (count_in_python, "again and again"),
    ],
)
def test_a_model_that_cannot_be_recorded_trains_as_ever_and_says_why_once(graphs, watching, do, reason):
    def model():
        torch.manual_seed(0)
        layers = [Reading(small.Residual(8), do) for _ in range(3)]
        return db.from_layers(
            layers, blocks=3, dim=8, stem=nn.Linear(6, 8), head=nn.Linear(8, 3), target=db.LabelTarget(3, 8)
        )

    graphs.watching = watching
    ours, plain = (trainer(captured, model(), offload=None)[0] for captured in (None, False))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert train(ours) == train(plain)
    assert_alike(ours, plain)
    layers = [[vars(m).keys() for m in one.model.modules() if isinstance(m, Reading)] for one in (ours, plain)]
    assert layers[0] == layers[1], "a try that failed leaves nothing"
    assert sum(float(block.layers[0].layer.calls) for block in ours.model.blocks) == STEPS
    assert graphs.replays == 0
    lines = [str(w.message) for w in caught if "CUDA graphs" in str(w.message)]
    assert len(lines) == 1 and reason in lines[0] and "\n" not in lines[0]


def test_an_update_that_needs_numbers_from_the_host_is_made_once(graphs, monkeypatch):
    def needs_numbers(optimizer, norm, max_norm, rates=None):
        if rates is not None:
            raise TypeError("a number")
        return clipped_step(optimizer, norm, max_norm)

    monkeypatch.setattr(training_step, "clipped_step", needs_numbers)
    ours, plain = (trainer(captured, offload="cpu")[0] for captured in (None, False))
    with pytest.warns(UserWarning, match="TypeError: a number"):
        losses = train(ours)
    assert losses == train(plain)
    assert_alike(ours, plain)


def test_a_masked_model_that_counts_its_masks_is_not_recorded(graphs):
    ours, plain = (trainer(captured, small.model("masked", blocks=3, layers=3))[0] for captured in (None, False))
    with pytest.warns(UserWarning, match="reads values"):
        losses = train(ours, kind="masked")
    assert losses == train(plain, kind="masked") and graphs.recordings == 0
    assert_alike(ours, plain)


def obstacle(name):
    if name == "optimizer":
        return db.Trainer(
            dense("labels"), optimizer=lambda params: torch.optim.SGD(params, 0.1), device="cpu", capture=True
        )
    return trainer(True, accumulate=2 if name == "accumulate" else 1)[0]


@pytest.mark.parametrize(
    ("name", "reason"), [("accumulate", "several batches"), ("optimizer", "SGD"), ("hooks", "hooks")]
)
def test_what_forbids_graphs_is_said(graphs, name, reason):
    if name == "hooks":
        made = obstacle(name)
        made.model.blocks[0].layers[0].register_forward_hook(lambda *_: None)
        with pytest.warns(UserWarning, match=f"without CUDA graphs: .*{reason}"):
            train(made)
    else:
        with pytest.warns(UserWarning, match=f"without CUDA graphs: .*{reason}"):
            made = obstacle(name)
        made.step(*small.batch())
    assert graphs.recordings == 0


def test_by_default_a_cpu_has_no_graphs_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(trainer(None)[0], last=4)
    with pytest.warns(UserWarning, match="the device is cpu"):
        made, _ = trainer(True)
    train(made, last=4)
    with pytest.raises(ValueError, match="capture"):
        trainer("yes")


def test_a_stream_takes_no_tensor():
    for given in ((torch.tensor(1), "a"), (0, "a", torch.tensor(1))):
        with pytest.raises(TypeError, match="tensor"):
            stream(*given)


def test_the_stand_in_bakes_numbers_reads_memory_and_does_nothing_while_it_records():
    graphs, memory, number = RecordedGraphs(), torch.tensor([1.0, 2.0]), [3.0]

    def work():
        memory.add_(number[0])
        return memory * 2, torch.rand(2)

    before = torch.default_generator.get_state()
    replay, (doubled, drawn) = graphs.record(work)
    assert memory.tolist() == [1.0, 2.0] and torch.equal(before, torch.default_generator.get_state())
    number[0] = 100.0
    memory.zero_()
    replay()
    assert memory.tolist() == [3.0, 3.0] and doubled.tolist() == [6.0, 6.0]
    torch.default_generator.set_state(before)
    assert torch.equal(torch.rand(2), drawn)
    with pytest.raises(RuntimeError, match="reads values"):
        graphs.record(lambda: memory.add_(1).sum().item())
    assert memory.tolist() == [3.0, 3.0]
