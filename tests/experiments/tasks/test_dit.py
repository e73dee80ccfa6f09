"""The Diffusion Transformer: patches, dropped labels, guidance, whose gradients go where, images from noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffusionblocks.experiments import commands
from diffusionblocks.experiments.config import from_yaml, to_yaml
from diffusionblocks.experiments.data.batches import prepare
from diffusionblocks.experiments.metrics.bound import held_out_loss
from diffusionblocks.experiments.models.dit import DiTConfig, DiTHead, DiTStem, patchify, unpatchify
from diffusionblocks.experiments.plan import plan_of
from diffusionblocks.experiments.plotting import plots
from diffusionblocks.experiments.tasks.base import Addresses
from diffusionblocks.experiments.tasks.dit import DiTTask, repeated
from diffusionblocks.noise.partition import step_levels
from diffusionblocks.sampling.samplers import guided
from tiny_all import resident
from tiny_dit import MODEL, config, scrambled

CPU = torch.device("cpu")


def batch(count: int = 6):
    generator = torch.Generator().manual_seed(0)
    return torch.arange(count) % 11, torch.randn(count, 1, 8, 8, generator=generator) / 2


@pytest.fixture
def task(tmp_path):
    return DiTTask(config(out=tmp_path))


def test_patches_are_in_reading_order_and_come_back():
    images = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    patches = patchify(images, 2)
    assert patches.shape == (2, 4, 12)
    for i, (row, column) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
        assert torch.equal(patches[:, i], images[:, :, row : row + 2, column : column + 2].flatten(1))
    assert torch.equal(unpatchify(patches, 2), images)
    assert torch.equal(unpatchify(patchify(images, 4), 4), images)


@pytest.mark.parametrize("shared", ["shared", "per_block", "frozen"])
def test_a_loss_reaches_all_of_its_block_with_stem_and_head_and_nothing_else(shared):
    model = scrambled(shared=shared)
    model.loss(1, *batch(), seed=0, step=0).loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    every = {name for name, p in model.named_parameters() if p.requires_grad}
    common = {name for name in every if name.startswith("stem_head.")}
    assert reached == common | {name for name in every if name.startswith("blocks.1.")}
    assert (shared == "shared") == bool(common)


def test_an_untrained_model_returns_c_skip_z():
    """The head starts at zero, so F is 0 and D all that is known without it."""
    model = DiTTask(config()).model()
    x, z = batch()
    D = model.denoise(x, z, 0.7).denoised
    torch.testing.assert_close(D, 0.25 / (0.25 + 0.49) * z)


def test_the_class_and_every_pixel_change_the_estimate_of_their_own_sample_only():
    model = scrambled()
    x, z = batch()
    plain = model.denoise(x, z, 0.5).raw
    labels, pixels = x.clone(), z.clone()
    labels[2], pixels[2, 0, 7, 0] = 10, 3.0
    for changed in (model.denoise(labels, z, 0.5).raw, model.denoise(x, pixels, 0.5).raw):
        same = [torch.equal(a, b) for a, b in zip(plain, changed, strict=True)]
        assert same == [True, True, False, True, True, True]
        assert (plain[2] != changed[2]).all(), "every patch of the image sees it"


def test_guidance_by_hand():
    denoise = guided(lambda z, sigma: z + sigma, lambda z, sigma: z - 1, 3.0)
    assert denoise(torch.tensor(5.0), 2.0) == 4 + 3 * (7 - 4)
    calls = []
    alone = guided(lambda z, sigma: z, lambda z, sigma: calls.append(z) or z, 1.0)
    assert alone(torch.tensor(5.0), 2.0) == 5 and not calls


def test_labels_are_dropped_by_address_and_images_are_not_touched():
    plain = DiTTask(config(batch_size=256, label_dropout=0.0, guidance=1.0)).batches(CPU)
    dropped = DiTTask(config(batch_size=256, label_dropout=0.25)).batches(CPU)
    gone = []
    for step in range(20):
        (labels, images), (left, same) = plain.batch(step), dropped.batch(step)
        assert torch.equal(images, same) and images.abs().max() == pytest.approx(1)
        gone.append(left == 10)
        assert torch.equal(left[~gone[-1]], labels[~gone[-1]])
    assert not torch.equal(gone[0], gone[1]) and torch.equal(dropped.batch(19)[0], left)
    # 5,120 draws: a standard error of 0.006
    assert torch.stack(gone).double().mean() == pytest.approx(0.25, abs=0.025)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_a_trajectory_brings_each_block_once_in_falling_order_alone(tmp_path, sampler, monkeypatch):
    task = DiTTask(config(out=tmp_path, sampler=sampler))
    trainer, _ = commands.open_trainer(task)
    model, fetched, evaluated = trainer.model, [], []
    bring, denoise = trainer.offloader._slots.bring, model.denoise
    monkeypatch.setattr(trainer.offloader._slots, "bring", lambda part: (fetched.append(part), bring(part))[1])

    def watched(x, z, sigma, *, block):
        assert resident(model) == [block]
        evaluated.append(model.partition.layers[block])
        return denoise(x, z, sigma, block=block)

    monkeypatch.setattr(model, "denoise", watched)
    levels = step_levels(model.partition, 6)
    with trainer.averages():
        task.trajectory(model, torch.arange(4), levels, seed=0)
    assert fetched == ["block_0", "block_1", "block_2"]
    assert task.layer_evaluations(model.partition, levels) == sum(evaluated)


def test_images_are_the_same_from_the_same_seed_and_follow_the_class(task):
    model = scrambled()
    levels = step_levels(model.partition, 6)

    def images(labels, seed=0, guidance=2.0):
        made = DiTTask(replace(task.config, guidance=guidance))
        return made.trajectory(model, torch.tensor(labels), levels, seed=seed)

    one = images([1, 2, 3])
    assert torch.equal(one, images([1, 2, 3])) and not torch.equal(one, images([1, 2, 3], seed=1))
    other = images([1, 2, 4])
    assert torch.equal(one[:2], other[:2]) and not torch.equal(one[2], other[2])
    none = [10, 10, 10]
    torch.testing.assert_close(images(none), images(none, guidance=1.0))  # no class: nothing to strengthen
    assert not torch.allclose(images([1, 2, 3], guidance=1.0), one)


def test_held_out_loss_is_the_mean_of_training_losses(task):
    """An untrained D is c_skip z, so the weighted loss at sigma is (s^2 |eps|^2 + sigma^2 |y|^2 / s^2 ...) by hand."""
    x, y = batch(400)
    model, s = commands.open_trainer(task)[0].model, 0.5
    found = held_out_loss(model, x % 10, y, count=8)
    assert [level["block"] for level in found["levels"]] == sorted(level["block"] for level in found["levels"])
    assert {level["block"] for level in found["levels"]} == {0, 1, 2}
    for level in found["levels"]:
        # D - y = c_skip sigma eps - c_out^2 / s^2 y; y and eps independent, E y^2 = 1/4; the weight is 1 / c_out^2
        c_skip, c_out = s**2 / (s**2 + level["sigma"] ** 2), level["sigma"] * s / (s**2 + level["sigma"] ** 2) ** 0.5
        want = ((c_skip * level["sigma"]) ** 2 + (c_out**2 / s**2) ** 2 / 4) / c_out**2
        # 25,600 pixels: a standard error of a squared normal's mean of 0.009
        assert level["loss"] == pytest.approx(want, rel=0.04)
    assert found["loss"] == pytest.approx(sum(level["loss"] for level in found["levels"]) / 8)


def test_training_makes_it_better(tmp_path):
    task = DiTTask(config(out=tmp_path, steps=60, visit=10, batch_size=32))
    trainer, _ = commands.open_trainer(task)
    real = task.data.val
    y = prepare(real.images, task.data.mean, task.data.std, device="cpu")

    def loss():
        with trainer.averages():
            return held_out_loss(trainer.model, real.labels, y, count=8)["loss"]

    before = loss()
    trainer.fit(Addresses(), batch=task.batches(CPU).batch, progress=False)
    assert loss() < 0.6 * before


def test_an_evaluation_of_untrained_images(task, quick_judge):
    trainer, _ = commands.open_trainer(task)
    found = commands.evaluate(task, trainer, "val")
    assert found["images"] == 4 * len(task.data.val)
    assert 0 < 2 * found["floor"] < found["frechet"], "noise must be farther from digits than digits are"
    assert found["class_accuracy"] < 30 < 90 < found["real_accuracy"]
    assert found["layer_evaluations"] == 6 * 1 * 2 and found["sampling_seconds"] > 0
    assert commands.evaluate(task, trainer, "val")["frechet"] == found["frechet"]
    one = DiTTask(task.config.in_one_block())
    assert one.evaluate(one.model(), "val")["layer_evaluations"] == 6 * 3 * 2


def test_labels_are_made_so_many_times_over():
    labels = torch.tensor([0] * 40 + [1] * 20)
    assert torch.equal(repeated(labels, 2), labels.repeat(2))
    assert torch.bincount(repeated(labels, 0.15)).tolist() == [6, 3]
    assert torch.bincount(repeated(labels, 1.5)).tolist() == [60, 30]


def test_a_run_from_start_to_pictures(tmp_path, quick_judge, monkeypatch):
    monkeypatch.setattr(commands, "plan_of", plan_of)  # other runs here plan nothing
    control = {"baseline": ("end-to-end",), "tune_lr": (1e-2,), "tune_warmup": (0.1,)}
    summary = commands.start(config(out=tmp_path / "run", sampling_steps=3, **control))
    ours, control = summary["results"]["block-wise"], summary["results"]["end-to-end"]
    for result in (ours, control):
        assert result["test"]["images"] == 4 * 360 and result["test"]["frechet"] > 0
    assert ours["memory"]["activations"] < 0.6 * control["memory"]["activations"]
    assert sum(ours["memory"].values()) == pytest.approx(sum(ours["plan"].values()), rel=0.05)
    drawn = {path.name for path in plots.draw(tmp_path / "run")}
    assert drawn == {"loss.png", "levels.png", "memory.png", "partition.png"}


def test_an_end_to_end_network_is_never_frozen(tmp_path):
    frozen = config(out=tmp_path, shared="frozen")
    assert all(p.requires_grad for p in DiTTask(frozen.in_one_block()).model().parameters())
    assert not all(p.requires_grad for p in DiTTask(frozen).model().parameters())


def test_too_few_images_to_judge_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"draws=0\.001 of 144 validation images are fewer than two"):
        DiTTask(config(out=tmp_path, draws=0.001)).batches(CPU)


def test_a_config_comes_back_from_yaml(tmp_path):
    assert from_yaml(to_yaml(config(out=tmp_path))) == config(out=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_dropout": 1.0}, "label_dropout must be"),
        ({"label_dropout": -0.1}, "label_dropout must be"),
        ({"label_dropout": 0.0}, "guidance=2.0 needs label_dropout"),
        ({"draws": 0.0}, "draws must be a positive number"),
        ({"sampling_steps": 2}, "sampling_steps=2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        config(**change)
    config(label_dropout=0.0, guidance=1.0)


def test_batches_that_do_not_fit_are_refused():
    model = DiTTask(config()).model()
    x, y = batch()
    for labels in (x - 1, x + 7, x.float(), x[:, None], x[:0]):
        with pytest.raises(ValueError, match=r"labels|batch size"):
            model.loss(0, labels, y, seed=0, step=0)
    with pytest.raises(ValueError, match="images must be"):
        model.loss(0, x, y[:, :, :4], seed=0, step=0)
    with pytest.raises(ValueError, match="patch=3"):
        DiTConfig(patch=3)
    with pytest.raises(ValueError, match="the model"):
        _ = DiTTask(config(model=replace(MODEL, image_size=16))).data


def test_stem_and_head_by_hand():
    torch.manual_seed(0)
    stem, head = DiTStem(MODEL), DiTHead(MODEL)
    x, z = batch(3)
    h, cond = stem(x, z, torch.zeros(3))
    patch = z[:, :, :4, 4:].flatten(1) @ stem.patch.weight.T + stem.patch.bias + stem.position[0, 1]
    torch.testing.assert_close(h[:, 1], patch)
    torch.testing.assert_close(cond - stem.noise(torch.zeros(3)), stem.label.weight[x])
    torch.nn.init.normal_(head.linear.weight)
    torch.nn.init.normal_(head.modulation.linear.weight)
    shift, scale = head.modulation(cond)
    normed = torch.nn.functional.layer_norm(h, (16,), eps=MODEL.norm_eps) * (1 + scale) + shift
    torch.testing.assert_close(head(head.features(h), cond)[:, :, :4, 4:].flatten(1), head.linear(normed)[:, 1])
