"""A trainer on disk and back, bit for bit."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch

import diffusionblocks as db
import small
from diffusionblocks.checkpoint import files
from diffusionblocks.checkpoint.files import CheckpointError
from diffusionblocks.training.state import load_averages

OPTIMIZERS = {
    "BlockAdamW": None,
    "SGD": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9),
    "AdamW": lambda params: torch.optim.AdamW(params, 0.01),
}


def trainer(tmp_path, name="BlockAdamW", *, model=None, **settings):
    settings = {"visit": 2, "offload": "disk", "folder": tmp_path / "waiting", "ema": 0.9, **settings}
    return db.Trainer(model or small.model(), device="cpu", optimizer=OPTIMIZERS[name], **settings)


def saved(tmp_path, name="BlockAdamW", steps=6, **settings):
    made = trainer(tmp_path, name, **settings)
    made.fit(small.Loader(), steps=steps, progress=False)
    made.save(tmp_path / "checkpoint", extra={"seconds": 1.5})
    return made


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("offload", [None, "disk"])
def test_all_comes_back_bit_for_bit(tmp_path, name, precision, offload):
    made = saved(tmp_path, name, precision=precision)
    back = trainer(tmp_path / "back", name, precision=precision, offload=offload)  # may wait elsewhere
    assert back.load(tmp_path / "checkpoint") == {"seconds": 1.5}
    expected, found = small.everything(made), small.everything(back)
    assert found.keys() == expected.keys()
    assert all(torch.equal(t, expected[key]) and t.dtype == expected[key].dtype for key, t in found.items())
    assert (back.steps_done, back.batches_done) == (6, 6) and back.model.target.shape == made.model.target.shape
    for part, p in back.offloader.parts.items():
        assert p.scalars() == made.offloader.parts[part].scalars()
    assert bool(back.offloader.parts["block_0"].scalars()) == (name != "BlockAdamW"), "counts of the averages"


def test_counts_of_single_parameters_travel(tmp_path):
    made = trainer(tmp_path, visit=4)
    made.step(*small.batch())
    block = f"block_{made.block}"
    params = made.optimizers[block].params()
    for _ in range(2):
        params[0].grad = torch.ones_like(params[0])
        made.optimizers[block].step()
    made.save(tmp_path / "checkpoint")
    back = trainer(tmp_path / "back", visit=4)
    back.load(tmp_path / "checkpoint")
    made.model.activate(int(block[-1]))
    back.model.activate(int(block[-1]))
    counts = back.optimizers[block].counts
    assert counts == made.optimizers[block].counts and sorted(set(counts)) == [1, 3]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("offload", [None, "disk"])
@pytest.mark.parametrize("steps", [1, 6])
def test_a_trainer_that_has_trained_goes_back_to_what_is_loaded(tmp_path, name, offload, steps):
    """Moments and counts that the checkpoint hasn't got yet are gone."""
    saved(tmp_path, name, steps=steps, offload=offload)
    found = []
    for before in (0, 9):
        back = trainer(tmp_path / f"{before}", name, offload=offload)
        back.fit(small.Loader(), steps=before, progress=False)
        for optimizer in back.optimizers.values():  # counts of their own
            p = next(iter(optimizer.param_groups[0]["params"]))
            if before and p in optimizer.state and "next_step" in optimizer.state[p] and not p.isnan().any():
                p.grad = torch.ones_like(p)
                optimizer.step()
                optimizer.zero_grad()
        back.load(tmp_path / "checkpoint")
        loader = small.Loader()
        back.fit(loader, steps=12, progress=False)
        found.append(small.everything(back))
    assert found[0].keys() == found[1].keys() and all(torch.equal(t, found[1][key]) for key, t in found[0].items())


def test_only_what_changed_is_written(tmp_path):
    made = saved(tmp_path, steps=4)  # a visit of each block
    before = files.read_state(tmp_path / "checkpoint").parts
    made.fit(made.loader, steps=5, progress=False)
    trained = f"block_{made.offloader.active}"
    made.save(tmp_path / "checkpoint")
    after = files.read_state(tmp_path / "checkpoint").parts
    assert {part for part in after if after[part] != before[part]} == {"shared", trained, "noise"} & after.keys()


def test_nothing_is_written_after_a_step_that_is_not_finite(tmp_path):
    made = saved(tmp_path)
    expected = small.everything(made)
    x, y = small.batch()
    made.step(x * float("nan"), y)
    with pytest.raises(db.NonFiniteLoss, match="at step 6"):
        made.save(tmp_path / "checkpoint")
    back = trainer(tmp_path / "back")
    back.load(tmp_path / "checkpoint")
    assert back.steps_done == 6 and all(torch.equal(t, expected[key]) for key, t in small.everything(back).items())


@pytest.mark.parametrize(("settings", "words"), [
    (dict(seed=1), "saved with seed=0, the trainer has seed=1"), (dict(visit=3), "visit=2, the trainer has visit=3"),
    (dict(precision="bfloat16"), "precision='float32'"), (dict(accumulate=2), "accumulate=1"),
    (dict(moments="bfloat16"), "moments='float32'"),
    (dict(ema=0.0), "averages=True, the trainer has averages=False"), (dict(name="SGD"), "optimizer='BlockAdamW'"),
    (dict(model="double"), "is torch.float32, the model's torch.float64"),
    (dict(model="more blocks"), "has no block_2, block_3"), (dict(model="other width"), "do not fit the model"),
])  # fmt: skip
def test_a_checkpoint_of_other_settings_or_another_model_is_refused(tmp_path, settings, words):
    saved(tmp_path)
    models = {
        "double": lambda: small.model().double(),
        "more blocks": lambda: small.model(blocks=4),
        "other width": lambda: small.model(layers=6),
    }
    if "model" in settings:
        settings = {"model": models[settings["model"]]()}
    with pytest.raises(CheckpointError, match=words):
        trainer(tmp_path / "back", **settings).load(tmp_path / "checkpoint")


