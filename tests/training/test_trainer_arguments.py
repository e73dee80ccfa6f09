"""Arguments of Trainer and fit that don't fit: named, with what to do, and the model stays as it was."""

from __future__ import annotations

import re

import pytest
import torch

import diffusionblocks as db
import small


def trainer(**settings):
    return db.Trainer(small.model(), **{"device": "cpu", **settings})


@pytest.mark.parametrize(
    "optimizer, words",
    [
        ("adam", r"optimizer must be a function that makes one from parameters, e\.g\. lambda.*got 'adam'"),
        (torch.optim.SGD([torch.zeros(1)], 0.1), "optimizer must be a function that makes one"),
        (lambda params: "adam", "optimizer must make a torch.optim.Optimizer, got str"),
    ],
)
def test_an_optimizer_that_is_none(optimizer, words):
    with pytest.raises(TypeError, match=words):
        trainer(optimizer=optimizer)


def failing(params):
    raise MemoryError


@pytest.mark.parametrize(
    "options, error",
    [(dict(optimizer=failing), MemoryError), (dict(optimizer="adam"), TypeError), (dict(offload="disk"), ValueError)],
)
def test_a_trainer_that_is_not_made_leaves_the_weights(options, error):
    model = small.model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(error):
        db.Trainer(model, device="cpu", precision="bfloat16", **options)
    assert all(p.dtype == torch.float32 and torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_disk_needs_a_folder():
    with pytest.raises(ValueError, match="offload='disk' needs a folder: folder="):
        trainer(offload="disk")


@pytest.mark.parametrize("loggers", ["tensorboard", ("jsonl", "wandb")])
def test_loggers_need_a_folder(loggers):
    with pytest.raises(ValueError, match=r"loggers=.* need log_folder"):
        trainer(loggers=loggers)


@pytest.mark.parametrize(
    "batch, words",
    [
        (("image", "label"), r"batch must be a function that makes \(x, y\) of a batch, got tuple"),
        (lambda given: given["image"], r"batch must make \(x, y\) of what the loader gives, here a tuple of 2"),
        (lambda given: (*given, 1), r"batch must make \(x, y\).*too many values"),
        (lambda given: ("image", "label"), r"a batch must be tensors \(x, y\), got str; fit takes batch="),
    ],
)
def test_a_batch_that_is_no_pair(batch, words):
    with pytest.raises(TypeError, match=words):
        trainer().fit([small.batch()], steps=1, batch=batch, progress=False)


def test_a_loader_of_dictionaries_without_a_batch():
    x, y = small.batch()
    with pytest.raises(TypeError, match="got str; fit takes batch="):
        trainer().fit([{"image": x, "label": y}], steps=1, progress=False)
    with pytest.raises(TypeError, match="here a dict with image, label: KeyError"):
        trainer().fit([{"image": x, "label": y}], steps=1, batch=lambda d: (d["x"], d["y"]), progress=False)


def test_a_generator_that_ends_is_explained():
    with pytest.raises(ValueError, match=r"iterated again and again, and an iterator such as a generator ends.*a list"):
        trainer().fit((small.batch(step=i) for i in range(2)), steps=5, progress=False)
    with pytest.raises(ValueError, match="loader gave no batch: it is empty"):
        trainer().fit([], steps=5, progress=False)
    with pytest.raises(TypeError, match=r"loader must be iterable, e\.g\. a DataLoader, got int"):
        trainer().fit(5, steps=5, progress=False)


def test_converting_a_model_in_training_is_refused_by_its_name():
    made = trainer()
    for convert in (made.model.half, made.model.double, made.model.cpu, lambda: made.model.to("cpu")):
        with pytest.raises(RuntimeError, match=r"^move or convert: .*call its release\(\) first"):
            convert()


@pytest.mark.parametrize("option", ["folder", "log_folder"])
def test_a_folder_that_cannot_be_made_is_named_by_its_option(tmp_path, option):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match=f"{option}='.*file' can't"):
        trainer(offload="disk", **{"folder": tmp_path / "waiting", option: tmp_path / "file"})


def test_what_is_no_model_and_what_are_no_callbacks():
    with pytest.raises(TypeError, match=r"model must be DiffusionBlocks.*got Linear"):
        db.Trainer(torch.nn.Linear(2, 2), lr=1e-3)
    with pytest.raises(TypeError, match="callbacks must be a list"):
        trainer(callbacks=print)


@pytest.mark.parametrize("steps", [1.5, "3", True])
def test_steps_of_fit_are_whole(steps):
    with pytest.raises(ValueError, match=f"steps must be a whole number, got {steps!r}"):
        trainer().fit([small.batch()], steps=steps, progress=False)


def test_both_ways_to_say_steps_warn_of_blocks_without_a_turn():
    with pytest.warns(UserWarning, match="3 steps in visits of 25 leave 1 of 2 blocks untrained"):
        trainer(steps=3)
    made = trainer()
    with pytest.warns(UserWarning, match="1 steps in visits of 25 leave 1 of 2 blocks untrained"):
        made.fit([small.batch()], steps=1, progress=False)


def test_a_block_with_nothing_to_train():
    model = small.model(shared="per_block")
    model.blocks[1].requires_grad_(False)
    others = tuple(b for b in range(len(model.blocks)) if b != 1)
    with pytest.raises(ValueError, match=rf"block 1 has nothing to train.*train_blocks={re.escape(str(others))}"):
        db.Trainer(model, device="cpu")
    with pytest.raises(ValueError, match=r"block 1 has nothing to train: none of its parameters requires a gradient$"):
        db.Trainer(model, device="cpu", train_blocks=(1,), adapt=False)
    db.Trainer(model, device="cpu", train_blocks=others, adapt=False)
