"""Merging: what doesn't belong together is refused by name, and nothing is written."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch

import diffusionblocks as db
import small
from diffusionblocks.checkpoint.files import CheckpointError
from diffusionblocks.checkpoint.manifest import digest


def save(folder, *blocks, steps=6, model=None, extra=None, loader=None, **settings):
    settings = {"visit": 1, "adapt": False, "ema": 0.9, **settings}
    model = small.model(blocks=3, layers=3, shared="per_block") if model is None else model
    trainer = db.Trainer(model, train_blocks=blocks, device="cpu", **settings)
    trainer.fit(loader or small.Loader(), steps=steps, progress=False)
    trainer.save(folder, extra=extra)
    return folder


def files(folder):
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else None


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    return save(root / "a", 0, 2), save(root / "b", 1)


def test_files_are_links(tmp_path, parts):
    db.merge(parts, tmp_path / "c")
    inodes = {p.stat().st_ino for folder in parts for p in folder.glob("*.safetensors")}
    merged = list((tmp_path / "c").glob("*.safetensors"))
    assert len(merged) == 4 and all(p.stat().st_ino in inodes for p in merged)


def test_a_model_that_is_trained_in_part_says_so(tmp_path, parts):
    """Its other blocks are as they began, until a merged folder is loaded."""
    model = small.model(blocks=3, layers=3, shared="per_block")
    trainer = db.Trainer(model, train_blocks=(1,), device="cpu", visit=1, adapt=False, ema=0.9)
    for use in (model, lambda x: db.sample(model, x), lambda x: model.save_pretrained(tmp_path / "part")):
        with pytest.warns(UserWarning, match="blocks 0, 2 of this model are trained elsewhere"):
            use(small.batch()[0])
    trainer.offloader.release()
    again = db.Trainer(model, train_blocks=(0, 2), device="cpu", visit=1, adapt=False, ema=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(small.batch()[0])  # all were trained here, one after the other
    again.offloader.release()
    model = small.model(blocks=3, layers=3, shared="per_block")
    trainer = db.Trainer(model, train_blocks=(1,), device="cpu", visit=1, adapt=False, ema=0.9)
    db.merge(parts, tmp_path / "whole")
    trainer.load(tmp_path / "whole")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(small.batch()[0])


def test_a_merge_outlives_its_folders(tmp_path, parts):
    copies = [shutil.copytree(folder, tmp_path / folder.name) for folder in parts]
    db.merge(copies, tmp_path / "c")
    for folder in copies:
        shutil.rmtree(folder)
    whole = db.Trainer(small.model(blocks=3, layers=3, shared="per_block"), visit=1, adapt=False, ema=0.9, device="cpu")
    whole.load(tmp_path / "c")
    assert whole.steps_done == 6


OTHERS = {
    "twice": (dict(blocks=(0, 1)), "both trained block_0: leave one of them out"),
    "missing": (dict(blocks=(), out_of=("a",)), "none has block_1 of the model's 3 blocks"),
    "step": (dict(blocks=(1,), steps=5), "is at step 6, .*other at step 5: train .*other on to step 6"),
    "seed": (dict(blocks=(1,), seed=1), "differ in their settings: seed 0 and 1"),
    "lr": (dict(blocks=(1,), lr=0.5), "differ in their recipe: lr 0.001 and 0.5"),
    "data": (dict(blocks=(1,), loader=[small.batch()]), "in their positions: loader .*same batches"),
    "extra": (dict(blocks=(1,), extra={"data": "other"}), "differ in their extra: data None and 'other'"),
    "codebook": (dict(blocks=(1,), target=db.LabelTarget(3, 8, table=3 * torch.eye(3, 8))), "target.table.*same seed"),
    "network": (dict(blocks=(1,), layers=4), "differ in their (recipe: network|partition: layers)"),
    "overlap": (dict(blocks=(1,), overlap=0.2), "differ in their partition: overlap 0.05 and 0.2"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_does_not_belong_together_is_refused(tmp_path, parts, name):
    options, message = OTHERS[name]
    options = dict(options)
    blocks, given = options.pop("blocks"), {k: options.pop(k) for k in ("layers", "overlap", "target") if k in options}
    folders = [parts[0]]
    if not options.pop("out_of", None):
        folders.append(save(tmp_path / "other", *blocks, model=model(**given), **options))
    with pytest.raises(CheckpointError, match=message):
        db.merge(folders, tmp_path / "c")
    assert files(tmp_path / "c") is None


def model(layers=3, target=None, overlap=0.05):
    made = small.model(blocks=3, layers=layers, shared="per_block", overlap=overlap)
    if target is not None:
        made.target.table.copy_(target.table)
    return made


def decayed(decay, betas=(0.9, 0.99)):
    """Make an optimizer whose defaults don't have the decay, which its groups have."""

    def make(params):
        groups = [
            {"params": [p for p in params if p.dim() > 1], "weight_decay": decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, 1e-3, betas=betas)

    return make


def frozen():
    made = model()
    made.blocks[1].layers[0].layer.linear.weight.requires_grad_(False)
    return made


def activated(kind):
    def layer():
        return torch.nn.Sequential(torch.nn.Linear(8, 8), kind())

    torch.manual_seed(0)
    parts = dict(stem=torch.nn.Linear(6, 8), head=torch.nn.Linear(8, 3), target=db.LabelTarget(3, 8))
    return db.from_layers([layer() for _ in range(3)], blocks=3, shared="per_block", **parts)


ONE = dict(optimizer=decayed(0.1))
OTHER_TRAININGS = {
    "defaults": (ONE, dict(optimizer=decayed(0.1, betas=(0.1, 0.9))), r"recipe: AdamW betas 0\.9 and 0\.1"),
    "groups": (ONE, dict(optimizer=decayed(5.0)), r"recipe: groups of \d+ parameters \S+ weight_decay 0\.1 and 5\.0"),
    "frozen": ({}, dict(model=frozen), r"recipe: trained block_1 '\d+ of \d+ parameters .* and '\d+ of \d+ parameters"),
    "modules": (
        dict(model=lambda: activated(torch.nn.GELU)),
        dict(model=lambda: activated(torch.nn.ReLU)),
        "recipe: modules GELU 3 and None",
    ),
    "accumulate": ({}, dict(accumulate=2), "settings: accumulate 1 and 2"),
}


@pytest.mark.parametrize("name", OTHER_TRAININGS)
def test_what_would_make_another_model_is_refused(tmp_path, name):
    *sides, message = OTHER_TRAININGS[name]
    sides = [side | {"model": side.get("model", model)()} for side in sides]
    folders = [save(tmp_path / "a", 0, 2, steps=3, **sides[0]), save(tmp_path / "b", 1, steps=3, **sides[1])]
    with pytest.raises(CheckpointError, match=message):
        db.merge(folders, tmp_path / "c")
    assert files(tmp_path / "c") is None


def test_equal_optimizers_of_ones_own_are_merged(tmp_path):
    folders = [save(tmp_path / "a", 0, 2, steps=3, **ONE), save(tmp_path / "b", 1, steps=3, **ONE)]
    db.merge(folders, tmp_path / "c")


def rewrite(folder, change):
    record = json.loads((folder / "manifest.json").read_text())
    change(record)
    record["sha256"] = digest({k: v for k, v in record.items() if k != "sha256"})
    (folder / "manifest.json").write_text(json.dumps(record))
    return folder


def test_what_an_older_checkpoint_does_not_know_is_not_compared(tmp_path, parts):
    def forget(record):
        recipe = record["state"]["recipe"]
        for name in [n for n in recipe if n in ("modules", "trained", "BlockAdamW") or n.startswith("groups of")]:
            del recipe[name]

    old = rewrite(shutil.copytree(parts[1], tmp_path / "old"), forget)
    db.merge([parts[0], old], tmp_path / "c")
    db.merge([old, parts[0]], tmp_path / "d")


def test_one_folder_is_no_list_of_folders(tmp_path, parts):
    for given in (str(parts[0]), parts[0]):
        with pytest.raises(TypeError, match=r"folders must be several, e\.g\. .*, got the one"):
            db.merge(given, tmp_path / "c")


def test_what_all_blocks_share_and_each_machine_changes_is_refused(tmp_path):
    def counted():
        torch.manual_seed(0)
        stem = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8))
        parts = dict(stem=stem, head=torch.nn.Linear(8, 3), target=db.LabelTarget(3, 8))
        return db.from_layers([small.Residual(8) for _ in range(3)], blocks=3, shared="frozen", **parts)

    folders = [save(tmp_path / str(block), block, model=counted()) for block in range(3)]
    with pytest.raises(CheckpointError, match="running_mean"):
        db.merge(folders, tmp_path / "c")


