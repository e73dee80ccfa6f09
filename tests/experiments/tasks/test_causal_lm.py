"""The causal language model: who sees whom, an honest bound, what blocks hand on."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from diffusionblocks.blocks import DiffusionBlocks
from diffusionblocks.denoiser import Ends
from diffusionblocks.experiments.metrics.bound import LabelReader, bound
from diffusionblocks.experiments.metrics.language import TextOptions, estimates
from diffusionblocks.experiments.models.causal_lm import Carry, CausalHead, CausalLayer, CausalLMConfig, CausalStem
from diffusionblocks.experiments.models.generation import Generator
from diffusionblocks.experiments.session import Session, train
from diffusionblocks.experiments.tasks.causal_lm import CausalLMAdapter
from diffusionblocks.noise.density import LogNormal
from diffusionblocks.noise.information import information_bound
from diffusionblocks.noise.partition import make_partition, step_levels
from diffusionblocks.sampling.sampler import Walker
from diffusionblocks.targets.tokens import TokenTarget
from diffusionblocks.training.offload import Residency, handed
from tiny_lm import KINDS, MODEL, N, blocks, config, kinds, noised


@kinds
def test_a_token_sees_the_clean_ones_before_its_group_and_the_noise_of_its_group(model):
    made, group = blocks(model), model.group_size
    x = torch.randint(12, (1, N))
    z, level = noised(made, x)

    def features(x, z):
        with torch.no_grad():
            return made.blocks[1](x, z, level, made.target, made.ends, made.handed(1, x)).h[0]

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
def test_only_the_active_block_and_the_ends_learn(model):
    made = CausalLMAdapter(config(model, shared="per_block")).blocks()
    x = torch.randint(12, (4, N))
    before = made.handed(1, x)
    loss = made.loss(1, x, x, seed=0, step=0, handed=before)
    loss.loss.backward()
    assert loss.sigma.shape == loss.error.shape == (4, N // model.group_size)
    touched = {name.split(".")[1] for name, p in made.named_parameters() if p.grad is not None}
    assert touched == {"1"}
    # a head of zeros passes no gradient on; once it has moved, all of the block learns
    with torch.no_grad():
        made.blocks[1].ends.head.linear.weight.normal_()
    made.loss(1, x, x, seed=0, step=0, handed=before).loss.backward()
    idle = [name for name, p in made.blocks[1].named_parameters() if p.requires_grad and p.grad is None]
    assert not idle
    assert all(p.grad is None for p in made.blocks[0].parameters()), "what is carried carries no gradient back"


@kinds
def test_the_fused_objective_is_the_loss_of_what_is_read(model):
    made = blocks(model).float()
    x = torch.randint(12, (4, N))
    z, level = noised(made, x)
    z = z.float()
    features = made.blocks[0](x, z, level, made.target, made.ends)
    output = made.target.read(*features, z, level)
    loss, error = made.target.objective(*features, z, x, level)
    # float32 logits of about 10; the readout's are divided by 0.09
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(output.raw.flatten(0, 1), x.flatten()))
    want = (output.denoised - made.target.clean(x)).square().sum(-1).view(4, -1, model.group_size).mean(-1)
    torch.testing.assert_close(error, want.detach(), rtol=1e-4, atol=1e-5)


@kinds
def test_the_bound_of_an_untrained_model_is_the_entropy_of_the_alphabet(model):
    adapter = CausalLMAdapter(config(model, evaluated=7200, length=240, text="topics"))
    found = adapter.evaluate(Walker(adapter.blocks()), "val")
    # 7,200 draws of noise, and an integral over 32 levels
    assert found["bits"] == pytest.approx(math.log2(12), abs=0.04)
    assert found["first_bits"] == pytest.approx(math.log2(12), abs=0.1)  # of an eighth of the tokens
    assert all(abs(regret) < 0.02 for regret in found["regret_bits"])
    assert found["mixture_bits"] < found["last_bits"], "a mixture is never worse than the mean of its parts"
    assert found["last_bits"] > 5, "the last step commits to a token that the noise chose"


def test_what_the_ordinary_network_writes_is_judged_where_it_counts():
    adapter = CausalLMAdapter(config(evaluated=480, length=24, text="topics"))
    network = adapter.network()
    test, val = (adapter.score(network, split, torch.device("cpu")) for split in ("test", "val"))
    assert set(val) == {"bits"} and network.training
    assert test["judge_bits"] > 2 * test["judge_test_bits"], "it knows nothing yet"
    assert test["distinct_2"] > test["distinct_2_test"]


def test_the_bound_weighs_what_the_blocks_say():
    """Block 0 nearly knows how frequent the symbols are, block 1 does; chance, which hits both, is taken off."""
    adapter = CausalLMAdapter(config(evaluated=2400, length=240, shared="per_block", blocks=2, combine="none"))
    model, frequent = adapter.blocks(), torch.log_softmax(-torch.arange(12.0) / 3, 0)
    with torch.no_grad():
        for block, known in zip(model.blocks, (0.8, 1.0), strict=True):
            block.ends.head.linear.bias.copy_(known * frequent)
    x = torch.multinomial(frequent.exp(), 10 * 240, True, generator=torch.Generator().manual_seed(0)).view(10, 240)
    found = [bound(Walker(model), x, x, seed=seed) for seed in range(4)]
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


@kinds
def test_a_block_that_does_not_see_z_is_asked_once_for_all_its_levels(model, monkeypatch):
    made, asked = blocks(model), []
    x, walker = torch.randint(12, (4, N)), Walker(made)
    sigmas = step_levels(made.partition, 8)[:-1]
    read, anew = LabelReader(walker, x), walker.read
    monkeypatch.setattr(walker, "read", lambda x, z, sigma: asked.append(sigma) or anew(x, z, sigma))
    for sigma in sigmas:
        z = made.target.noised(x, torch.full(made.target.level_shape(x), sigma), seed=0, offset=0)
        # in float64, but for what a head says, which is float32: a unit of 1 / sigma_min^2 rounds by 1e-5
        for have, want in zip(read(z, sigma), anew(x, z, sigma), strict=True):
            torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-4)
    assert len(asked) == (len(sigmas) if model.sees_z else len(made.blocks))


@pytest.mark.parametrize("store", ["host", "disk"])
def test_what_is_carried_comes_from_borrowed_blocks(store, tmp_path):
    """One earlier block at a time, its weights alone, and gone again: the same as with all of them at hand."""
    settings, cpu = config(shared="per_block", store=store), torch.device("cpu")
    adapter = CausalLMAdapter(settings)
    x = torch.randint(12, (2, N))
    want = [adapter.blocks().handed(block, x) for block in range(3)]
    session = Session(adapter.blocks(), settings, device=cpu, folder=tmp_path)
    assert want[0] is None and not torch.allclose(want[1], want[2])
    for block in range(3):
        session.residency.activate(block)
        held = session.residency.usage()
        got = handed(session.model, session.residency, block, x)
        assert got is want[block] is None or torch.equal(got, want[block])
        assert session.residency.usage() == held
    with torch.no_grad():
        session.residency.activate(0)
        for average in session.optimizers["block_0"].emas:
            average.zero_()
    session.residency.activate(2)
    with session.residency.averages():
        averaged = handed(session.model, session.residency, 1, x)
    assert torch.count_nonzero(averaged) == 0, "evaluation borrows averages"
    assert torch.equal(handed(session.model, session.residency, 1, x), want[1]), "training does not"


def test_independent_blocks_know_nothing_of_each_other():
    made = CausalLMAdapter(config(combine="none")).blocks()
    assert not made.carried and made.handed(2, torch.zeros(1, N, dtype=torch.int64)) is None


def test_frozen_ends_let_the_layers_learn():
    made = CausalLMAdapter(config(shared="frozen", combine="none")).blocks()
    x = torch.randint(12, (4, N))
    made.loss(1, x, x, seed=0, step=0).loss.backward()
    touched = {name.split(".")[0] for name, p in made.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {"blocks"}


def test_the_bound_of_an_ensemble_is_that_of_its_mean():
    """Two blocks that err in opposite ways, and a mean that doesn't: read one at a time, the others borrowed."""
    adapter = CausalLMAdapter(config(evaluated=2400, length=240, shared="per_block", blocks=2, combine="mean"))
    model, frequent = adapter.blocks(), torch.log_softmax(-torch.arange(12.0) / 3, 0)
    with torch.no_grad():
        for block, wrong in zip(model.blocks, (1.0, -1.0), strict=True):
            block.ends.head.linear.bias.copy_(frequent + wrong * torch.tensor([1.0, -1.0]).repeat(6))
    x = torch.multinomial(frequent.exp(), 10 * 240, True, generator=torch.Generator().manual_seed(0)).view(10, 240)
    found = bound(Walker(model, Residency(model, device="cpu")), x, x)
    truth = -float(frequent[x].mean())
    # the mean is the truth up to float32's rounding, over all levels
    assert [level["bound"] for level in found["levels"]] == pytest.approx([truth] * 32, abs=1e-4)
    assert found["regret_bits"] == pytest.approx([0, 0], abs=1e-4)


