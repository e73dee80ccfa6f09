"""bfloat16 weights: which they are, and that their small updates aren't lost."""

from __future__ import annotations

import pytest
import torch

import diffusionblocks as db
import small
from diffusionblocks.training.precision import to_bfloat16


def test_trained_matrices_alone_are_halved():
    model = small.model()
    model.blocks[0].layers[0].layer.linear.weight.requires_grad_(False)
    names = {name for name, p in model.named_parameters() if p.requires_grad and p.dim() > 1}
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    to_bfloat16(model)
    for name, p in model.named_parameters():
        assert p.dtype == (torch.bfloat16 if name in names else torch.float32), name
        assert torch.equal(p, values[name].to(p.dtype))
    assert model.target.table.dtype == torch.float32 and len(names) > 8


def test_other_dtypes_are_the_callers_own():
    model = small.model().double()
    to_bfloat16(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_masters_take_the_updates_that_weights_round_away():
    trainer = db.Trainer(small.model(), device="cpu", precision="bfloat16", lr=1e-5, clip=0)
    before = small.everything(trainer)
    for step in range(3):
        trainer.step(*small.batch(step=step))
    after = small.everything(trainer)
    masters = [name for name in after if "/master/" in name]
    assert masters and all(after[name].dtype == torch.float32 for name in masters)
    assert {after[n.replace("/master/", "/weight/")].dtype for n in masters} == {torch.bfloat16}
    assert any(not torch.equal(after[n], before[n.replace("/master/", "/weight/")].float()) for n in masters)
    assert all(torch.equal(after[n].bfloat16(), after[n.replace("/master/", "/weight/")]) for n in masters)


@pytest.mark.parametrize("optimizer", [None, lambda params: torch.optim.SGD(params, 0.1)])
@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("offload", [None, "disk"])
def test_a_model_half_trained_in_bfloat16_predicts_and_is_saved(tmp_path, offload, ema, optimizer):
    settings = {"precision": "bfloat16", "offload": offload, "folder": tmp_path / "waiting", "ema": ema}
    trainer = db.Trainer(small.model(), device="cpu", optimizer=optimizer, **settings)
    x, y = small.batch()
    for _ in range(2):  # one block alone
        model = trainer.model.eval()
        before, logits = small.everything(trainer), model(x)
        model.save_pretrained(tmp_path / "model")
        assert torch.equal(db.load(tmp_path / "model", small.model(seed=1))(x), logits)
        after = small.everything(trainer)
        assert all(torch.equal(t, before[name]) and t.dtype == before[name].dtype for name, t in after.items())
        trainer.step(x, y)


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("offload", [None, "disk"])
def test_a_released_model_has_its_masters_and_is_trained_again(tmp_path, offload, ema):
    settings = {"precision": "bfloat16", "offload": offload, "folder": tmp_path / "waiting", "ema": ema, "visit": 2}
    first = db.Trainer(small.model(), device="cpu", lr=1e-5, **settings)
    x, y = small.batch()
    first.step(x, y)  # one block alone
    masters = {key.split("/", 2)[2]: t for key, t in small.everything(first).items() if "/master/" in key}
    model = first.model
    first.offloader.release()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    own = {key: p for part in model.parts().values() for key, p in part.named_parameters()}
    assert masters and all(torch.equal(own[key], t) for key, t in masters.items())
    assert any(not torch.equal(t, t.bfloat16().float()) for t in masters.values())
    second = db.Trainer(model, device="cpu", **settings)
    second.step(x, y)
    with second.averages():
        assert model.loss(0, x, y).loss.isfinite()


@pytest.mark.parametrize("shared", ["shared", "frozen"])
def test_a_model_that_was_half_stays_half_and_is_saved_as_it_computes(tmp_path, shared):
    model, (x, y) = small.model(shared=shared).bfloat16(), small.batch()
    trainer = db.Trainer(model, device="cpu", precision="bfloat16", visit=1, offload="cpu")
    for _ in range(4):
        trainer.step(x.bfloat16(), y)
    with trainer.averages():
        assert {p.dtype for p in model.blocks[trainer.offloader.active].parameters()} == {torch.bfloat16}
    model.eval().save_pretrained(tmp_path / "model")
    loaded = db.load(tmp_path / "model", small.model(shared=shared, seed=3).bfloat16()).eval()
    assert torch.equal(loaded(x.bfloat16()), model(x.bfloat16()))
