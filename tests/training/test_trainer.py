"""The Trainer: it learns, resumes to the bit, clips, holds back what isn't finite, reads nothing from the device."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import diffusionblocks as db
import small
from diffusionblocks.checkpoint.files import CheckpointError

OFFLOADS = (None, "cpu", "disk")


def trainer(tmp_path, kind="labels", *, model=None, **settings):
    settings = {"lr": 1e-2, "device": "cpu", "visit": 2, "folder": tmp_path / "waiting", **settings}
    return db.Trainer(small.model(kind) if model is None else model, **settings)


@pytest.mark.parametrize("kind", small.KINDS)
@pytest.mark.parametrize("offload", OFFLOADS)
def test_every_target_learns_wherever_blocks_wait(tmp_path, kind, offload):
    made = trainer(tmp_path, kind, offload=offload, ema=0.9)
    losses = [made.step(*small.batch(kind, step)) for step in range(120)]
    for block in (1,) if kind == "masked" else (0, 1):  # block 0 sees next to nothing but masks
        own = [float(out.loss) for out in losses if out.block == block]
        assert sum(own[-12:]) < 0.85 * sum(own[:12]), f"block {block} doesn't learn"


def test_where_blocks_wait_changes_no_bit(tmp_path):
    made = []
    for offload in OFFLOADS:
        made.append(trainer(tmp_path, offload=offload))
        for step in range(9):
            made[-1].step(*small.batch(step=step))
    first, *others = (small.everything(t) for t in made)
    assert all(torch.equal(first[name], t[name]) for t in others for name in first)


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("sgd", [False, True])
def test_resume_is_bit_exact(tmp_path, offload, sgd):
    def fresh():
        options = dict(optimizer=lambda params: torch.optim.SGD(params, 0.1, momentum=0.9)) if sgd else {"lr": 1e-2}
        return db.Trainer(
            small.model(), device="cpu", visit=2, offload=offload, folder=tmp_path / "waiting", accumulate=2, **options
        )

    whole = fresh()
    whole.fit(small.Loader(), steps=11, progress=False)
    wanted = small.everything(whole)
    part = fresh()
    part.fit(small.Loader(), steps=5, progress=False)
    part.save(tmp_path / "ckpt", extra={"note": 1})
    part.fit(part.loader, steps=7, progress=False)  # goes on, and is lost
    again = fresh()
    assert again.load(tmp_path / "ckpt") == {"note": 1} and again.steps_done == 5
    again.fit(small.Loader(), steps=11, progress=False)
    made = small.everything(again)
    assert made.keys() == wanted.keys()
    assert all(torch.equal(wanted[name], made[name]) for name in wanted)
    assert again.model.partition == whole.model.partition


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    made = trainer(tmp_path)
    made.step(*small.batch())
    made.save(tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match="seed=0, the trainer has seed=1"):
        trainer(tmp_path, seed=1).load(tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match="do not fit the model"):
        trainer(tmp_path, model=small.model(blocks=2, layers=6)).load(tmp_path / "ckpt")


def test_a_save_to_a_second_folder_is_whole(tmp_path):
    made = trainer(tmp_path)
    made.fit(small.Loader(), steps=3, progress=False)
    made.save(tmp_path / "one")
    made.fit(small.Loader(), steps=4, progress=False)
    made.save(tmp_path / "one")
    made.save(tmp_path / "two")
    again = trainer(tmp_path)
    again.load(tmp_path / "two")
    wanted = small.everything(made)
    assert all(torch.equal(t, wanted[name]) for name, t in small.everything(again).items())


def test_clipping_limits_the_step(tmp_path):
    def sgd_step(clip):
        made = db.Trainer(
            small.model(), device="cpu", clip=clip, ema=0.0, optimizer=lambda params: torch.optim.SGD(params, 1.0)
        )
        before = small.everything(made)
        norm = made.step(*small.batch()).grad_norm
        after = small.everything(made)
        return float(norm), float(torch.stack([(after[n] - before[n]).norm() for n in before]).norm())

    norm, moved = sgd_step(0)
    assert moved == pytest.approx(norm, rel=1e-4)
    clipped_norm, clipped = sgd_step(norm / 10)
    assert clipped_norm == pytest.approx(norm, rel=1e-6)
    assert clipped == pytest.approx(norm / 10, rel=1e-3)


def test_clipping_by_the_default_optimizer_is_of_both_parts_together(tmp_path):
    """AdamW doesn't see the scale of its first gradient, its moments do."""
    moments = []
    for clip in (0, 1e-3):
        made = trainer(tmp_path, clip=clip)
        norm = float(made.step(*small.batch()).grad_norm)
        state = small.everything(made)
        moments.append(torch.cat([t.flatten() for name, t in state.items() if "/exp_avg/" in name]))
    torch.testing.assert_close(moments[1], moments[0] * (1e-3 / norm), rtol=1e-4, atol=1e-12)


