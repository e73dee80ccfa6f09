"""The causal language model: what each token attends to, the bound and the estimates, ensembles, text."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import pytest
import torch

from diffusionblocks.experiments.metrics.bound import bound
from diffusionblocks.experiments.metrics.language import TextOptions, estimates
from diffusionblocks.experiments.models.causal_lm import CausalLMConfig
from diffusionblocks.experiments.models.generation import Generator
from diffusionblocks.experiments.tasks.base import Addresses
from diffusionblocks.experiments.tasks.causal_lm import CausalLMTask
from diffusionblocks.noise.information import information_bound
from diffusionblocks.noise.partition import step_levels
from diffusionblocks.offload.offloader import Offloader
from diffusionblocks.targets.base import Noised
from tiny_all import resident
from tiny_lm import KINDS, MODEL, N, blocks, config, kinds, noised


@kinds
def test_a_token_sees_the_clean_ones_before_its_group_and_the_noise_of_its_group(model):
    made, group = blocks(model), model.group_size
    x = torch.randint(12, (1, N))
    z, level = noised(made, x)

    def features(x, z):
        with torch.no_grad():
            return made.blocks[1](x, *made.target.inputs(z, level), made.stem_head).h[0]

    before = features(x, z)
    for j in range(N):
        other = x.clone()
        other[0, j] = (x[0, j] + 1) % 12
        changed = (features(other, z) != before).any(-1)
        assert changed.tolist() == [j < i // group * group for i in range(N)], f"clean token {j}"
        moved = z.clone()
        moved[0, j] += 1
        changed = (features(x, moved) != before).any(-1)
        assert changed.tolist() == [model.sees_z and i // group == j // group for i in range(N)], f"noise of token {j}"


@kinds
def test_only_the_active_block_with_its_stem_and_head_learns(model):
    made = CausalLMTask(config(model, shared="per_block")).model()
    x = torch.randint(12, (4, N))
    loss = made.loss(1, x, x, seed=0, step=0, error=True)
    loss.loss.backward()
    assert loss.sigma.shape == loss.error.shape == (4, N // model.group_size)
    touched = {name.split(".")[1] for name, p in made.named_parameters() if p.grad is not None}
    assert touched == {"1"}
    # a head of zeros passes no gradient on; once it has moved, all of the block learns
    with torch.no_grad():
        made.blocks[1].stem_head.head.linear.weight.normal_()
    made.loss(1, x, x, seed=0, step=0).loss.backward()
    idle = [name for name, p in made.blocks[1].named_parameters() if p.requires_grad and p.grad is None]
    assert not idle


@kinds
def test_the_fused_loss_is_that_of_the_decoded_output(model):
    made = blocks(model).float()
    x = torch.randint(12, (4, N))
    z, level = noised(made, x)
    z = z.float()
    noised_ = Noised(z, *made.target.inputs(z, level))
    features = made.blocks[0](x, noised_.scaled, noised_.c_noise, made.stem_head)
    output = made.target.read(features, z, level)
    loss, error = made.target.loss(features, noised_, x, level, error=True)
    # float32 logits of about 10; the readout's are divided by 0.09
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(output.raw.flatten(0, 1), x.flatten()))
    want = (output.denoised - made.target.clean(x)).square().sum(-1).view(4, -1, model.group_size).mean(-1)
    torch.testing.assert_close(error, want.detach(), rtol=1e-4, atol=1e-5)


@kinds
def test_the_bound_of_an_untrained_model_is_the_entropy_of_the_alphabet(model):
    task = CausalLMTask(config(model, evaluated=480, length=240, text="topics"))
    found = task.evaluate(task.model(), "val")
    # its head is zero: every symbol is as likely, whatever the noise
    assert found["bits"] == pytest.approx(math.log2(12), abs=1e-6)
    assert found["first_bits"] == pytest.approx(math.log2(12), abs=0.1)
    assert all(abs(regret) < 0.02 for regret in found["regret_bits"])
    assert found["mixture_bits"] < found["last_bits"], "a mixture is never worse than the mean of its parts"
    assert found["last_bits"] > 5, "the last step commits to a token that the noise chose"


def test_texts_of_the_ordinary_network_are_judged_on_the_test_split():
    task = CausalLMTask(config(evaluated=480, length=24, text="topics"))
    network = task.network()
    test, val = (task.score(network, split, torch.device("cpu")) for split in ("test", "val"))
    assert set(val) == {"bits"} and network.training
    assert test["judge_bits"] > 2 * test["judge_test_bits"], "it knows nothing yet"
    assert test["distinct_2"] > test["distinct_2_test"]


def test_the_bound_weighs_the_blocks_by_their_ranges():
    """Block 0 nearly knows how frequent the symbols are, block 1 does; chance, which hits both, is taken off."""
    task = CausalLMTask(config(evaluated=2400, length=240, shared="per_block", blocks=2, combine="none"))
    model, frequent = task.model(), torch.log_softmax(-torch.arange(12.0) / 3, 0)
    with torch.no_grad():
        for block, known in zip(model.blocks, (0.8, 1.0), strict=True):
            block.stem_head.head.linear.bias.copy_(known * frequent)
    x = torch.multinomial(frequent.exp(), 10 * 240, True, generator=torch.Generator().manual_seed(0)).view(10, 240)
    found = [bound(model, x, x, seed=seed) for seed in range(4)]
    nats = [[level["bound"] for level in f["levels"]] for f in found]
    plain = [
        information_bound(*([level[k] for level in f["levels"]] for k in ("sigma", "cross_entropy", "error", "block")))
        for f in found
    ]
    top, knows = (-float(torch.log_softmax(known * frequent, 0)[x].mean()) for known in (0.8, 1.0))
    end = sum(b[-1] for b in nats) / 4
    assert knows < end < top and nats[0][0] == pytest.approx(top, abs=1e-5)
    # the estimates agree within their spread over seeds, and the corrected one spreads less
    spread, raw = (torch.tensor(v).std() for v in ([b[-1] for b in nats], [p.bound[-1] for p in plain]))
    assert end == pytest.approx(sum(p.bound[-1] for p in plain) / 4, abs=3 * float(raw)) and spread < 0.7 * raw
    assert found[0]["regret_bits"][0] == pytest.approx(0, abs=1e-6) and found[0]["regret_bits"][1] < 0


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_an_ensemble_of_offloaded_blocks_is_the_mean_of_all(place, tmp_path):
    """One block at a time on the device; with averages, where they are asked for."""
    settings = config(shared="per_block", offload=place, combine="mean", folder=tmp_path, ema=0.9, lr=1e-2)
    task, x = CausalLMTask(settings), torch.randint(12, (8, N))
    trainer = task.trainer(task.model(), settings)
    for _ in range(3 * settings.visit):
        trainer.step(x, x)
    model, ordinary, found = trainer.model, task.model(), []
    for weights in (trainer.averages(), contextlib.nullcontext()):
        with weights:
            ordinary.load_state_dict(model.state_dict())
            found.append(model.logits(x))
        each = [ordinary.logits(x, block) for block in range(3)]
        torch.testing.assert_close(found[-1], sum(each) / 3)
        assert not torch.allclose(each[1], each[2])
    assert not torch.allclose(*found), "averages lag behind"
    if place == "disk":
        assert resident(model) == [2]


def test_blocks_that_are_no_ensemble_know_nothing_of_each_other():
    """The estimate of one block isn't changed by another's weights."""
    made = blocks(MODEL, combine="none").float()
    x = torch.randint(12, (2, N))
    z = made.target.clean(x) + 0.3
    before = made.denoise(x, z, 0.3, block=2).raw
    with torch.no_grad():
        for p in made.blocks[0].parameters():
            p.add_(1)
    assert torch.equal(made.denoise(x, z, 0.3, block=2).raw, before)


def test_a_frozen_stem_and_head_let_the_layers_learn():
    made = CausalLMTask(config(shared="frozen", combine="none")).model()
    x = torch.randint(12, (4, N))
    made.loss(1, x, x, seed=0, step=0).loss.backward()
    touched = {name.split(".")[0] for name, p in made.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {"blocks"}


def test_the_bound_of_an_ensemble_is_that_of_its_mean(tmp_path):
    """Two blocks that err in opposite ways, and a mean that doesn't; one of them at a time on the device."""
    task = CausalLMTask(config(evaluated=2400, length=240, shared="per_block", blocks=2, combine="mean"))
    model, frequent = task.model(), torch.log_softmax(-torch.arange(12.0) / 3, 0)
    with torch.no_grad():
        for block, wrong in zip(model.blocks, (1.0, -1.0), strict=True):
            block.stem_head.head.linear.bias.copy_(frequent + wrong * torch.tensor([1.0, -1.0]).repeat(6))
    x = torch.multinomial(frequent.exp(), 10 * 240, True, generator=torch.Generator().manual_seed(0)).view(10, 240)
    Offloader(model, device="cpu", offload="disk", folder=tmp_path)
    found = bound(model, x, x)
    truth = -float(frequent[x].mean())
    # the mean is the truth up to float32's rounding, over all levels
    assert [level["bound"] for level in found["levels"]] == pytest.approx([truth] * 32, abs=1e-4)
    assert found["regret_bits"] == pytest.approx([0, 0], abs=1e-4)


