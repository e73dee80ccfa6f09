"""The module that stands in a pipeline for blocks of diffusers' transformers: timesteps, evaluation, files."""

from __future__ import annotations

import pytest
import torch

import diffusionblocks as db
import tiny_diffusers as tiny

pytest.importorskip("diffusers")


def test_a_pipeline_evaluates():
    (x, z), t = tiny.batch(tiny.DIT), torch.ones(4)
    routed = db.to_original(db.convert(tiny.network(tiny.DIT, dropout=0.5).train(), 2))
    first, second = (routed(z, timestep=t, class_labels=x).sample for _ in range(2))
    assert torch.equal(first, second) and routed.model.training


@torch.no_grad()
def test_timesteps_are_a_number_or_one_per_sample():
    x, z = tiny.batch(tiny.DIT)
    routed = db.to_original(db.convert(tiny.network(tiny.DIT, num_layers=2), 2))
    expected = routed(z, timestep=torch.full((4,), 500), class_labels=x).sample
    for t in (500, 500.0, torch.tensor(500), torch.tensor([500])):
        assert torch.equal(routed(z, timestep=t, class_labels=x).sample, expected)
    for t in (-1, 1000, torch.tensor([1.0, 2.0, 3.0, float("nan")])):
        with pytest.raises(ValueError, match=r"timesteps must be in \[0, 999\], got"):
            routed(z, timestep=t, class_labels=x)
    with pytest.raises(ValueError, match=r"a number or one per sample, \(B,\), got \(3,\)"):
        routed(z, timestep=torch.ones(3), class_labels=x)


@torch.no_grad()
def test_what_stands_in_a_networks_place_is_saved(tmp_path):
    x, z = tiny.batch(tiny.DIT)
    routed = db.to_original(db.convert(tiny.network(tiny.DIT, num_layers=2), 2))
    routed.save_pretrained(tmp_path)
    again = db.to_original(db.load(tmp_path))
    assert torch.equal(*(net(z, timestep=9, class_labels=x).sample for net in (routed, again)))


def test_a_call_is_of_one_block():
    x, z = tiny.batch(tiny.DIT)
    routed = db.to_original(db.convert(tiny.network(tiny.DIT), 2))
    with pytest.raises(ValueError, match=r"belong to blocks \[0, 1\]"):
        routed(z, timestep=torch.tensor([1, 1, 999, 999]), class_labels=x)
    with pytest.raises(TypeError, match="block_controlnet_hidden_states"):
        routed(z, timestep=torch.ones(4), class_labels=x, block_controlnet_hidden_states=[z])


def test_it_is_printed_in_a_line():
    assert repr(db.to_original(db.convert(tiny.network(tiny.DIT), 3))) == "Routed(DiTTransformer2DModel in 3 blocks)"
