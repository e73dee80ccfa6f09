"""Steps as graphs: bit for bit the steps without, one recording per place, and one line that says why there is none."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import diffusionblocks as db
import small
from diffusionblocks.noise.rng import stream
from diffusionblocks.training import capture
from diffusionblocks.training import step as training_step
from diffusionblocks.training.optimizer import BlockAdamW, clipped_step
from recorded_graphs import RecordedGraphs, Recorder

STEPS = 26
SETTINGS = {"lr": 1e-2, "steps": 40, "warmup": 0.2, "visit": 4, "ema": 0.9, "clip": 0.3, "log_every": 5}


class Rows(list):
    """A callback that keeps the log's rows, without what the clock and the allocator say."""

    def on_log(self, trainer, row):
        self.append({k: v for k, v in row.items() if k not in ("allocated", "reserved")})


@pytest.fixture
def graphs(monkeypatch):
    """Return the graphs of the CPU."""
    made = RecordedGraphs()
    monkeypatch.setattr(capture, "graphs_of", lambda device: made)
    return made


def dense(kind, **options):
    """Return a model; of masks with a head that takes all positions: the linear one counts them on the host."""
    torch.manual_seed(0)
    if kind != "masked":
        return small.model(kind, blocks=3, layers=3, **options)
    head = nn.Sequential(nn.GELU(), nn.Linear(8, 5))
    layers = [small.Residual(8) for _ in range(3)]
    return db.from_layers(
        layers, blocks=3, stem=small.MaskedStem(8, 8), head=head, target=db.MaskedTarget(5), **options
    )


def trainer(captured, model=None, **settings):
    rows = Rows()
    made = db.Trainer(model or dense("labels"), device="cpu", capture=captured, callbacks=[rows], **SETTINGS | settings)
    return made, rows


def train(made, first=0, last=STEPS, kind="labels", size=8):
    """Return what the steps returned."""
    outputs = [made.step(*small.batch(kind, step, size)) for step in range(first, last)]
    return [(o.block, float(o.loss), float(o.grad_norm)) for o in outputs]


def assert_alike(one, other):
    one, other = small.everything(one), small.everything(other)
    assert one.keys() == other.keys()
    assert [name for name, t in one.items() if not torch.equal(t, other[name])] == []


