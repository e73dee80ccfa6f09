"""The model while a Trainer has it: it predicts by averages, and its state is whole wherever blocks are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import diffusionblocks as db
import small

OFFLOADS = (None, "cpu", "disk")


def trainer(tmp_path, kind="labels", *, model=None, **settings):
    settings = {"lr": 1e-2, "device": "cpu", "visit": 2, "folder": tmp_path / "waiting", **settings}
    return db.Trainer(small.model(kind) if model is None else model, **settings)


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_model_predicts_by_its_averages_wherever_blocks_are(tmp_path, offload, precision):
    made = trainer(tmp_path, offload=offload, ema=0.9, precision=precision)
    made.fit(small.Loader(), steps=120, progress=False)
    x, y = small.batch(step=999, size=64)
    model = made.model.eval()
    logits = model(x)
    assert float((logits.argmax(-1) == y).double().mean()) > 0.9
    with made.averages():
        assert torch.equal(model(x), logits)
        gathered = {name: t.clone() for name, t in model.state_dict().items()}
    alone = small.model(seed=1).eval()
    alone.load_state_dict(gathered)
    assert torch.equal(alone(x), logits), "partition and weights travel in the state"
    assert torch.equal(torch.compile(model, backend="eager")(x), logits)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_state_and_counts_are_whole_whatever_is_resident(tmp_path, offload):
    plain = small.model()
    wanted = {name: t.clone() for name, t in plain.state_dict().items()}
    made = trainer(tmp_path, model=plain, offload=offload)
    state = plain.state_dict()
    assert state.keys() == wanted.keys() and all(torch.equal(state[n], t) for n, t in wanted.items())
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in small.model().parameters())
    outer = nn.ModuleDict({"inner": plain}).state_dict()
    assert outer.keys() == {f"inner.{n}" for n in wanted}
    assert all(torch.equal(outer[f"inner.{n}"], t) for n, t in wanted.items())
    for refused in (lambda: plain.to("cpu"), lambda: copy.deepcopy(plain), lambda: plain.load_state_dict(state)):
        with pytest.raises(RuntimeError, match="managed"):
            refused()
    made.offloader.release()
    twin = copy.deepcopy(plain.to(torch.float64))
    assert all(torch.equal(t, wanted[n].to(t.dtype)) for n, t in twin.state_dict().items())
