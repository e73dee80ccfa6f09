"""Blocks trained apart: each trainer's draws are those of one trainer of all blocks, to the last bit."""

from __future__ import annotations

import pytest
import torch

import diffusionblocks as db
import small
from diffusionblocks.checkpoint.files import CheckpointError

BLOCKS = 3


def trainer(tmp_path, blocks=None, *, shared="per_block", kind="labels", **settings):
    settings = {"lr": 1e-2, "visit": 2, "ema": 0.9, "steps": 20, "warmup": 0.2, "adapt": False, **settings}
    model = small.model(kind, blocks=BLOCKS, layers=6, shared=shared)
    folder = tmp_path / f"waiting{len(list(tmp_path.iterdir()))}"
    return db.Trainer(model, train_blocks=blocks, device="cpu", offload="disk", folder=folder, **settings)


def fitted(tmp_path, blocks=None, steps=20, **settings):
    made = trainer(tmp_path, blocks, **settings)
    made.fit(small.Loader(settings.get("kind", "labels")), steps=steps, progress=False)
    return made


def assert_equal(found, expected, names=None):
    names = expected.keys() if names is None else names
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) and found[n].dtype == expected[n].dtype for n in names)


@pytest.mark.parametrize("shared", ["per_block", "frozen"])
@pytest.mark.parametrize("kind", small.KINDS)
def test_a_merge_equals_one_process_to_the_bit(tmp_path, shared, kind):
    whole = fitted(tmp_path, shared=shared, kind=kind, steps=20)
    for name, blocks in {"a": (0, 2), "b": (1,)}.items():
        part = fitted(tmp_path, blocks, shared=shared, kind=kind)
        part.save(tmp_path / name)
    db.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    merged = trainer(tmp_path, shared=shared, kind=kind)
    merged.load(tmp_path / "c")
    assert_equal(small.everything(merged), small.everything(whole))
    assert (merged.steps_done, merged.batches_done) == (whole.steps_done, whole.batches_done)
    assert merged.model.partition == whole.model.partition


@pytest.mark.parametrize("settings", [{"accumulate": 2}, {"precision": "bfloat16"}, {"slots": 2}])
def test_settings_change_nothing_about_it(tmp_path, settings):
    whole = fitted(tmp_path, **settings)
    for blocks in ((0,), (1, 2)):
        part = small.everything(fitted(tmp_path, blocks, **settings))
        expected = small.everything(whole)
        own = [n for n in expected if any(n.startswith(f"block_{b}/") for b in blocks)]
        assert own and all(torch.equal(part[n], expected[n]) for n in own)


def test_a_merged_run_goes_on_as_one(tmp_path):
    whole = fitted(tmp_path, steps=20)
    for name, blocks in {"a": (0,), "b": (1, 2)}.items():
        part = trainer(tmp_path, blocks)
        part.fit(small.Loader(), steps=5, progress=False)  # in the middle of a visit
        part.save(tmp_path / name)
        again = trainer(tmp_path, blocks)
        again.load(tmp_path / name)
        again.fit(small.Loader(), steps=9, progress=False)
        again.save(tmp_path / name)
    db.merge([tmp_path / "b", tmp_path / "a"], tmp_path / "c")
    merged = trainer(tmp_path)
    merged.load(tmp_path / "c")
    merged.fit(small.Loader(), steps=20, progress=False)
    assert_equal(small.everything(merged), small.everything(whole))


def test_a_loop_of_ones_own_gives_every_batch_to_every_trainer(tmp_path):
    whole, part = trainer(tmp_path), trainer(tmp_path, (1,))
    for step in range(12):
        expected, found = whole.step(*small.batch(step=step)), part.step(*small.batch(step=step))
        assert found.block == expected.block
        assert found.loss.isnan() if found.block != 1 else torch.equal(found.loss, expected.loss)
    assert part.steps_done == 12


def test_a_measured_density_is_taken_along(tmp_path):
    pilot = fitted(tmp_path, adapt=True)
    partition = pilot.model.partition
    model = small.model(blocks=BLOCKS, layers=6, shared="per_block", density=partition.density)
    assert model.partition == partition != small.model(blocks=BLOCKS, layers=6).partition
    part = db.Trainer(model, train_blocks=(1,), adapt=False, device="cpu", visit=2)
    part.fit(small.Loader(), steps=12, progress=False)
    assert part.model.partition == partition


def test_blocks_trained_elsewhere_cost_no_state_and_no_disk(tmp_path):
    part = fitted(tmp_path, (1,))
    assert part.optimizers.keys() == {"block_1"}
    part.save(tmp_path / "a")
    names = {path.name.partition(".")[0] for path in (tmp_path / "a").glob("*.safetensors")}
    assert names == {"shared", "block_1"}


def test_callbacks_see_every_step(tmp_path):
    seen = []

    class Seen:
        def on_step_end(self, trainer, output):
            seen.append((trainer.steps_done, output.block))

    part = trainer(tmp_path, (2,))
    part.callbacks.append(Seen())
    part.fit(small.Loader(), steps=12, progress=False)
    assert [step for step, _ in seen] == list(range(1, 13)) and {block for _, block in seen} == {0, 1, 2}


def test_a_checkpoint_of_other_blocks_is_refused(tmp_path):
    part = fitted(tmp_path, (1,), steps=4)
    part.save(tmp_path / "a")
    with pytest.raises(CheckpointError, match="no block_0, block_2: other machines train that; merge"):
        trainer(tmp_path).load(tmp_path / "a")
    other = fitted(tmp_path, (0,), steps=4)
    with pytest.raises(CheckpointError, match=r"holds block_1, which this trainer doesn't train.*another folder"):
        other.save(tmp_path / "a")
    trainer(tmp_path, (1,)).load(tmp_path / "a")


def test_a_checkpoint_that_adapts_is_refused(tmp_path):
    whole = fitted(tmp_path, adapt=True, steps=4)
    whole.save(tmp_path / "a")
    model = small.model(blocks=BLOCKS, layers=6, shared="per_block", density=db.LogNormal())
    part = db.Trainer(model, train_blocks=(1,), visit=2, device="cpu")
    with pytest.raises(CheckpointError, match="adapts its partition"):
        part.load(tmp_path / "a")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": (0, 3)}, "no block 3; this model has 0 to 2"),
        ({"blocks": ()}, "tuple of different blocks"),
        ({"blocks": (1, 1)}, "tuple of different blocks"),
        ({"blocks": (0,), "shared": "shared"}, "shared='per_block' or shared='frozen'"),
        ({"blocks": (0,), "adapt": True}, "set adapt=False"),
        ({"blocks": (0,), "branch": 0.5}, "set branch=0"),
    ],
)
def test_what_blocks_apart_can_not_do_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **settings)
