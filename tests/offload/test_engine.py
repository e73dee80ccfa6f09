"""Training with blocks in slots, wherever they wait, is training with all of them resident, to the last bit."""

from __future__ import annotations

import os

import pytest
import torch

import diffusionblocks as db
import small
from diffusionblocks.checkpoint import files

PLACES = [(None, 1), ("cpu", 1), ("cpu", 2), ("disk", 1), ("disk", 2)]
OPTIMIZERS = {
    "ours": None,
    "SGD": lambda params: torch.optim.SGD(params, 0.05, momentum=0.9),
    "AdamW": lambda params: torch.optim.AdamW(params, 0.01, amsgrad=True),
    "NAdam": lambda params: torch.optim.NAdam(params, 0.01),
}


def trainer(folder, place, *, kind="labels", double=False, model=None, **settings):
    offload, slots = place
    made = model or small.model(kind, **settings.pop("build", {"blocks": 3, "layers": 3}))
    made = made.double() if double else made
    lr = {} if settings.get("optimizer") else {"lr": 1e-2}
    settings = {"ema": 0.9, "visit": 2, "clip": 0.5, **lr, **settings}
    return db.Trainer(made, device="cpu", offload=offload, slots=slots, folder=folder, **settings)


def batch(kind, step, double):
    x, y = small.batch(kind, step)
    to = torch.float64 if double else torch.float32
    return tuple(t.to(to) if t.is_floating_point() else t for t in (x, y))


def history(folder, place, *, kind="labels", updates=14, double=False, between=lambda trainer, step: None, **settings):
    """Return losses and all tensors of a run; `between` is called after each step."""
    made = trainer(folder, place, kind=kind, double=double, **settings)
    losses = []
    for step in range(updates):
        losses.append(made.step(*batch(kind, step, double)).loss)
        between(made, step)
    return torch.stack(losses), small.everything(made)


def assert_same_everywhere(folder, **settings):
    runs = [history(folder / f"{place}-{slots}", (place, slots), **settings) for place, slots in PLACES]
    for place, (losses, tensors) in zip(PLACES[1:], runs[1:], strict=True):
        assert torch.equal(losses, runs[0][0]), place
        assert tensors.keys() == runs[0][1].keys()
        assert all(torch.equal(t, runs[0][1][name]) for name, t in tensors.items()), place
    assert not any(t.isnan().any() for t in runs[0][1].values() if t.is_floating_point())


@pytest.mark.parametrize(
    "kind, shared", [*((kind, "shared") for kind in small.KINDS), ("labels", "frozen"), ("images", "per_block")]
)
def test_every_target_and_every_way_to_share(tmp_path, kind, shared):
    assert_same_everywhere(tmp_path, kind=kind, build={"blocks": 3, "layers": 3, "shared": shared})


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_and_precision(tmp_path, optimizer, precision):
    assert_same_everywhere(tmp_path, optimizer=OPTIMIZERS[optimizer], precision=precision)


@pytest.mark.parametrize("blocks", [(1, 3), (4, 1, 1), (1, 2, 1)])
def test_uneven_splits(tmp_path, blocks):
    assert_same_everywhere(tmp_path, build={"blocks": blocks, "layers": sum(blocks)})


def test_double_precision(tmp_path):
    assert_same_everywhere(tmp_path, double=True)


def test_accumulation_a_branch_and_a_schedule(tmp_path):
    build = {"blocks": 2, "layers": 4}
    assert_same_everywhere(tmp_path, accumulate=2, branch=0.4, warmup=2, steps=10, updates=20, build=build)


def test_evaluation_between_steps(tmp_path):
    """Sampling brings every block, by averages; nothing of it stays."""

    def sample(made, step):
        if step % 3 == 0:
            with made.averages():
                made.model(small.batch()[0], steps=3)
            made.model(small.batch()[0], steps=3)

    assert_same_everywhere(tmp_path, between=sample)
    plain, _ = history(tmp_path / "plain", ("cpu", 2))
    assert torch.equal(plain, history(tmp_path / "sampled", ("disk", 2), between=sample)[0])