@pytest.fixture(scope="module")
def rhyme(tmp_path_factory):
    """A predictable text."""
    path = tmp_path_factory.mktemp("text") / "rhyme.txt"
    path.write_text("one two buckle my shoe, " * 300)
    return str(path)


@kinds
def test_it_learns_a_rhyme_and_writes_it(model, rhyme, tmp_path):
    small = replace(model, vocab_size=16)
    steps = 240 if model.sees_z else 120  # as many updates for each
    together = "none" if model.sees_z else "mean"
    settings = config(
        small, text=rhyme, length=24, batch_size=16, steps=steps, lr=1e-2, ema=0.9, visit=20, combine=together
    )
    task = CausalLMTask(replace(settings, folder=tmp_path / "waiting"))
    trainer = task.trainer(task.model(), task.config)
    trainer.fit(Addresses(), batch=task.batches(torch.device("cpu")).batch, progress=False)
    with trainer.averages():
        found = task.evaluate(trainer.model, "test")
        files = task.sample(
            trainer.model, tmp_path, count=3, seed=0, prompt="one two buck", length=12, temperature=0.01
        )
    # the first letters of a window can't be known, nor a whole first group
    assert found["bits"] < 2, found["bits"]
    assert found["first_bits"] < 2  # of 4, for symbols equally likely
    assert files[0].read_text().split("\n\n----\n\n")[0].startswith("one two buck")


