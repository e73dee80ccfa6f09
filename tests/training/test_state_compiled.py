"""Layers that are compiled as modules: their checkpoints are those of plain ones, and the other way round."""

from __future__ import annotations

import pytest
import torch

import diffusionblocks as db
import small


def model(compiled: bool, **options) -> db.DiffusionBlocks:
    """Return three layers in three blocks, each a module within torch.compile's, or plain; without dropout, which draws
    other numbers when compiled."""
    torch.manual_seed(0)
    layers = [small.Residual(8, dropout=0.0) for _ in range(3)]
    layers[1].linear.bias.requires_grad_(False)
    made = [torch.compile(layer, backend="eager") if compiled else layer for layer in layers]
    ends = dict(stem=torch.nn.Linear(6, 8), head=torch.nn.Linear(8, 3), target=db.LabelTarget(num_classes=3, dim=8))
    return db.from_layers(made, blocks=3, **ends, **options)


def trainer(tmp_path, compiled: bool, *, shared="shared", **settings) -> db.Trainer:
    settings = {"visit": 1, "ema": 0.9, "offload": "disk", "folder": tmp_path / f"waiting {compiled}"} | settings
    return db.Trainer(model(compiled, shared=shared), device="cpu", seed=0, **settings)


@pytest.mark.parametrize(
    ("compiled", "precision", "branch"), [(False, "float32", 0.5), (True, "float32", 0.0), (True, "bfloat16", 0.5)]
)
def test_a_run_goes_on_with_or_without_compiling(tmp_path, compiled, precision, branch):
    settings = dict(precision=precision, branch=branch, steps=9)
    whole = small.run(trainer(tmp_path / "whole", not compiled, **settings), 9)
    small.run(trainer(tmp_path / "first", compiled, **settings), 6).save(tmp_path / "checkpoint")
    back = trainer(tmp_path / "back", not compiled, **settings)
    back.load(tmp_path / "checkpoint")
    small.assert_alike(small.run(back, 9), whole)
    assert all("_orig_mod" not in name for name in small.everything(back))


def test_blocks_trained_with_and_without_compiling_are_merged(tmp_path):
    settings = dict(shared="per_block", adapt=False, steps=3)
    for block in range(3):
        made = trainer(tmp_path / f"{block}", block > 0, train_blocks=(block,), **settings)
        small.run(made, 3).save(tmp_path / f"block {block}")
    db.merge([tmp_path / f"block {block}" for block in range(3)], tmp_path / "merged")
    whole = small.run(trainer(tmp_path / "whole", False, **settings), 3)
    back = trainer(tmp_path / "back", True, **settings)
    back.load(tmp_path / "merged")
    small.assert_alike(back, whole)


def test_weights_of_waiting_blocks_have_their_module_names(tmp_path):
    """state_dict is torch's: names of compiled modules are in it, and load_state_dict takes them."""
    made = small.run(trainer(tmp_path, True), 3)
    state = made.model.state_dict()
    assert state.keys() == model(True).state_dict().keys() and any("_orig_mod" in name for name in state)
    fresh = model(True)
    fresh.load_state_dict(state)
    x = small.batch()[0]
    made.offloader.release()
    assert torch.equal(fresh.eval()(x), made.model.eval()(x))


def test_a_change_to_a_waiting_compiled_block_is_named(tmp_path):
    made = small.run(trainer(tmp_path, True), 1)
    waiting = next(b for b in range(3) if b != made.offloader.active)
    layer = made.model.blocks[waiting].layers[0]
    layer.linear.weight = torch.nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(RuntimeError, match=r"layers\.0\.\S*linear\.weight was changed while the block waited"):
        made.save(tmp_path / "checkpoint")
    small.run(made, 4)