def test_accumulated_batches_make_the_gradient_of_their_mean(tmp_path):
    x, y = small.batch()
    models = [small.model(), small.model()]
    for module in (m for model in models for m in model.modules() if isinstance(m, nn.Dropout)):
        module.p = 0.0
    made = db.Trainer(models[0], device="cpu", accumulate=2, optimizer=lambda p: torch.optim.SGD(p, 0.0), clip=0)
    first, second = made.step(x, y), made.step(x, y)
    assert first.grad_norm is None and (made.steps_done, made.batches_done) == (1, 2)
    losses = [models[1].loss(first.block, x, y, seed=0, step=step).loss for step in (0, 1)]
    (sum(losses) / 2).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in models[1].parameters() if p.grad is not None])
    torch.testing.assert_close(second.grad_norm, norm)
    torch.testing.assert_close(torch.stack([first.loss, second.loss]), torch.stack(losses).detach())


@pytest.mark.parametrize("sgd", [False, True])
def test_what_is_not_finite_changes_nothing_and_is_told(tmp_path, sgd):
    options = dict(optimizer=lambda params: torch.optim.SGD(params, 0.1)) if sgd else {"lr": 1e-2}
    made = db.Trainer(small.model(), device="cpu", visit=9, ema=0.0, **options)
    x, y = small.batch()
    made.step(x, y)
    before = small.everything(made)
    bad = made.block
    made.step(x * float("nan"), y)
    made.step(x * float("inf"), y)
    after = small.everything(made)
    assert all(torch.equal(after[n], t) for n, t in before.items() if n.startswith(f"block_{bad}/weight"))
    assert all(torch.equal(after[n], t) for n, t in before.items() if n.startswith("shared/weight"))
    with pytest.raises(db.NonFiniteLoss, match=rf"block {bad} is not finite at step 1 \(sigma from"):
        made.save(tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


class Reads(TorchDispatchMode):
    """Counts values read on the host."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op is torch.ops.aten._local_scalar_dense.default
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", small.KINDS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_reads_no_value(tmp_path, kind, precision):
    made = trainer(tmp_path, kind, precision=precision, visit=50, log_every=1000)
    made.step(*small.batch(kind, 0))  # the first of a round reports the noise's density
    batches = [small.batch(kind, step) for step in range(1, 4)]
    with Reads() as reads:
        for x, y in batches:
            made.step(x, y)
    assert reads.count == 0
    with Reads() as reads:  # a positive control
        float(torch.ones(()))
    assert reads.count == 1


def test_callbacks_are_called_by_their_names(tmp_path):
    class Callback:
        def __init__(self):
            self.calls = []

        def on_block_start(self, trainer, block):
            self.calls.append(("block", trainer.steps_done, block))

        def on_step_end(self, trainer, output):
            self.calls.append(("step", trainer.steps_done, output.block))

        def on_log(self, trainer, row):
            self.calls.append(("log", row["step"], row["block"]))

        def on_save(self, trainer, folder):
            self.calls.append(("save", folder.name))

    callback = Callback()
    made = trainer(tmp_path, callbacks=[callback], log_every=2)
    made.fit(small.Loader(), steps=4, progress=False)
    made.save(tmp_path / "ckpt")
    assert [call[:2] for call in callback.calls] == [
        ("block", 0), ("step", 1), ("log", 2), ("step", 2), ("block", 2), ("step", 3), ("log", 4), ("step", 4),
        ("save", "ckpt"),
    ]  # fmt: skip
    assert sorted({call[2] for call in callback.calls if call[0] == "block"}) == [0, 1]


def test_rows_go_to_json_lines(tmp_path):
    made = trainer(tmp_path, log_every=3, log_folder=tmp_path / "log")
    made.fit(small.Loader(), steps=6, progress=False)
    rows = [json.loads(line) for line in (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6]
    assert {"loss", "grad_norm", "lr", "bytes", "sigma_low", "sigma_high", "seconds"} <= rows[0].keys()
    assert rows[0]["bytes"]["activations"] > 0


def test_fit_names_batch_if_the_loader_gives_dicts(tmp_path):
    x, y = small.batch()
    with pytest.raises(TypeError, match="got str; fit takes batch="):
        trainer(tmp_path).fit([{"x": x, "y": y}], steps=1)


def test_fit_counts_steps_from_the_first(tmp_path):
    made = trainer(tmp_path)
    with pytest.raises(ValueError, match="fit needs steps"):
        made.fit(small.Loader())
    made.fit([small.batch()], steps=3, progress=False)  # iterated again and again
    assert made.steps_done == 3
    with pytest.raises(ValueError, match="3 are done"):
        made.fit(small.Loader(), steps=2)
    with pytest.raises(ValueError, match="gave no batch"):
        made.fit([], steps=4, progress=False)


def test_batches_of_any_kind(tmp_path):
    x, y = small.batch()
    made = trainer(tmp_path)
    made.fit([{"pixels": x, "label": y}], steps=2, batch=lambda d: (d["pixels"], d["label"]), progress=False)
    made.fit([[x, y]], steps=4, progress=False)
    assert made.steps_done == 4


def test_the_callers_random_numbers_go_on_untouched(tmp_path):
    made, batch = trainer(tmp_path), small.batch()
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    made.step(*batch)
    assert torch.equal(torch.rand(3), wanted)


def test_another_optimizers_rates_follow_the_schedule(tmp_path):
    rates, rows = [], []
    made = db.Trainer(
        small.model(), device="cpu", steps=10, warmup=2, optimizer=lambda params: torch.optim.SGD(params, 0.4),
        log_every=1, callbacks=[SimpleNamespace(on_log=lambda trainer, row: rows.append(row["lr"]))],
    )  # fmt: skip
    for step in range(10):
        made.step(*small.batch(step=step))
        rates.append(made.optimizers["shared"].param_groups[0]["lr"])
    assert rows == rates
    assert rates[:2] == pytest.approx([0.2, 0.4]) and rates[2] == pytest.approx(0.4)
    assert rates[-1] == pytest.approx(0.4 * 0.5 * (1 - 0.9238795), rel=1e-3)


@pytest.mark.parametrize(("settings", "words"), [
    (dict(lr=-1.0), "lr must be positive"),
    (dict(offload="cloud"), "offload must be one of"),
    (dict(offload="disk", folder=None), "needs a folder"),
    (dict(precision="half"), "precision must be one of"),
    (dict(visit=0), "visit must be at least 1"),
    (dict(ema=1.0), "ema must be in"),
    (dict(clip=float("nan")), "clip must be finite"),
    (dict(branch=0.5), "set steps"),
    (dict(device="mps"), "can't train here"),
    (dict(loggers=("csv",)), "loggers must be one of"),
])  # fmt: skip
def test_bad_settings_are_refused_by_name(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path, **settings)


def test_lr_beside_an_optimizer_is_refused():
    with pytest.raises(ValueError, match="both set the learning rate"):
        db.Trainer(small.model(), lr=0.1, optimizer=lambda params: torch.optim.SGD(params, 0.1))
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer"):
        db.Trainer(small.model(), optimizer=lambda params: None)