def test_a_half_copied_folder_is_refused(tmp_path, parts):
    for name, message in {
        "block_1": "is missing",
        "shared": "is truncated",
        "manifest": "manifest.json is missing",
    }.items():
        half = shutil.copytree(parts[1], tmp_path / f"half-{name}")
        (path,) = half.glob(f"{name}*")
        path.unlink() if name != "shared" else path.write_bytes(path.read_bytes()[:-9])
        # the shared part is taken from the first folder: it must be whole in the one that counts
        folders = (half, parts[0]) if name == "shared" else (parts[0], half)
        with pytest.raises(CheckpointError, match=message):
            db.merge(folders, tmp_path / "c")
        assert files(tmp_path / "c") is None


def test_a_damaged_file_is_refused(tmp_path, parts):
    bad = shutil.copytree(parts[1], tmp_path / "bad")
    (path,) = bad.glob("block_1*")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is corrupt"):
        db.merge((parts[0], bad), tmp_path / "c")
    assert files(tmp_path / "c") is None


def test_nothing_is_overwritten(tmp_path, parts):
    before = files(parts[0])
    with pytest.raises(CheckpointError, match="holds something already: give a new folder"):
        db.merge(parts, parts[0])
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="holds something already"):
        db.merge(parts, tmp_path / "file")
    assert files(parts[0]) == before and (tmp_path / "file").read_text() == "mine"


def test_the_same_folder_twice_none_and_another_version_are_refused(tmp_path, parts):
    with pytest.raises(CheckpointError, match="is given twice"):
        db.merge([parts[0], parts[0] / ".." / parts[0].name], tmp_path / "c")
    with pytest.raises(CheckpointError, match="no folders"):
        db.merge([], tmp_path / "c")
    old = shutil.copytree(parts[1], tmp_path / "old")
    rewrite(old, lambda record: record.update(package_version="0.0.1"))
    with pytest.raises(CheckpointError, match=r"by 0\.0\.1: train all blocks with one version"):
        db.merge([parts[0], old], tmp_path / "c")


def test_an_extra_of_ones_own(tmp_path, parts):
    other = save(tmp_path / "b", 1, extra={"seconds": 3})
    db.merge([parts[0], other], tmp_path / "c", extra={"seconds": 5})
    whole = db.Trainer(model(), visit=1, adapt=False, ema=0.9, device="cpu")
    assert whole.load(tmp_path / "c") == {"seconds": 5}
