"""A training step never waits for the device: no value is read on the host, no batch is copied with the host waiting.

On the CPU by steps on the meta device, whose tensors have no values to be read, and by watching copies; on a GPU by
CUDA's own word.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import diffusionblocks as db
import small
from diffusionblocks.targets.devices import check_labels, on_host, send
from diffusionblocks.training import trainer as training

META = torch.device("meta")
FIRST, LAST = 6, 12  # steps watched, of one visit: bringing a block may wait, recording a graph, a round's report
FINDS_MASKS = pytest.mark.xfail(
    strict=True,
    raises=(RuntimeError, NotImplementedError),
    reason="masked_cross_entropy waits once a call for the number of masks",
)
every_kind = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=FINDS_MASKS) if kind == "masked" else kind for kind in small.KINDS]
)


class Copies(TorchDispatchMode):
    """Notes copies from the host to the device for which the host waits."""

    def __init__(self):
        super().__init__()
        self.waited = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op is torch.ops.aten._to_copy.default:
            self.note(op, args[0], kwargs.get("device"), kwargs.get("non_blocking", False))
        if op is torch.ops.aten.copy_.default:
            self.note(op, args[1], args[0].device, args[2] if len(args) > 2 else False)
        return op(*args, **kwargs)

    def note(self, op, source, device, non_blocking):
        if source.device.type == "cpu" and device == META and not non_blocking:
            self.waited.append(f"{op} of {tuple(source.shape)}")


class Numbers(TorchFunctionMode):
    """Notes tensors that are made of Python's numbers on the device: the host waits for their copy, too."""

    def __init__(self):
        super().__init__()
        self.waited = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu") == META:
            self.waited.append(f"{function.__name__}{args}")
        return function(*args, **kwargs)


@contextlib.contextmanager
def no_copies():
    with Copies() as copies, Numbers() as numbers:
        yield
    assert not copies.waited + numbers.waited


def watched(trainer, kind, watch):
    """Train, within `watch` from step FIRST to step LAST; returns the steps it saw."""
    for step in range(FIRST):
        trainer.step(*small.batch(kind, step))
    batches, begin = [small.batch(kind, step) for step in range(99)], trainer.steps_done
    with watch:
        while trainer.steps_done <= LAST:
            trainer.step(*batches.pop())
    return list(range(begin, trainer.steps_done))


@every_kind
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_reads_no_value(kind, accumulate, monkeypatch):
    monkeypatch.setattr(training, "pick_device", torch.device)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # meta has none,
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: False)  # and to ask is an error
    model = small.model(kind, blocks=3, layers=3).to(META)
    trainer = db.Trainer(model, device="meta", offload=None, visit=20, accumulate=accumulate, log_every=100)
    trainer.steps_done = 1  # the first one of a round reports
    trainer.model.activate(trainer.block)
    seen = watched(trainer, kind, no_copies())
    assert len(seen) >= 5 and seen[-1] == LAST


@every_kind
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_cuda_reports_no_wait_in_a_step(kind, precision):
    model = small.model(kind, blocks=3, layers=3)
    trainer = db.Trainer(model, device="cuda", offload="cpu", visit=20, precision=precision, log_every=100)
    assert watched(trainer, kind, no_waits()) == list(range(FIRST, LAST + 1))
    trainer.check()


@contextlib.contextmanager
def no_waits():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_would_wait_is_seen():
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(torch.ones(2, device=META).all())
    for waits in (
        lambda: torch.ones(3).to(META),
        lambda: torch.empty(3, device=META).copy_(torch.ones(3)),
        lambda: torch.tensor([1.0, 2.0], device=META),
    ):
        with pytest.raises(AssertionError), no_copies():
            waits()
    with no_copies():
        send(torch.ones(4), META)


def test_values_are_checked_where_that_stops_nothing():
    labels = torch.tensor([0, 3, 9])
    check_labels("labels", labels, 10)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 9\), got 0 to 9"):
        check_labels("labels", labels, 9)
    with pytest.raises(ValueError, match="got -1 to 9"):
        check_labels("labels", labels.where(labels > 0, -1), 10)
    assert on_host(labels) and not on_host(labels.to(META))
    check_labels("labels", labels.to(META), 2)  # unread
    assert send(labels, "cpu") is labels


@pytest.mark.gpu
def test_a_batch_arrives_whole_though_nobody_waits():
    kept = [torch.randint(0, 99, (1 << 18,)) for _ in range(8)]
    sent = [send(t.clone(), "cuda") for t in kept]  # the host's copies are gone at once
    assert all(torch.equal(t.cpu(), k) for t, k in zip(sent, kept, strict=True))
    assert torch.equal(send(sent[0] + 1, "cpu"), kept[0] + 1)
