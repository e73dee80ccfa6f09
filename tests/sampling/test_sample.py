"""db.sample: every kind of target, guidance, offloaded models."""

from __future__ import annotations

import itertools

import pytest
import torch

import diffusionblocks as db
import small
from diffusionblocks.noise.partition import step_levels
from diffusionblocks.noise.rng import stream
from diffusionblocks.sampling.samplers import SAMPLERS

STEPS = 160


def trained(tmp_path, kind, offload=None, steps=STEPS, **settings):
    settings = {"lr": 1e-2, "ema": 0.95, "visit": 2, **settings}
    trainer = db.Trainer(small.model(kind), device="cpu", offload=offload, folder=tmp_path / "waiting", **settings)
    trainer.fit(small.Loader(kind, size=16), steps=steps, progress=False)
    return trainer


@pytest.mark.parametrize("kind", small.KINDS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_are_of_the_kind_of_y(kind, sampler):
    model = small.model(kind)
    x, y = small.batch(kind, size=5)
    model.loss(0, x, y)  # from which the shape of a sample is known
    found = db.sample(model, x, steps=4, sampler=sampler, batch=2)
    assert found.shape == y.shape and found.dtype == y.dtype
    assert torch.equal(found, db.sample(model, x, steps=4, sampler=sampler, batch=2)) and not found.requires_grad
    if kind != "images":
        assert 0 <= found.min() and found.max() < 5
    other = db.sample(model, x, steps=4, sampler=sampler, seed=1, batch=2)
    assert torch.equal(found, other) == (kind in ("labels", "tokens")), "these begin at the noise's centre"


@pytest.mark.parametrize("kind", ["labels", "tokens"])
def test_a_trained_model_gives_the_answer(tmp_path, kind):
    trainer = trained(tmp_path, kind, offload="cpu")
    x, y = small.batch(kind, step=999, size=32)
    assert float((db.sample(trainer.model, x, steps=6) == y).double().mean()) > 0.9


def test_trained_images_are_of_their_class(tmp_path):
    trainer = trained(tmp_path, "images", steps=400)
    labels = torch.arange(3).repeat_interleave(40)
    images = db.sample(trainer.model, labels, steps=16)
    means = images.view(3, 40, 8).mean((1, 2))
    assert means[0] < means[1] - 0.15 and means[1] < means[2] - 0.15, means
    assert images.view(3, 40, 8).std(1).mean() < 0.5


def test_masks_become_tokens_as_often_as_in_training():
    trainer = db.Trainer(small.model("masked"), device="cpu", lr=1e-2, ema=0.9, visit=2)
    texts = [torch.where(torch.rand(16, 8) < 0.75, 4, 1) for _ in range(8)]
    trainer.fit([(text[:, :0], text) for text in texts], steps=160, progress=False)
    tokens = db.sample(trainer.model, torch.zeros(64, 0), steps=16)
    shares = torch.bincount(tokens.flatten(), minlength=6) / tokens.numel()
    assert shares.tolist() == pytest.approx([0, 0.25, 0, 0, 0.75, 0], abs=0.08)


def test_an_offloaded_model_gives_the_samples_of_a_resident_one(tmp_path):
    for kind in small.KINDS:
        x, _ = small.batch(kind, step=5)
        found = []
        for offload in (None, "cpu", "disk"):
            model = trained(tmp_path / str(offload), kind, offload, steps=12).model
            before = {name: t.clone() for name, t in model.state_dict().items()}
            found.append(db.sample(model, x, steps=4))
            assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()), "weights are back"
            with model.averages():
                averaged = model.state_dict()
        assert all(torch.equal(found[0], other) for other in found[1:])
        alone = small.model(kind, seed=1)
        alone.load_state_dict(averaged)
        assert torch.equal(db.sample(alone, x, steps=4), found[0]), "by the averages"
        plain = small.model(kind, seed=1)
        plain.load_state_dict(before)
        if kind == "images":
            assert not torch.equal(db.sample(plain, x, steps=4), found[0])