def both(model=dense, kind="labels", steps=STEPS, **settings):
    """Train with graphs and without, compare all bits, and return the trainers."""
    made = [trainer(captured, model(kind), **settings) for captured in (True, False)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (ours, rows), (plain, expected) = made
        assert train(ours, last=steps, kind=kind) == train(plain, last=steps, kind=kind)
    assert rows == expected and len(rows) >= steps // 5
    assert_alike(ours, plain)
    ours.check()
    return ours, plain


@pytest.mark.parametrize("kind", small.KINDS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("offload", [None, "cpu"])
def test_graphs_change_no_bit(graphs, kind, precision, offload):
    both(kind=kind, precision=precision, offload=offload)
    # All blocks come to the one slot; where they stay, each has a graph of its own, after two steps without. An image's
    # shape is learnt in the first step, which makes it another one.
    places, early = (1, 2) if offload else (3, 6)
    assert graphs.recordings == places
    assert STEPS - early - 1 <= graphs.replays <= STEPS - early


@pytest.mark.parametrize("shared", ["per_block", "frozen"])
@pytest.mark.parametrize("slots", [1, 2])
def test_blocks_with_ends_of_their_own_share_a_graph(graphs, shared, slots):
    both(lambda kind: dense(kind, shared=shared), offload="cpu", slots=slots, steps=39)
    assert graphs.recordings == slots and graphs.replays == 39 - 2 * slots


def test_blocks_of_other_sizes_have_graphs_of_their_own(graphs):
    both(lambda kind: small.model(kind, blocks=3, layers=4), offload="cpu")
    assert graphs.recordings == 2


def test_without_clipping_and_averages(graphs):
    both(offload="cpu", ema=0.0, clip=0.0)
    assert graphs.recordings == 1


def test_learning_rates_by_group(graphs):
    def make(params):
        return BlockAdamW([{"params": params[:1], "lr": 0.03}, {"params": params[1:], "betas": (0.8, 0.9)}], lr=0.01)

    made = []
    for captured in (True, False):
        settings = {k: v for k, v in SETTINGS.items() if k != "lr"}
        made.append(
            db.Trainer(dense("labels"), optimizer=make, offload="cpu", capture=captured, device="cpu", **settings)
        )
    assert train(made[0]) == train(made[1])
    assert_alike(*made)
    assert graphs.recordings == 1


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_branching_noise_cut_anew_and_all_that_comes_between_steps(graphs, offload, tmp_path):
    made = [trainer(captured, offload=offload, branch=0.25)[0] for captured in (True, False)]
    found = []
    for one in made:
        losses = train(one, 0, 14)  # branches after ten
        losses.append(db.sample(one.model, small.batch()[0], steps=3).tolist())  # brings other blocks
        losses += train(one, 14, 15)
        with one.averages():
            losses.append(one.model.eval()(small.batch()[0]).tolist())
        losses += train(one, 15, 18)
        one.save(tmp_path / "saved")
        train(one, 18, 20)
        one.load(tmp_path / "saved")
        losses += train(one, 18, 40)
        found.append(losses)
    assert found[0] == found[1]
    assert_alike(*made)
    assert graphs.replays > 20


@pytest.mark.parametrize("at", [3, 9, 15])
def test_a_step_that_is_not_finite_is_skipped_and_named(graphs, at):
    messages = []
    for captured in (True, False):
        made, _ = trainer(captured, dense("images"), offload="cpu", log_every=100)
        for step in range(20):
            x, y = small.batch("images", step)
            made.step(x, y * math.nan if step == at else y)
        with pytest.raises(db.NonFiniteLoss, match=f"at step {at} ") as caught:
            made.check()
        messages.append((str(caught.value), {n: t.tolist() for n, t in small.everything(made).items()}))
    assert messages[0] == messages[1]
    assert graphs.replays == 17


def test_batches_of_other_sizes_are_recorded_a_few_times(graphs):
    made = [trainer(captured, offload="cpu")[0] for captured in (True, False)]
    sizes = [8, 8, 8, 5, 8, 5, 5, 8, 3, 3, 3, 2, 2, 2, 1, 1, 1, 8, 1, 5, 3]
    found = [[train(one, i, i + 1, size=size) for i, size in enumerate(sizes)] for one in made]
    assert found[0] == found[1]
    assert_alike(*made)
    assert graphs.recordings == 4  # and never batches of one
    assert graphs.replays == 9


class Scaled(nn.Module):
    """A layer with a setting of its own."""

    def __init__(self, inner, scale):
        super().__init__()
        self.inner, self._scale = inner, scale

    def forward(self, h):
        return self.inner(h) * self._scale


@pytest.mark.parametrize("change", ["private", "dropout", "tensor", "frozen", "decay"])
def test_blocks_that_compute_something_else_do_not_share_a_graph(graphs, change):
    def model(kind):
        torch.manual_seed(0)
        scales = [torch.full((2000,), 1.0 + b / 10)[999] if change == "tensor" else 1.0 for b in range(3)]
        scales[1] = 1.5 if change == "private" else scales[1]
        layers = [
            Scaled(small.Residual(8, 0.5 if change == "dropout" and b == 1 else 0.1), s) for b, s in enumerate(scales)
        ]
        made = db.from_layers(
            layers, blocks=3, dim=8, stem=nn.Linear(6, 8), head=nn.Linear(8, 3), target=db.LabelTarget(3, 8)
        )
        if change == "frozen":
            made.blocks[1].layers[0].layer.inner.linear.bias.requires_grad_(False)
        return made

    ours, plain = (trainer(captured, model("labels"), offload="cpu")[0] for captured in (True, False))
    if change == "decay":
        for one in (ours, plain):
            one.optimizers["block_1"].param_groups[0]["weight_decay"] = 0.5
    assert train(ours) == train(plain)
    assert_alike(ours, plain)
    assert graphs.recordings == (3 if change == "tensor" else 2)


@pytest.mark.filterwarnings("ignore:.*new tensors in place")
@pytest.mark.parametrize("change", ["dropout", "frozen"])
def test_a_setting_changed_between_visits_is_seen(graphs, change):
    class Schedule:
        def on_block_start(self, trainer, block):
            if trainer.steps_done < 12:
                return
            for layer in (m for m in trainer.model.blocks[block].modules() if isinstance(m, small.Residual)):
                if change == "dropout":
                    layer.dropout.p = 0.4
                else:
                    layer.norm.bias.requires_grad_(False)

    made = [trainer(captured, offload="cpu")[0] for captured in (True, False)]
    for one in made:
        one.callbacks.append(Schedule())
    assert train(made[0]) == train(made[1])
    assert_alike(*made)
    assert change == "frozen" or graphs.recordings == 2  # what is frozen has a count of updates of its own from now on


def test_a_loss_of_ones_own_may_depend_on_the_block(graphs):
    class Own(db.DiffusionBlocks):
        def loss_at(self, block, *args, **options):
            loss = super().loss_at(block, *args, **options)
            return loss._replace(loss=loss.loss * (block + 1))

    def model(kind):
        made = dense(kind)
        made.__class__ = Own
        return made

    both(model, kind="images", offload="cpu")
    assert graphs.recordings == 3


class Reading(nn.Module):
    """A layer that counts its calls in a buffer, and then does what a graph can't."""

    def __init__(self, inner, do):
        super().__init__()
        self.inner, self.do = inner, do
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, h):
        self.calls += 1
        return self.do(self, self.inner(h))


def item(layer, h):
    return h * (1.0 if h.abs().max().item() >= 0 else 2.0)


def refuse_a_graph(layer, h):
    if torch._C._len_torch_dispatch_stack():
        raise NotImplementedError("not\nhere")
    return h


def replace_a_buffer_in_a_graph(layer, h):
    if any(isinstance(mode, Recorder) for mode in _get_current_dispatch_mode_stack()):
        layer.calls, layer.seen = layer.calls * 1.0, True
    return h


class Halfway(torch.autograd.Function):
    """Reads a value in the middle of the backward pass."""

    @staticmethod
    def forward(ctx, h):
        return h.clone()

    @staticmethod
    def backward(ctx, gradient):
        if torch._C._len_torch_dispatch_stack():
            raise NotImplementedError("halfway")
        return gradient


def fail_halfway(layer, h):
    return Halfway.apply(h)


def count_in_python(layer, h):
    layer.seen = getattr(layer, "seen", 0) + 1
    return h * layer.seen


@pytest.mark.parametrize("watching", [True, False])
@pytest.mark.parametrize(
    ("do", "reason"),
    [
        (item, "reads values"),
        (refuse_a_graph, "NotImplementedError: not "),
        (fail_halfway, "halfway"),
        (replace_a_buffer_in_a_graph, "in place of a block's"),
        (count_in_python, "again and again"),
    ],
)
def test_a_model_that_cannot_be_recorded_trains_as_ever_and_says_why_once(graphs, watching, do, reason):
    def model():
        torch.manual_seed(0)
        layers = [Reading(small.Residual(8), do) for _ in range(3)]
        return db.from_layers(
            layers, blocks=3, dim=8, stem=nn.Linear(6, 8), head=nn.Linear(8, 3), target=db.LabelTarget(3, 8)
        )

    graphs.watching = watching
    ours, plain = (trainer(captured, model(), offload=None)[0] for captured in (None, False))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert train(ours) == train(plain)
    assert_alike(ours, plain)
    layers = [[vars(m).keys() for m in one.model.modules() if isinstance(m, Reading)] for one in (ours, plain)]
    assert layers[0] == layers[1], "a try that failed leaves nothing"
    assert sum(float(block.layers[0].layer.calls) for block in ours.model.blocks) == STEPS
    assert graphs.replays == 0
    lines = [str(w.message) for w in caught if "CUDA graphs" in str(w.message)]
    assert len(lines) == 1 and reason in lines[0] and "\n" not in lines[0]


def test_an_update_that_needs_numbers_from_the_host_is_made_once(graphs, monkeypatch):
    def needs_numbers(optimizer, norm, max_norm, rates=None):
        if rates is not None:
            raise TypeError("a number")
        return clipped_step(optimizer, norm, max_norm)

    monkeypatch.setattr(training_step, "clipped_step", needs_numbers)
    ours, plain = (trainer(captured, offload="cpu")[0] for captured in (None, False))
    with pytest.warns(UserWarning, match="TypeError: a number"):
        losses = train(ours)
    assert losses == train(plain)
    assert_alike(ours, plain)


def test_a_masked_model_that_counts_its_masks_is_not_recorded(graphs):
    ours, plain = (trainer(captured, small.model("masked", blocks=3, layers=3))[0] for captured in (None, False))
    with pytest.warns(UserWarning, match="reads values"):
        losses = train(ours, kind="masked")
    assert losses == train(plain, kind="masked") and graphs.recordings == 0
    assert_alike(ours, plain)


def obstacle(name):
    if name == "optimizer":
        return db.Trainer(
            dense("labels"), optimizer=lambda params: torch.optim.SGD(params, 0.1), device="cpu", capture=True
        )
    return trainer(True, accumulate=2 if name == "accumulate" else 1)[0]


@pytest.mark.parametrize(
    ("name", "reason"), [("accumulate", "several batches"), ("optimizer", "SGD"), ("hooks", "hooks")]
)
def test_what_forbids_graphs_is_said(graphs, name, reason):
    if name == "hooks":
        made = obstacle(name)
        made.model.blocks[0].layers[0].register_forward_hook(lambda *_: None)
        with pytest.warns(UserWarning, match=f"without CUDA graphs: .*{reason}"):
            train(made)
    else:
        with pytest.warns(UserWarning, match=f"without CUDA graphs: .*{reason}"):
            made = obstacle(name)
        made.step(*small.batch())
    assert graphs.recordings == 0


def test_by_default_a_cpu_has_no_graphs_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(trainer(None)[0], last=4)
    with pytest.warns(UserWarning, match="the device is cpu"):
        made, _ = trainer(True)
    train(made, last=4)
    with pytest.raises(ValueError, match="capture"):
        trainer("yes")


def test_a_stream_takes_no_tensor():
    for given in ((torch.tensor(1), "a"), (0, "a", torch.tensor(1))):
        with pytest.raises(TypeError, match="tensor"):
            stream(*given)


def test_the_stand_in_bakes_numbers_reads_memory_and_does_nothing_while_it_records():
    graphs, memory, number = RecordedGraphs(), torch.tensor([1.0, 2.0]), [3.0]

    def work():
        memory.add_(number[0])
        return memory * 2, torch.rand(2)

    before = torch.default_generator.get_state()
    replay, (doubled, drawn) = graphs.record(work)
    assert memory.tolist() == [1.0, 2.0] and torch.equal(before, torch.default_generator.get_state())
    number[0] = 100.0
    memory.zero_()
    replay()
    assert memory.tolist() == [3.0, 3.0] and doubled.tolist() == [6.0, 6.0]
    torch.default_generator.set_state(before)
    assert torch.equal(torch.rand(2), drawn)
    with pytest.raises(RuntimeError, match="reads values"):
        graphs.record(lambda: memory.add_(1).sum().item())
    assert memory.tolist() == [3.0, 3.0]