@pytest.fixture(scope="module")
def rhyme(tmp_path_factory):
    """A text that can be foretold."""
    path = tmp_path_factory.mktemp("text") / "rhyme.txt"
    path.write_text("one two buckle my shoe, " * 300)
    return str(path)


@kinds
def test_it_learns_and_writes_what_it_learnt(model, rhyme, tmp_path):
    small = replace(model, symbols=16)
    steps = 320 if model.sees_z else 160  # as many updates for each
    together = "carry" if model.sees_z else "mean"
    settings = config(
        small, text=rhyme, length=24, batch_size=16, steps=steps, lr=1e-2, ema=0.9, visit=20, combine=together
    )
    adapter = CausalLMAdapter(settings)
    session = Session(adapter.blocks(), settings, device=torch.device("cpu"), folder=tmp_path / "waiting")
    train(session, adapter.batches(torch.device("cpu")), on_log=lambda row: None, on_step=lambda: None)
    with session.residency.averages():
        walker = Walker(session.model, session.residency)
        found = adapter.evaluate(walker, "test")
        files = adapter.sample(walker, tmp_path, count=3, seed=0, prompt="one two buck", length=12, temperature=0.01)
    # the first letters of a window can't be known, nor a whole first group
    assert found["bits"] < 2, found["bits"]
    assert found["first_bits"] < 2  # of 4, for symbols equally likely
    assert files[0].read_text().split("\n\n----\n\n")[0].startswith("one two buck")