def test_a_sample_is_the_samplers_trajectory():
    model = small.model("images")
    x, y = small.batch("images", size=5)
    model.loss(0, x, y)
    levels = step_levels(model.partition, 6)
    z = model.target.start(5, levels[0], seed=stream(3, "sample"), device=x.device)
    assert z.std() == pytest.approx(levels[0], rel=0.4)
    for sigma, below in itertools.pairwise(levels):
        D = model.eval().denoise(x, z, sigma).denoised
        z = z * below / sigma + (1 - below / sigma) * D
    torch.testing.assert_close(db.sample(model, x, steps=6, sampler="euler", seed=3), z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", [False, True])
def test_guidance_is_what_the_condition_changes(given):
    """At one level: D without + guidance (D with - D without); without the condition by the stem, or as given."""
    model = small.model("images", blocks=1)
    with torch.no_grad():
        for p in model.blocks[0].parameters():
            p.add_(0.1 * torch.randn(p.shape))  # conditioning begins at zero
    x, y = small.batch("images", size=5)
    model.loss(0, x, y)
    nothing = torch.full_like(x, 2 if given else 3)
    (sigma, _) = levels = step_levels(model.partition, 1)
    z = model.target.start(5, levels[0], seed=stream(0, "sample"), device=x.device)
    plain, without = (model.eval().denoise(c, z, sigma).denoised for c in (x, nothing))
    for guidance in (0.0, 1.0, 2.5):
        found = db.sample(model, x, steps=1, guidance=guidance, unconditional=nothing if given else None)
        torch.testing.assert_close(found, without + guidance * (plain - without), rtol=1e-4, atol=1e-4)
    assert (plain - without).abs().max() > 1e-2


def test_without_guidance_the_condition_is_always_there(monkeypatch):
    model = small.model("images")
    x, y = small.batch("images", size=5)
    model.loss(0, x, y)
    monkeypatch.setattr(small.ImageStem, "unconditional", None)
    assert db.sample(model, x, steps=2).isfinite().all()


def test_bad_arguments_are_refused_by_name():
    model = small.model()
    x, _ = small.batch()
    with pytest.raises(ValueError, match="sampler must be one of euler, heun, dpmpp_2m, got 'ddim'"):
        db.sample(model, x, sampler="ddim")
    with pytest.raises(ValueError, match="pass unconditional="):
        db.sample(model, x, guidance=2.0)
    assert db.sample(model, x, guidance=2.0, unconditional=torch.zeros_like(x), steps=2).shape == (8,)
    with pytest.raises(ValueError, match="steps"):
        db.sample(model, x, steps=1)
    with pytest.raises(ValueError, match=r"shape of a sample isn't known yet.*model\.target\.shape"):
        db.sample(small.model("images"), small.batch("images")[0], steps=2)
    with pytest.raises(ValueError, match=r"model\.target\.shape, e\.g\. \(128,\)"):
        db.sample(small.model("masked"), torch.zeros(2, 0))


@pytest.mark.parametrize(("options", "words"), [
    *((dict(guidance=g), "guidance must be 0 or more, got") for g in (-1, float("nan"), float("inf"), "2")),
    *((dict(steps=s), "steps must be a whole number of at least 2, the number of blocks") for s in (0, 2.5, True)),
    *((dict(batch=b), "batch must be a whole number of at least 1") for b in (0, 2.5)),
])  # fmt: skip
def test_numbers_that_do_not_fit_are_refused_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        db.sample(small.model(), small.batch()[0], **options)


def test_what_cannot_be_sampled_is_refused():
    x = small.batch()[0]
    with pytest.raises(ValueError, match=r"guidance=2\.0: masked tokens are sampled without guidance"):
        db.sample(small.model("masked"), torch.zeros(2, 0), guidance=2.0)
    for model, given in ((torch.nn.Linear(2, 2), x), (small.model(), x.tolist())):
        with pytest.raises(TypeError, match="sample takes DiffusionBlocks and a tensor x"):
            db.sample(model, given)


@pytest.mark.parametrize("training", [False, True])
def test_sampling_leaves_the_mode_as_it_was(training):
    model = small.model().train(training)
    db.sample(model, small.batch()[0], steps=4)
    assert model.training == training and model.blocks[0].training == training
