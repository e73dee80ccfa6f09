"""A step and an evaluation by averages exclude each other, whatever threads ask for."""

from __future__ import annotations

import threading

import pytest
import torch

import diffusionblocks as db
import small
import tiny_transformers as tiny
from small import assert_alike, run

GPT = "GPT2LMHeadModel"


def trainer(place="cpu", slots=1):
    model = small.model(blocks=3, layers=3)
    return db.Trainer(model, device="cpu", offload=place, slots=slots, visit=1, ema=0.9)


def in_thread(function):
    """Call a function in another thread; return what it raised."""
    errors = []

    def call():
        try:
            function()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    return errors[0] if errors else None


ASKED = {
    "averages": lambda made, folder: made.averages().__enter__(),
    "forward": lambda made, folder: made.model(small.batch()[0]),
    "save_pretrained": lambda made, folder: made.model.save_pretrained(folder),
    "activate": lambda made, folder: made.model.activate((made.block + 1) % 3),
    "save": lambda made, folder: made.save(folder),
    "release": lambda made, folder: made.offloader.release(),
    "step": lambda made, folder: made.step(*small.batch()),
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("place", [None, "cpu"])
def test_another_thread_is_refused_while_a_step_computes(tmp_path, asked, place):
    if asked == "activate" and place is None:
        return  # nothing moves
    made, errors = run(trainer(place), 2), []

    def ask(module, given, h):
        errors.append(in_thread(lambda: ASKED[asked](made, tmp_path / "saved")))

    hook = made.model.blocks[made.block].layers[0].register_forward_hook(ask)
    run(made, 3)
    hook.remove()
    assert isinstance(errors[0], RuntimeError) and "between two steps" in str(errors[0])
    assert_alike(run(made, 6), run(trainer(place), 6))


def test_weights_are_averages_until_the_last_evaluation_ends():
    made, entered, leave = run(trainer(), 4), threading.Event(), threading.Event()
    before = made.model.state_dict()

    def evaluate():
        with made.averages():
            entered.set()
            leave.wait(20)

    thread = threading.Thread(target=evaluate)
    with made.averages():
        thread.start()
        assert entered.wait(20)
        with made.averages():
            pass
        inner = made.model.state_dict()
    after = made.model.state_dict()
    with pytest.raises(RuntimeError, match="the weights are their averages now"):
        made.step(*small.batch())
    leave.set()
    thread.join()
    names = [name for name, t in before.items() if not torch.equal(t, inner[name])]
    assert names and all(torch.equal(t, after[name]) for name, t in inner.items())
    assert all(torch.equal(t, before[name]) for name, t in made.model.state_dict().items())
    assert_alike(run(made, 6), run(trainer(), 6))


@pytest.mark.parametrize("slots", [1, 2])
def test_a_block_does_not_move_while_another_thread_evaluates(slots):
    """It may compute with the one that would leave; where nothing waits, threads evaluate together."""
    for place in ("cpu", None):
        made, entered, leave = run(trainer(place, slots if place else 1), 4), threading.Event(), threading.Event()
        x = small.batch()[0]
        expected = made.model.eval()(x)

        def evaluate(made=made, entered=entered, leave=leave):
            with made.averages():
                entered.set()
                leave.wait(20)

        thread = threading.Thread(target=evaluate)
        thread.start()
        assert entered.wait(20)
        if place:
            with pytest.raises(RuntimeError, match="another thread evaluates, and the blocks wait elsewhere"):
                made.model(x)
        else:
            assert torch.equal(made.model(x), expected)
        leave.set()
        thread.join()
        assert torch.equal(made.model(x), expected)


def waits(call, entered, leave):
    """Return a call that says when it has begun, and goes on when it may."""

    def later(*args, **kwargs):
        entered.set()
        leave.wait(20)
        return call(*args, **kwargs)

    return later


@pytest.mark.parametrize("use", ["denoise", "logits", "ensemble"])
def test_a_block_does_not_move_while_another_thread_computes_with_it(use):
    """The same block serves several threads."""
    causal = use != "denoise"
    model = tiny.convert(tiny.network(GPT), 2, cond=0) if causal else small.model()
    db.Trainer(model, device="cpu", offload="cpu", adapt=False)
    x = (tiny.batch(GPT) if causal else small.batch())[0]
    model.eval().ensemble = use == "ensemble"
    z = torch.randn(*x.shape, model.target.table.shape[1]) if causal else torch.randn(8, 8)

    def ask(block):
        return model.logits(x, block) if use == "logits" else model.denoise(x, z, 1.0, block=block).raw

    expected, found, entered, leave = [ask(b) for b in range(2)], [], threading.Event(), threading.Event()
    layer = model.blocks[0].layers[0]
    layer.forward = waits(layer.forward, entered, leave)
    thread = threading.Thread(target=lambda: found.append(ask(0)))
    thread.start()
    assert entered.wait(20)
    for other in (lambda: ask(1), lambda: model.offloader.activate(1)):
        with pytest.raises(RuntimeError, match="another thread evaluates, and the blocks wait elsewhere"):
            other()
    leave.set()
    del layer.forward
    thread.join()
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(ask(b), expected[b]) for b in range(2))


def test_an_evaluation_that_ends_in_another_thread_is_over():
    """As a generator's that threads take turns at."""

    def evaluation():
        with made.averages():
            yield

    made = run(trainer(), 2)
    turn = evaluation()
    next(turn)
    assert in_thread(lambda: next(turn, None)) is None
    made.model(small.batch()[0])
    run(made, 4)


def test_a_step_that_fails_is_over():
    made = run(trainer(), 2)
    hook = made.model.blocks[made.block].layers[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(made, 3)
    hook.remove()
    with made.averages():
        pass
    assert_alike(run(made, 5), run(trainer(), 5))