@pytest.mark.parametrize("after", PLACES)
@pytest.mark.parametrize("before", [("disk", 2), ("cpu", 1)])
def test_a_run_goes_on_anywhere_else(tmp_path, before, after):
    """A checkpoint of blocks in files is linked files; of any place, it goes on in any other."""
    losses, expected = history(tmp_path / "whole", (None, 1), precision="bfloat16")
    first = trainer(tmp_path / "a", before, precision="bfloat16")
    for step in range(7):
        first.step(*batch("labels", step, False))
        if step % 3 == 0:
            first.save(tmp_path / "saved")
    first.save(tmp_path / "saved")
    then = trainer(tmp_path / "b", after, precision="bfloat16", model=small.model(blocks=3, layers=3, seed=9))
    then.load(tmp_path / "saved")
    more = torch.stack([then.step(*batch("labels", step, False)).loss for step in range(7, 14)])
    assert torch.equal(more, losses[7:])
    assert all(torch.equal(t, expected[name]) for name, t in small.everything(then).items())


def test_a_restore_to_disk_links_the_checkpoints_files_and_never_writes_to_them(tmp_path):
    first = trainer(tmp_path / "a", ("disk", 1), visit=1)
    for step in range(9):
        first.step(*batch("labels", step, False))
    first.offloader.retire()
    first.save(tmp_path / "saved")
    saved = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    expected = small.everything(first)
    then = trainer(tmp_path / "b", ("disk", 2), visit=1, model=small.model(blocks=3, layers=3, seed=9))
    then.load(tmp_path / "saved")
    links = [path for path in (tmp_path / "b").glob("*.safetensors") if path.stat().st_nlink > 1]
    assert len(links) == 3
    assert all(torch.equal(t, expected[name]) for name, t in small.everything(then).items())
    for step in range(6):
        then.step(*batch("labels", step, False))
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == saved


def test_two_slots_wait_for_nothing_that_was_read_ahead(tmp_path, monkeypatch):
    """With visits long enough, a move is over before it is waited for: every activate takes what is there."""
    made, waited = trainer(tmp_path, ("disk", 2), visit=3), []
    slots = made.offloader._slots
    settle = slots._settle

    def watch(slot):
        waited.append(slot.move is not None and not slot.move.done.done())
        settle(slot)

    for step in range(18):
        made.step(*batch("labels", step, False))
        for slot in slots._slots:
            if slot.move is not None:
                slot.move.done.result(5)  # what a longer step would give it time for
        if step == 2:
            monkeypatch.setattr(slots, "_settle", watch)
    assert waited and not any(waited)


def test_a_folder_is_the_same_wherever_the_process_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    offloader = db.Offloader(small.model(), device="cpu", offload="disk", folder="waiting")
    monkeypatch.chdir("/")
    offloader.activate(1)
    assert (tmp_path / "waiting" / "block_1.safetensors").exists()


class Killed(BaseException):
    """Ends the process at a point, as SIGKILL does."""


CALLS = ("pwrite", "preadv", "replace", "link", "fsync")


@pytest.mark.parametrize("slots", [1, 2])
def test_killed_at_any_call_the_checkpoint_is_whole(tmp_path, slots, monkeypatch):
    """Every call of a save and of the exchanges around it dies in turn; what loads then is a state that was saved."""
    original = {name: getattr(os, name) for name in CALLS}
    at, point = 0, 0
    while True:
        folder = tmp_path / str(point)
        made, states = trainer(folder, ("disk", slots), visit=1), {}
        counted = []

        def dying(name, counted=counted, point=point):
            def call(*args, **kwargs):
                counted.append(name)
                if len(counted) > point:
                    raise Killed
                return original[name](*args, **kwargs)

            return call

        def reached(made=made, folder=folder, states=states):
            for step in range(2, 5):
                made.step(*batch("labels", step, False))
                states[made.steps_done] = small.everything(made)
                made.save(folder / "saved")

        for step in range(2):
            made.step(*batch("labels", step, False))
        states[2] = small.everything(made)
        made.save(folder / "saved")
        for name in CALLS:
            monkeypatch.setattr(os, name, dying(name))
        try:
            reached()
        except Killed:
            at += 1
        for name in CALLS:
            monkeypatch.setattr(os, name, original[name])
        files.sweep(folder / "saved")
        back = trainer(folder / "back", ("disk", 1), visit=1, model=small.model(blocks=3, layers=3, seed=4))
        back.load(folder / "saved")
        expected = states[back.steps_done]
        assert all(torch.equal(t, expected[name]) for name, t in small.everything(back).items()), point
        if len(counted) <= point:
            break
        point += 7
    assert at > 5, "the calls that were tried"
