"""diffusers' transformers as blocks: what they compute, how they train, and that pipelines take them back."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import diffusionblocks as db
import tiny_diffusers as tiny
from diffusionblocks.convert.routed import Routed

diffusers = pytest.importorskip("diffusers")
ALL = pytest.mark.parametrize("name", tiny.CLASSES)


def predicted(model, x, z, t):
    """What the first block predicts of latents z at timesteps t of 1000."""
    return model.blocks[0](x, z, own(model, t), model.stem_head).h


def own(model, t):
    """Timesteps of 1000 as the network counts them: Flux's run from 0 to 1."""
    return t * model.target.timesteps / 1000


def trained(name, blocks=2, folder=None, steps=4, lr=1e-3, **options):
    model = db.convert(tiny.network(name), blocks, **options)
    offload = dict(offload="disk", folder=folder) if folder else {}
    trainer = db.Trainer(model, lr=lr, device="cpu", visit=1, seed=0, **offload)
    x, y = tiny.batch(name)
    for _ in range(steps):
        trainer.step(x, y)
    return model.eval()


@pytest.mark.parametrize(("name", "config"), [
    *((name, {}) for name in tiny.CLASSES),
    (tiny.PIXART, dict(use_additional_conditions=True, caption_channels=None, cross_attention_dim=tiny.TEXT)),
    (tiny.FLUX, dict(guidance_embeds=True)),
])  # fmt: skip
@torch.no_grad()
def test_one_block_computes_what_the_network_does(name, config):
    net, (x, z) = tiny.network(name, **config), tiny.batch(name, 3)
    if name != tiny.DIT:  # which takes squares alone
        z = z[..., : z.shape[-2] // 2, :]
    model = db.convert(net, 1)
    t = torch.tensor([1, 500, 999])
    expected = tiny.call(net, name, x, z, t)
    level = model.target.sigma(own(model, t)).float()
    found = model.blocks[0](x, z, model.target.timestep(level), model.stem_head).h
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1


@pytest.mark.parametrize(("name", "scheduler"), [
    (tiny.DIT, ("DDIMScheduler", dict(beta_schedule="linear"))),
    (tiny.PIXART, ("DDIMScheduler", dict(prediction_type="v_prediction", rescale_betas_zero_snr=True))),
    (tiny.SD3, ("FlowMatchEulerDiscreteScheduler", dict(shift=3.0))),
])  # fmt: skip
def test_the_loss_is_that_of_training_with_the_scheduler(name, scheduler):
    scheduler = getattr(diffusers, scheduler[0])(**scheduler[1])
    net, (x, y) = tiny.network(name), tiny.batch(name)
    model = db.convert(net, 1, scheduler=scheduler.config)
    t = scheduler.timesteps[[0, 300, 600, 999]] if name == tiny.SD3 else torch.tensor([0, 30, 600, 999])
    t = t.clamp(max=998)  # at 999 these have infinite levels
    sigma, target = model.target.sigma(t).float(), model.target
    z = target.noised(y, sigma, seed=5, offset=0)
    eps = (z - y) / sigma.view(-1, 1, 1, 1)
    if name == tiny.SD3:
        share = (t / 1000).view(-1, 1, 1, 1)
        noised, wanted = (1 - share) * y + share * eps, eps - y
    else:
        noised = scheduler.add_noise(y, eps, t)
        abar = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        wanted = eps if name == tiny.DIT else abar.sqrt() * eps - (1 - abar).sqrt() * y
    F = tiny.call(net, name, x, noised, t)[:, :4]
    expected = (F - wanted).square().flatten(1).mean(1)
    batch = target.add_noise(y, sigma, seed=5, offset=0)
    features = model.blocks[0](x, batch.scaled, batch.c_noise, model.stem_head)
    found = target.loss(features, batch, y, sigma, error=True)
    torch.testing.assert_close(found.per_sample, expected, rtol=1e-4, atol=1e-5)
    wrong = (target.read(features, z, sigma).denoised - y).square().flatten(1).sum(1)
    torch.testing.assert_close(found.error, wrong, rtol=1e-2, atol=1e-3)


@ALL
def test_blocks_learn_offloaded_and_files_give_them_back(name, tmp_path):
    x, y = tiny.batch(name)

    @torch.no_grad()
    def losses(model):
        return [sum(float(model.loss(b, x, y, seed=9, step=s).loss) for s in range(4)) for b in range(2)]

    first = losses(db.convert(tiny.network(name), 2, shared="per_block"))
    model = trained(name, folder=tmp_path / "wait", steps=16, lr=5e-3, shared="per_block")
    assert all(after < 0.9 * start for after, start in zip(losses(model), first, strict=True))
    model.save_pretrained(tmp_path / "model")
    again = db.load(tmp_path / "model")
    ours, theirs = (db.sample(m, x[:2], steps=3, sampler="euler") for m in (model, again))
    assert torch.equal(ours, theirs) and ours.shape == y[:2].shape


def test_a_plan_needs_no_memory():
    model = db.convert(tiny.network(tiny.DIT, num_layers=2), 2)
    assert list(db.plan(model, tiny.batch(tiny.DIT), device="cpu").rows) == [1, 2]


@ALL
@pytest.mark.filterwarnings("ignore:Mismatch dtype:UserWarning")
def test_settings_that_save_memory(name):
    model, batch = db.convert(tiny.network(name), 2), tiny.batch(name)
    trainer = db.Trainer(model, device="cpu", precision="bfloat16", checkpoint_layers=True, visit=1, seed=0)
    assert all(trainer.step(*batch).loss.isfinite() for _ in range(2))


@ALL
@torch.no_grad()
def test_one_block_is_the_network_again(name, tmp_path):
    with torch.enable_grad():
        model = trained(name, blocks=1)
    network = db.to_original(model)
    network.save_pretrained(tmp_path)
    if name != tiny.WAN or importlib.util.find_spec("accelerate"):  # without which diffusers doesn't load Wan
        network = getattr(diffusers, name).from_pretrained(tmp_path)
    (x, z), t = tiny.batch(name), torch.full((4,), 700)
    found = tiny.call(network, name, x, z, t)
    with model.averages():
        torch.testing.assert_close(found, predicted(model, x, z, t), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, tiny.call(tiny.network(name), name, x, z, t), atol=1e-3)


@ALL
@torch.no_grad()
def test_pipelines_take_blocks(name, tmp_path):
    """One block in a network's place changes no image; of two, each call goes to the block that owns its timestep."""
    images = []
    for transformer in (tiny.network(name), Routed(db.convert(tiny.network(name), 1))):
        pipe, called = tiny.pipeline(name, transformer)
        images.append(pipe(**called, return_dict=False)[0])
    assert torch.equal(*images)

    with torch.enable_grad():
        model = trained(name, folder=tmp_path)
    calls = []
    for b, block in enumerate(model.blocks):
        block.layers[0].register_forward_hook(lambda *_, b=b: calls.append(b))
    pipe.transformer, called["generator"] = db.to_original(model), torch.Generator().manual_seed(3)
    found = pipe.to("cpu")(**called, return_dict=False)[0]
    assert found.isfinite().all() and found.shape == images[0].shape
    assert calls == sorted(calls) and set(calls) == {0, 1}


@torch.no_grad()
def test_two_blocks_of_a_video_network_are_the_pipelines_two_transformers():
    model = db.convert(tiny.network(tiny.WAN), 2, shared="frozen")
    pipe, called = tiny.pipeline(tiny.WAN, db.to_original(model))
    expected = pipe(**called, return_dict=False)[0]
    boundary = float(model.target.timestep(torch.tensor(model.partition.edges[1]))) / 1000
    pipe, called = tiny.pipeline(tiny.WAN, db.to_original(model, 0))
    pipe.register_modules(transformer_2=db.to_original(model, 1))
    pipe.register_to_config(boundary_ratio=boundary)
    torch.testing.assert_close(pipe(**called, return_dict=False)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [tiny.DIT, tiny.PIXART, tiny.FLUX, tiny.WAN])
@torch.no_grad()
def test_each_block_is_a_network(name):
    with torch.enable_grad():
        model = trained(name, (1, 3), shared="frozen", lr=1e-2).train()  # weights and averages differ
    (x, z), routed = tiny.batch(name), db.to_original(model)
    edge = model.target.timestep(torch.tensor(model.partition.edges[1])) / own(model, 1)
    for block, t in ((0, int(edge) + 2), (1, int(edge) - 1)):
        t = torch.full((4,), t)
        found = tiny.call(routed, name, x, z, t)
        network = db.to_original(model, block)
        assert network.config.num_layers + network.config.get("num_single_layers", 0) == (1, 3)[block]
        expected = tiny.call(network, name, x, z, t)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert model.training


def test_flow_matching_is_trained_at_the_levels_of_its_shift():
    for shift in (1.0, 3.0):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        partition = db.convert(tiny.network(tiny.FLUX), 2, scheduler=scheduler.config).partition
        assert partition.edges[1] == pytest.approx(shift)


def test_a_middle_block_of_sd3_is_no_network():
    """Its last layer hands the text on, which that of a network doesn't."""
    model = db.convert(tiny.network(tiny.SD3), 2)
    with pytest.raises(ValueError, match=r"no place for transformer_blocks\.1\."):
        db.to_original(model, 0)
    assert db.to_original(model, 1).config.dual_attention_layers == [1]


def test_labels_are_dropped_in_training_alone():
    stem = db.convert(tiny.network(tiny.DIT), 1).stem_head.stem
    x = torch.arange(1000)
    assert torch.equal(stem.arguments(x, x)["class_labels"], x)
    assert 50 < (stem.train().arguments(x, x)["class_labels"] == 1000).sum() < 200
    assert stem.unconditional(x).unique().tolist() == [1000]
    layer = db.convert(tiny.network(tiny.DIT), 1).train().blocks[0].layers[0].layer
    labels = [layer.norm1.emb(torch.ones(1000), x, hidden_dtype=torch.float32) for _ in range(2)]
    assert torch.equal(*labels), "layers drop none: each would drop others"


def test_half_weights_keep_the_timestep():
    x, y = tiny.batch(tiny.SD3)
    full = db.convert(tiny.network(tiny.SD3), 1)
    half = db.convert(tiny.network(tiny.SD3).bfloat16(), 1)
    losses = [float(model.loss(0, x, y, seed=0, step=0).loss.detach()) for model in (full, half)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert {p.dtype for p in db.to_original(half).parameters()} == {torch.bfloat16}


def checkpointing(net):
    net.enable_gradient_checkpointing()


def shallow(net):
    net.transformer_blocks = net.transformer_blocks[:2]


def fused(net):
    net.fuse_qkv_projections()


@pytest.mark.parametrize(("change", "words"), [
    (checkpointing, "isn't of its layers.*checkpoint_layers=True"),
    (shallow, r"isn't what its config describes.*transformer_blocks\.2\."),
    (fused, "unfuse projections"),
    (lambda net: net.norm_out.linear.half(), "weights of float16 and float32: make them one"),
])  # fmt: skip
def test_networks_that_were_changed(change, words):
    net = tiny.network(tiny.SD3)
    change(net)
    with pytest.raises(ValueError, match=words):
        db.convert(net, 2)


LATENTS = torch.zeros(2, *tiny.LATENTS)


@pytest.mark.parametrize(("name", "x", "y", "words"), [
    (tiny.DIT, torch.zeros(2), LATENTS, "int64 labels"),
    (tiny.DIT, torch.tensor([3, 1001]), LATENTS, r"labels must be in \[0, 1001\)"),
    (tiny.DIT, torch.arange(2), LATENTS[:, :3], r"latents must be \(B, 4, H, W\)"),
    (tiny.DIT, torch.arange(2), LATENTS[:, :, :7], r"H, W must be multiples of \(2, 2\), got \(7, 8\)"),
    (tiny.DIT, torch.arange(2), LATENTS[:, :, :4], "square latents, got 4x8"),
    (tiny.PIXART, torch.zeros(2, 5, 7), LATENTS, r"embeddings of texts, floating \(B, N, 12\)"),
    (tiny.SD3, torch.zeros(2, 1, 12), LATENTS, "a pooled embedding of each text"),
])  # fmt: skip
def test_batches_that_do_not_fit(name, x, y, words):
    with pytest.raises(ValueError, match=words):
        db.convert(tiny.network(name), 1).loss(0, x, y)


def test_schedulers_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"with betas or for flow matching.*got one of.*sigma_data"):
        db.convert(tiny.network(tiny.DIT), 1, scheduler=diffusers.EDMEulerScheduler().config)
    with pytest.raises(TypeError, match=r"pipe\.scheduler\.config, got a DDIMScheduler"):
        db.convert(tiny.network(tiny.DIT), 1, scheduler=diffusers.DDIMScheduler())


LINEAR = {"beta_schedule": "linear"}
NO_DUAL = {tiny.DIT: {}, tiny.SD3: dict(dual_attention_layers=())}


@pytest.mark.parametrize(("name", "config", "words"), [
    (tiny.DIT, dict(LINEAR, rescale_betas_zero_snr=True), "noise alone at its last timestep.*'v_prediction' or"),
    (tiny.DIT, dict(LINEAR, num_train_timesteps=0), "num_train_timesteps must be a whole number of at least 2, got 0"),
    (tiny.DIT, dict(LINEAR, trained_betas=[0.0, 0.1], num_train_timesteps=2), "must leave less of the image"),
    (tiny.DIT, dict(beta_schedule="curved"), "beta_schedule: curved"),
    (tiny.DIT, dict(LINEAR, prediction_type="noise"), "prediction must be one of"),
    (tiny.SD3, dict(shift=0.0), "shift must be positive"),
])  # fmt: skip
def test_schedulers_that_tell_no_noise_are_refused(name, config, words):
    with pytest.raises(ValueError, match=words):
        db.convert(tiny.network(name, num_layers=1, **NO_DUAL[name]), 1, scheduler=config)