def test_all_of_a_prompt_comes_back_whatever_the_group(rhyme, tmp_path):
    task = CausalLMTask(config(replace(KINDS["groups of 4"], vocab_size=16), text=rhyme, out=tmp_path))
    model = task.model()
    for prompt in ("one two buck", "one two", "o"):
        text = task.sample(model, tmp_path, count=1, seed=0, prompt=prompt, length=7)[0].read_text()[:-1]
        assert text.startswith(prompt) and len(text) == len(prompt) + 7
    with pytest.raises(ValueError, match="texts take no guidance"):
        task.sample(model, tmp_path, count=1, seed=0, guidance=2.0)


def test_steps_are_counted_in_layer_evaluations():
    base = config(MODEL, steps=600, blocks=2)
    assert base.total_steps == replace(base, combine="mean").total_steps == 1200
    assert replace(base, model=KINDS["own z"]).total_steps == 600, "two streams a step"


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="group_size=4 needs sees_z"):
        CausalLMConfig(group_size=4)
    with pytest.raises(ValueError, match="combine='mean' needs blocks that don't look at z"):
        config(KINDS["own z"], combine="mean")
    with pytest.raises(ValueError, match="combine must be one of 'mean', 'none', got 'carry'"):
        config(combine="carry")
    with pytest.raises(ValueError, match="must be even"):
        CausalLMConfig(dim=12, heads=4)
    made = blocks(KINDS["groups of 4"])
    with pytest.raises(ValueError, match="multiples of the group's 4"):
        Generator(made, [1.0, 0.0], seed=0).generate(torch.zeros(1, 2, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="non-empty"):
        made.loss(0, torch.zeros(2, 3), torch.zeros(2, 3), seed=0, step=0)
    with pytest.raises(TypeError, match="colour"):
        TextOptions(colour="red")


def test_estimates_are_the_same_each_time():
    made = blocks(MODEL).float()
    x = torch.randint(12, (6, N))
    levels = step_levels(made.partition, 4)
    whole = estimates(made, x, levels, draws=2)
    assert whole["first_bits"] < whole["last_bits"] and set(whole) == {"first_bits", "last_bits", "mixture_bits"}
    again = estimates(made, x, levels, draws=2)
    assert whole == again
