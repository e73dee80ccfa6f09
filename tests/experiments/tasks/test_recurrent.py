"""Recurrent depth: one pass of the core per training step, many when sampling; the ordinary one through time."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from diffusionblocks.experiments import commands
from diffusionblocks.experiments.data.puzzles import Sums
from diffusionblocks.experiments.models.recurrent import Recurrent, RecurrentConfig, drawn_passes, layer_evaluations
from diffusionblocks.experiments.plan import plan_of
from diffusionblocks.experiments.plotting import plots
from diffusionblocks.experiments.tasks.base import Addresses
from diffusionblocks.experiments.tasks.recurrent import Beliefs, RecurrentRun, RecurrentTask, solved
from diffusionblocks.targets.base import Output
from diffusionblocks.targets.labels import spread_codebook

CPU = torch.device("cpu")
MODEL = RecurrentConfig(dim=16, layers=2, heads=2, mlp=32, prelude=1, coda=1, passes=4, backprop=3)
CONFIG = RecurrentRun(
    task="sums", size=6, model=MODEL, steps=20, share=0.5, batch_size=8, evaluated=64, sampling_steps=3, baseline=()
)


def make_task(**changes) -> RecurrentTask:
    return RecurrentTask(replace(CONFIG, **changes))


def awake(model):
    """Heads start at zero, where nothing passes."""
    for module in model.modules():
        if getattr(module, "linear", None) is not None:
            torch.nn.init.normal_(module.linear.weight, std=0.3)
    return model.eval()


@pytest.mark.parametrize("shared", ["shared", "per_block"])
def test_one_pass_trains_prelude_core_and_coda(shared):
    task = make_task(shared=shared)
    model = awake(task.model())
    model.loss(0, *task.batches(CPU).batch(0), seed=0, step=0).loss.backward()
    silent = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not silent
    assert not model.target.table.requires_grad


def test_the_answers_are_seen_through_z_alone():
    """y doesn't reach the network but through z; z of one token reaches the estimates of the others."""
    task = make_task()
    model = awake(task.model())
    x, y = task.batches(CPU).batch(0)
    sigma = torch.full((8, 6), 0.5)
    z = model.target.noised(y, sigma, seed=0, offset=0)
    network = model.blocks[0]

    def features(z, sigma):
        return network(x, *model.target.inputs(z, sigma), model.stem_head).h

    before = features(z, sigma)
    moved = z.clone()
    moved[:, 2] = model.target.table[(y[:, 2] + 1) % 3]
    after = features(moved, sigma)
    assert bool(((after - before).abs().amax(-1) > 1e-6).all())  # the positive control: all attend to all
    loss = [model.loss_at(0, x, labels, torch.full((8, 6), 1e4), seed=0, step=0) for labels in (y, (y + 1) % 3)]
    assert loss[0].loss != loss[1].loss
    one, other = (features(z_, torch.full((8, 6), 1e4)) for z_ in (z * 1e4, -z * 1e4))
    torch.testing.assert_close(one, other, rtol=0, atol=0.05)  # at such a level z holds next to nothing


def test_the_networks_input_is_bayes_rule_from_z_alone():
    target = Beliefs(spread_codebook(3, 5))
    z, sigma = torch.randn(2, 4, 5), torch.rand(2, 4) + 0.2
    seen, _ = target.inputs(z, sigma)
    table = target.table.double()
    likelihood = torch.exp(
        -(z.double().unsqueeze(2) - table).square().sum(-1) / (2 * sigma.double().square()[..., None])
    )
    mean = likelihood / likelihood.sum(-1, keepdim=True) @ table
    torch.testing.assert_close(seen.double(), mean * 5**0.5, rtol=1e-4, atol=1e-5)


def test_every_step_of_a_trajectory_applies_the_core_once():
    task = make_task()
    model = task.model()
    calls = []
    model.blocks[0].layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    x, _ = task.puzzles("val", CPU)
    for passes in (1, 2, 5):
        calls.clear()
        path = task.trajectory(model, x, passes)
        assert len(calls) == len(path) == passes
        assert [step["sigma"] for step in path] == sorted((step["sigma"] for step in path), reverse=True)


def test_passes_are_counted_and_gradients_reach_the_last_ones_only():
    torch.manual_seed(0)
    network = awake(Recurrent(MODEL, Sums(6)))
    states = []
    network.norm.register_forward_hook(lambda module, args, out: states.append(out))
    x = torch.randint(3, (2, 6))
    network(x, 7)
    assert len(states) == 7
    assert [state.requires_grad for state in states] == [False] * 4 + [True] * 3


def test_the_ordinary_network_is_trained_at_the_depth_of_its_step():
    network = awake(Recurrent(MODEL, Sums(6)))
    calls = []
    network.norm.register_forward_pre_hook(lambda *_: calls.append(1))
    x, y = make_task().batches(CPU).batch(0)
    for step in range(6):
        calls.clear()
        network.loss(x, y, seed=3, step=step)
        assert len(calls) == drawn_passes(4, 3, step)
    assert network.loss(x, y, seed=3, step=1) == network.loss(x, y, seed=3, step=1)


def test_drawn_depths_have_the_mean_and_are_never_zero():
    depths = torch.tensor([drawn_passes(8, 0, step) for step in range(3000)]).double()
    # Poisson of a log-normal with spread 0.5: variance 7 + 49 (e^0.25 - 1) = 21, so a standard error of 0.08
    assert depths.mean() == pytest.approx(8, abs=0.3) and depths.min() >= 1 and depths.max() > 15