def test_a_model_without_training_state_is_told_apart(tmp_path):
    small.model().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds a model without the state of its training"):
        db.Trainer(small.model(), device="cpu").load(tmp_path)


def test_a_switch_of_the_optimizer_that_changes_its_state_is_refused(tmp_path):
    made = [
        db.Trainer(small.model(), device="cpu", adapt=False, optimizer=partial(torch.optim.AdamW, lr=1e-3, **switch))
        for switch in ({}, {"capturable": True}, {"amsgrad": True})
    ]
    made[0].step(*small.batch())
    made[0].save(tmp_path)
    made[1].load(tmp_path)
    with pytest.raises(CheckpointError, match=r"optimizer='AdamW', the trainer has optimizer='AdamW\(amsgrad=True\)'"):
        made[2].load(tmp_path)


@pytest.mark.parametrize("name", ["BlockAdamW", "SGD"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("offload", [None, "disk"])
def test_averages_are_loaded_without_an_optimizer(tmp_path, name, precision, offload):
    made = saved(tmp_path, name, steps=60, precision=precision)
    model = small.model(seed=1)
    if precision == "bfloat16":
        db.Trainer(model, device="cpu", precision=precision).offloader.release()
    offloader = db.Offloader(model, device="cpu", offload=offload, folder=tmp_path / "reading")
    assert load_averages(offloader, tmp_path / "checkpoint") == {"seconds": 1.5}
    with made.averages():
        expected = made.model.state_dict()
    found = model.state_dict()
    assert all(torch.equal(t, expected[key].to(t.dtype)) for key, t in found.items())
    assert model.partition == made.model.partition and model.target.shape == made.model.target.shape


def test_a_checkpoint_that_is_saved_meanwhile_is_read_anew(tmp_path, monkeypatch):
    made = saved(tmp_path)
    offloader, load, calls = db.Offloader(small.model(seed=1), device="cpu", offload=None), files.load_part, []

    def interrupted(folder, part, **options):
        calls.append(part)
        if len(calls) == 2:  # the first part is read already
            made.fit(made.loader, steps=9, progress=False)
            made.save(folder, extra={"seconds": 2.5})
            raise CheckpointError("its file is gone")
        return load(folder, part, **options)

    monkeypatch.setattr(files, "load_part", interrupted)
    assert load_averages(offloader, tmp_path / "checkpoint") == {"seconds": 2.5}
    with made.averages():
        expected = made.model.state_dict()
    assert all(torch.equal(t, expected[key]) for key, t in offloader.model.state_dict().items())
    monkeypatch.setattr(files, "load_part", lambda *a, **k: (_ for _ in ()).throw(CheckpointError("damaged")))
    with pytest.raises(CheckpointError, match="damaged"):
        load_averages(offloader, tmp_path / "checkpoint")


def test_another_trainers_save_to_the_folder_is_replaced_whole(tmp_path):
    made = saved(tmp_path, steps=2)
    trainer(tmp_path / "other", model=small.model(seed=5)).save(tmp_path / "checkpoint")
    made.step(*small.batch())
    made.save(tmp_path / "checkpoint")
    shutil.copytree(tmp_path / "checkpoint", tmp_path / "copy")
    again = trainer(tmp_path / "again", model=small.model(seed=6))
    again.load(tmp_path / "copy")
    wanted = small.everything(made)
    assert all(torch.equal(t, wanted[name]) for name, t in small.everything(again).items())
    shutil.rmtree(tmp_path / "checkpoint")
    made.save(tmp_path / "checkpoint")  # and one that was removed is made anew


def test_a_loaders_position_outlives_a_save_before_it_is_used(tmp_path):
    saved(tmp_path)
    again = trainer(tmp_path / "again")
    again.fit(small.Loader(), steps=1, progress=False)
    again.load(tmp_path / "checkpoint")
    again.save(tmp_path / "second")
    third = trainer(tmp_path / "third")
    third.load(tmp_path / "second")
    loader = small.Loader()
    third.fit(loader, steps=6, progress=False)
    assert loader.position == 6


def test_the_noise_goes_on_from_the_prior_that_was_saved(tmp_path):
    made = saved(tmp_path)
    made.offloader.release()
    again = trainer(tmp_path / "again", model=made.model)  # its density is a measured one by now
    again.load(tmp_path / "checkpoint")
    fresh = trainer(tmp_path / "fresh", model=small.model(density=db.LogNormal()))
    assert fresh.meter is None
    fresh.load(tmp_path / "checkpoint")
    prior = small.model().partition.density
    assert again.meter.prior == prior and fresh.meter.prior == prior


@pytest.mark.parametrize("damage", ["flipped", "other shapes"])
def test_a_bad_later_part_leaves_the_trainer_as_it_was(tmp_path, damage):
    saved(tmp_path, model=small.model(layers=5, blocks=(2, 3)) if damage == "other shapes" else None)
    back = trainer(tmp_path / "back", model=small.model(seed=1))
    if damage == "flipped":
        path = next((tmp_path / "checkpoint").glob("block_1*"))
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    before = small.everything(back)
    with pytest.raises(CheckpointError, match="block_1"):
        back.load(tmp_path / "checkpoint")
    assert all(torch.equal(t, before[name]) for name, t in small.everything(back).items()) and back.steps_done == 0
