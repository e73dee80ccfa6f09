"""What users do to blocks that wait: Ctrl-C at any moment, forks, threads, writes, tensors that can't move."""

from __future__ import annotations

import itertools
import os
import signal
import threading

import pytest
import torch
from torch import nn

import diffusionblocks as db
import small
from diffusionblocks.offload.uninterrupted import uninterrupted
from small import Odd, assert_alike, run

PLACES = pytest.mark.parametrize("place", [("cpu", 1), ("disk", 2)])


def trainer(folder, place=("cpu", 1), layer=None, **settings):
    torch.manual_seed(0)
    layers = [layer() if layer else small.Residual(8) for _ in range(3)]
    model = db.from_layers(
        layers, stem=nn.Linear(6, 8), head=nn.Linear(8, 3), target=db.LabelTarget(3, 8), blocks=3, dim=8
    )
    settings = {"visit": 1, "ema": 0.9, **settings}
    return db.Trainer(model, device="cpu", offload=place[0], slots=place[1], folder=folder, **settings)


@pytest.fixture
def ctrl_c():
    """Python's own handler: a shell starts what runs in the background without one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@PLACES
def test_ctrl_c_ends_a_step_and_not_a_part_of_it(ctrl_c, tmp_path, place):
    made = run(trainer(tmp_path / "waiting", place), 2)
    hook = made.model.blocks[made.block].layers[0].register_forward_hook(lambda module, given, h: interrupt())
    with pytest.raises(KeyboardInterrupt):
        run(made, 3)
    hook.remove()
    assert made.steps_done == 3
    assert_alike(run(made, 7), run(trainer(tmp_path / "other", place), 7))


@PLACES
@pytest.mark.parametrize("method", ["empty", "bind"])
def test_ctrl_c_however_often_loses_no_block_that_moves(ctrl_c, tmp_path, place, method, monkeypatch):
    made = run(trainer(tmp_path / "waiting", place), 2)
    part = made.offloader.parts[f"block_{made.offloader.active if method == 'empty' else made.block}"]
    whole = getattr(part, method)

    def interrupted(*given):
        moving = part.moving()
        with monkeypatch.context() as patch:
            patch.setattr(part, "moving", lambda: dict(list(moving.items())[:2]))
            whole(*given)
        interrupt(), interrupt()
        whole(*given)

    monkeypatch.setattr(part, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.offloader.activate(made.block)
    monkeypatch.undo()
    assert_alike(run(made, 7), run(trainer(tmp_path / "other", place), 7))


def test_a_second_ctrl_c_stops_a_step_at_once_and_other_handlers_stay(ctrl_c):
    after = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        interrupt()
        after.append(1)
        interrupt()
        after.append(2)
    assert after == [1] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    before = signal.signal(signal.SIGINT, lambda *_: after.append(3))
    try:
        with uninterrupted():
            interrupt()
            assert after == [1, 3]
    finally:
        signal.signal(signal.SIGINT, before)


@PLACES
def test_a_fork_is_refused_and_harms_nothing(tmp_path, place):
    made = run(trainer(tmp_path / "waiting", place), 2)
    child = os.fork()
    if not child:
        signal.alarm(60)  # rather than waiting for a thread that isn't there
        try:
            run(made, 4)
        except RuntimeError as error:
            os._exit(7 if "this process is a fork" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert_alike(run(made, 7), run(trainer(tmp_path / "other", place), 7))


@PLACES
def test_a_state_dict_of_another_thread_is_whole(tmp_path, place):
    made, seen, done = run(trainer(tmp_path / "waiting", place), 1), [], threading.Event()

    def look():
        while not done.is_set():
            seen.append(any(t.isnan().any() for t in made.model.state_dict().values() if t.is_floating_point()))

    thread = threading.Thread(target=look)
    thread.start()
    run(made, 20)
    done.set()
    thread.join()
    assert seen and not any(seen)
    assert_alike(made, run(trainer(tmp_path / "other", place), 20))


def assign(linear):
    linear.load_state_dict({"weight": torch.ones(8, 8), "bias": torch.ones(8)}, strict=False, assign=True)


def replace(linear):
    linear.weight = nn.Parameter(torch.ones(8, 8))


def replace_data(linear):
    linear.weight.data = torch.ones(8, 8)


WRITES = {
    "in place": lambda linear: nn.init.zeros_(linear.weight),
    "its data in place": lambda linear: linear.weight.data.fill_(1),
    "data": replace_data,
    "parameter": replace,
    "assign": assign,
    "dtype": lambda linear: linear.half(),
    "buffer": lambda linear: linear.calls.zero_(),
    "buffer replaced": lambda linear: setattr(linear, "calls", torch.tensor(7)),
}


class Counting(nn.Linear):
    def __init__(self):
        super().__init__(8, 8)
        self.register_buffer("calls", torch.tensor(3))


def counting():
    return nn.Sequential(Counting())


@pytest.mark.parametrize("write, place", zip(WRITES, itertools.cycle([("cpu", 1), ("disk", 2)])))
def test_what_is_put_into_a_waiting_block_is_not_lost_in_silence(tmp_path, place, write):
    made = run(trainer(tmp_path / "one", place, counting), 2)
    layer = made.model.blocks[made.block].layers[0].layer
    looks = (lambda: run(made, 3), made.model.state_dict, lambda: made.save(tmp_path / "checkpoint"))
    for look in looks:
        WRITES[write](layer[0])
        with pytest.raises(
            RuntimeError, match=r"layer.0.(weight|calls) was changed while .*: activate the block first"
        ):
            look()
    layer[0] = Counting()  # whose parameters give way to those that wait, which the optimizer has
    with pytest.raises(RuntimeError, match=r"layer.0.weight was changed"):
        run(made, 3)
    assert_alike(run(made, 7), run(trainer(tmp_path / "other", place, counting), 7))


@pytest.mark.parametrize("write", WRITES)
def test_a_release_keeps_what_was_put_into_a_waiting_block(tmp_path, write):
    made = run(trainer(tmp_path, layer=counting), 2)
    before, block, written = made.model.state_dict(), made.block, Counting()
    linear = made.model.blocks[block].layers[0].layer[0]
    for layer in (linear, written):
        WRITES[write](layer)
    made.offloader.release()
    ones = ("calls",) if "buffer" in write else ("weight", "bias") if write == "assign" else ("weight",)
    for name, t in made.model.state_dict().items():
        key = name.removeprefix(f"blocks.{block}.layers.0.layer.0.")
        if write != "dtype":
            expected = written.state_dict()[key] if key in ones else before[name]
            assert torch.equal(t, expected) and t.is_contiguous(), name
    assert linear.weight.dtype == written.weight.dtype


def test_what_is_added_to_a_waiting_block_is_named(tmp_path):
    made = run(trainer(tmp_path), 2)
    for late in (nn.Parameter(torch.ones(2)), nn.Buffer(torch.ones(2))):
        made.model.blocks[made.block].late = late
        with pytest.raises(RuntimeError, match="weight/late was added to a block that waits elsewhere"):
            run(made, 3)
        del made.model.blocks[made.block].late
    assert_alike(run(made, 7), run(trainer(tmp_path / "other"), 7))


def unfreeze(linear):
    linear.bias.requires_grad_(True)


@pytest.mark.parametrize(
    "change, words",
    [
        (replace, "linear.weight was replaced, added or unfrozen after its optimizer was made, which doesn't train it"),
        (unfreeze, "linear.bias was replaced, added or unfrozen"),
        (lambda linear: linear.half(), r"linear.weight was torch.float32 when .* and is torch.float16"),
    ],
)
@pytest.mark.parametrize("later", [False, True])
def test_what_the_optimizer_would_not_train_is_named_where_nothing_waits(change, words, later):
    def layer():
        made = small.Residual(8)
        made.linear.bias.requires_grad_(False)
        return made

    made = run(trainer(None, (None, 1), layer, visit=2), 1)  # in the middle of a visit
    block = made.block if not later else next(b for b in range(3) if b != made.block)
    change(made.model.blocks[block].layers[0].layer.linear)
    with pytest.raises(RuntimeError, match=words):
        run(made, 7)


def view(layer):
    layer.flat = layer.linear.weight.view(-1)


def sparse(layer):
    layer.register_buffer("table", torch.eye(8).to_sparse())


def wide(layer):
    layer.register_buffer("table", torch.zeros(8, dtype=torch.complex128))


@pytest.mark.parametrize(
    "add, words",
    [
        (view, r"block_0's layers.0.layer.flat is a view of layers.0.layer.linear.weight"),
        (sparse, "block_0's layers.0.layer.table is torch.sparse_coo"),
        (wide, "block_0's layers.0.layer.table is torch.strided, torch.complex128"),
    ],
)
def test_what_cannot_move_is_refused_by_name_and_trains_where_nothing_moves(tmp_path, add, words):
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path, layer=lambda: Odd(add))
    made = run(trainer(None, (None, 1), layer=lambda: Odd(add)), 2)
    assert made.model.state_dict()


def test_sparse_gradients_are_clipped_and_taken_as_dense_ones(tmp_path):
    def add(layer, sparse):
        layer.table = nn.Embedding(4, 8, sparse=sparse)
        layer.forward = lambda h: h + layer.linear(h) + layer.table(torch.arange(len(h)) % 4)

    one, other = (
        run(trainer(tmp_path / str(s), layer=lambda s=s: Odd(lambda layer: add(layer, s))), 4) for s in (True, False)
    )
    assert_alike(one, other)


def test_an_optimizer_that_needs_a_closure_is_refused():
    with pytest.raises(TypeError, match="LBFGS needs a closure in every step"):
        trainer(None, (None, 1), optimizer=torch.optim.LBFGS)