def test_layer_evaluations_by_hand():
    depths = [drawn_passes(4, 0, step) for step in range(5)]
    by_hand = sum(2 + 2 * (d if d <= 3 else 3 + (d - 3) / 3) for d in depths)
    assert layer_evaluations(MODEL, steps=5, seed=0) == pytest.approx(by_hand)
    assert max(depths) > 3  # some without a gradient among them


def test_block_wise_training_costs_its_share():
    for share in (0.1, 1.0):
        config = replace(CONFIG, share=share, steps=300)
        assert config.total_steps * 4 == pytest.approx(share * config.budget, rel=0.02)


def test_an_untrained_model_knows_nothing_and_its_bound_is_the_entropy():
    """Zero head and the posterior readout: Bayes with a uniform prior, log2 3 bits an answer at every level."""
    task = make_task(evaluated=300)
    result = task.evaluate(task.model(), "val")
    assert result["bound_bits"] == pytest.approx(1.585, abs=0.05)
    assert result["accuracy"] == pytest.approx(33.3, abs=5)
    assert [row["passes"] for row in result["passes"]] == [1, 2, 4, 8, 16, 32]


def test_solved_counts_answers_and_puzzles():
    y = torch.tensor([[0, 1], [1, 1]])
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 1], [1, 0]]), 2).float()
    assert solved(logits, y) == {"accuracy": 75.0, "exact": 50.0}


def test_a_run_trains_both_samples_and_draws_its_pictures(tmp_path):
    config = replace(CONFIG, out=tmp_path / "run", baseline=("end-to-end",), tune_lr=(1e-3,), tune_warmup=(0.1,))
    summary = commands.start(config)
    ours, theirs = (summary["results"][name]["test"] for name in ("block-wise", "end-to-end"))
    assert ours["layer_evaluations"] == pytest.approx(0.5 * theirs["layer_evaluations"], rel=0.1)
    assert len(theirs["passes"]) == len(ours["passes"]) == 6
    assert config.out / "passes.png" in plots.draw(config.out)
    task, model = commands.open_run(config.out)
    (file,) = commands.sample(task, model, tmp_path / "samples", count=2, seed=1)
    text = file.read_text()
    assert text.count("puzzle") == 2 and text.count("pass 3") == 2 and "pass 4" not in text
    with pytest.raises(ValueError, match="puzzles take no prompt"):
        commands.sample(task, model, tmp_path / "other", count=2, seed=1, prompt="a")
    assert json.loads((config.out / "summary.json").read_text())["results"].keys() == {"block-wise", "end-to-end"}


def test_a_trajectory_passes_each_answer_on_to_the_next(monkeypatch):
    """A network that knows the local rule alone, y_i = y_(i-1) + x_i, is right about one answer after one pass,
    about all after enough."""
    task = make_task()
    x, y = task.puzzles("val", CPU)

    model = task.model()

    def local(x, z, sigma, *, block):
        target, levels = model.target, torch.full(z.shape[:2], sigma)
        seen = target.inputs(z, levels)[0] * target.sigma_data @ target.table.T  # probabilities: rows are orthonormal
        before = torch.cat([torch.eye(3)[0].expand(len(x), 1, 3), seen[:, :-1]], 1)
        prior = torch.stack([before.gather(2, (k - x).remainder(3).unsqueeze(-1))[..., 0] for k in range(3)], -1)
        logits = prior.clamp(min=1e-6).log() + (z @ target.table.T - 0.5) / sigma**2
        return Output(logits, logits.softmax(-1) @ target.table)

    monkeypatch.setattr(model, "denoise", local)
    right = {passes: solved(task.trajectory(model, x, passes)[-1]["logits"], y) for passes in (1, 4, 32)}
    assert right[1]["accuracy"] == pytest.approx(100 / 6 + 500 / 18, abs=10)  # the first, and a third of the others
    assert right[1]["accuracy"] + 10 < right[4]["accuracy"] < right[32]["accuracy"] == 100


def test_a_plan_has_one_block_and_holds(tmp_path):
    task = make_task(out=tmp_path, log_folder=tmp_path)
    trainer, _ = commands.open_trainer(task)
    trainer.fit(Addresses(), batch=task.batches(CPU).batch, progress=False)
    plan = plan_of(task)
    assert list(plan.rows) == [1] and plan.choice(1).host == plan.choice(1).disk == 0, (
        "one core denoises at every level"
    )
    planned = plan.rows[1].by_category
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    for category, count in row["bytes"].items():
        assert count == pytest.approx(planned[category], rel=0.05), category


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": 2}, "use blocks=1"),
        ({"shared": "frozen"}, "untrained prelude"),
        ({"share": 0.0}, r"share must be in \(0, 1\]"),
        ({"evaluated": 0}, "evaluated must be at least 1"),
        ({"size": 1}, "size must be at least 2"),
        ({"overlap": 0.05}, r"overlap=0\.05 must be 0"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_rotary_positions_need_pairs():
    with pytest.raises(ValueError, match="dim=12 over heads=4 must be even"):
        RecurrentConfig(dim=12, heads=4)


def test_a_size_with_too_few_puzzles_is_refused_before_training():
    with pytest.raises(ValueError, match="so few puzzles"):
        make_task(size=2).batches(CPU)


def test_foreign_puzzles_are_refused():
    task = make_task()
    model = task.model()
    x, y = task.batches(CPU).batch(0)
    for bad in (x[:, :-1], x.float()):
        with pytest.raises(ValueError, match=r"puzzles must be a \(B >= 1, 6\) int64 tensor"):
            model.loss(0, bad, y, seed=0, step=0)