def test_all_of_a_prompt_comes_back_whatever_the_group(rhyme, tmp_path):
    adapter = CausalLMAdapter(config(replace(KINDS["groups of 4"], symbols=16), text=rhyme, out=tmp_path))
    for prompt in ("one two buck", "one two", "o"):
        walker = Walker(adapter.blocks())
        text = adapter.sample(walker, tmp_path, count=1, seed=0, prompt=prompt, length=7)[0].read_text()[:-1]
        assert text.startswith(prompt) and len(text) == len(prompt) + 7
    with pytest.raises(ValueError, match="texts take no guidance"):
        adapter.sample(walker, tmp_path, count=1, seed=0, guidance=2.0)


def test_steps_are_counted_in_layer_evaluations():
    """Of two layers a block: forward and backward are 2, a forward pass through the block before 2/3."""
    base = config(MODEL, steps=600, blocks=2)
    assert replace(base, combine="none").total_steps == 1200
    assert base.total_steps == round(600 * 4 / ((2 + 2 + 2 / 3) / 2))
    assert replace(base, combine="none", model=KINDS["own z"]).total_steps == 600


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="group_size=4 needs sees_z"):
        CausalLMConfig(group_size=4)
    with pytest.raises(ValueError, match="combine='mean' needs blocks that don't look at z"):
        config(KINDS["own z"], combine="mean")
    with pytest.raises(ValueError, match="choose one"):
        ends, layers = Ends(CausalStem(MODEL), CausalHead(MODEL)), [CausalLayer(MODEL) for _ in range(2)]
        target = TokenTarget(torch.eye(12, 16))
        cut = make_partition(LogNormal(), 2, 2)
        DiffusionBlocks(ends, layers, target, cut, carries=[Carry(MODEL)], ensemble=True)
    with pytest.raises(ValueError, match="must be even"):
        CausalLMConfig(dim=12, heads=4)
    made = blocks(KINDS["groups of 4"])
    with pytest.raises(ValueError, match="multiples of the group's 4"):
        Generator(made, [1.0, 0.0], seed=0).generate(torch.zeros(1, 2, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="non-empty"):
        made.loss(0, torch.zeros(2, 3), torch.zeros(2, 3), seed=0, step=0)
    with pytest.raises(TypeError, match="colour"):
        TextOptions(colour="red")


def test_estimates_read_block_by_block_in_batches():
    made = blocks(MODEL).float()
    x = torch.randint(12, (6, N))
    levels = step_levels(made.partition, 4)
    whole = estimates(Walker(made), x, levels, draws=2)
    assert whole["first_bits"] < whole["last_bits"] and set(whole) == {"first_bits", "last_bits", "mixture_bits"}
    again = estimates(Walker(made), x, levels, draws=2)
    assert whole == again
