"""Steps as CUDA graphs: bit for bit the steps without, also where a graph can't be made."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import diffusionblocks as db
import small
from diffusionblocks.training import capture
from diffusionblocks.training.cuda_graphs import CudaGraphs

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("repeatable")]
STEPS = 26


class Counted(CudaGraphs):
    """Counts graphs and their replays."""

    def __init__(self, device):
        super().__init__(device)
        self.recordings = self.replays = 0

    def record(self, work):
        replay, result = super().record(work)
        self.recordings += 1
        return lambda: self.replay(replay), result

    def replay(self, replay):
        self.replays += 1
        replay()


@pytest.fixture
def graphs(monkeypatch):
    """Return the graphs of the GPU, counted."""
    made = Counted(torch.device("cuda"))
    monkeypatch.setattr(capture, "graphs_of", lambda device: made)
    return made


def trainer(captured, model, **settings):
    settings = {
        "lr": 1e-2,
        "steps": 40,
        "warmup": 0.2,
        "visit": 4,
        "ema": 0.9,
        "clip": 0.3,
        "offload": "cpu",
    } | settings
    return db.Trainer(model, device="cuda", capture=captured, log_every=5, **settings)


def train(made, kind, steps=STEPS):
    outputs = [made.step(*small.batch(kind, step)) for step in range(steps)]
    return [(o.block, float(o.loss), float(o.grad_norm)) for o in outputs]


def assert_alike(one, other):
    one, other = small.everything(one), small.everything(other)
    assert [name for name, t in one.items() if not torch.equal(t, other[name])] == []


def both(model, kind, **settings):
    """Train with graphs and without, and compare all bits."""
    ours, plain = (trainer(captured, model(), **settings) for captured in (True, False))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*CUDA graphs.*")
        assert train(ours, kind) == train(plain, kind)
    assert_alike(ours, plain)
    ours.check()
    return ours


@pytest.mark.parametrize("kind", ["labels", "images", "tokens"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "places", [{"offload": None}, {"slots": 1}, {"slots": 2}], ids=["resident", "1 slot", "2 slots"]
)
def test_graphs_change_no_bit_and_dropout_draws_the_same(graphs, kind, precision, places):
    both(lambda: small.model(kind, blocks=3, layers=3), kind, precision=precision, **places)
    assert graphs.recordings == places.get("slots", 3)
    assert graphs.replays >= STEPS - 3 * graphs.recordings - 1


@pytest.mark.parametrize("shared", ["per_block", "frozen"])
def test_blocks_share_a_graph(graphs, shared):
    both(lambda: small.model("labels", blocks=3, layers=3, shared=shared), "labels")
    assert graphs.recordings == 1


def test_compiled_blocks_are_recorded(graphs):
    both(lambda: small.model("labels", blocks=3, layers=3), "labels", compile=True)
    assert graphs.recordings == 1


def test_replays_take_no_memory(graphs):
    made = trainer(True, small.model("images", blocks=1, layers=3))
    sizes = []
    for step in range(40):
        made.step(*small.batch("images", step))
        sizes.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert len(set(sizes[-20:])) == 1


class Reads(nn.Module):
    """Looks at a value on the host: always, or while a graph is recorded."""

    def __init__(self, inner, always):
        super().__init__()
        self.inner, self.always = inner, always
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, h):
        self.calls += 1
        h = self.inner(h)
        if self.always or torch.cuda.is_current_stream_capturing():
            float(h.sum())
        return h


@pytest.mark.parametrize(("always", "reason"), [(True, "reads values"), (False, "Error")])
def test_a_model_that_cannot_be_recorded_trains_as_ever(graphs, always, reason):
    def model():
        torch.manual_seed(0)
        layers = [Reads(small.Residual(8), always) for _ in range(3)]
        stem, head = nn.Linear(6, 8), nn.Linear(8, 3)
        return db.from_layers(layers, blocks=3, dim=8, stem=stem, head=head, target=db.LabelTarget(3, 8))

    ours, plain = (trainer(captured, model()) for captured in (None, False))
    with pytest.warns(UserWarning, match=f"without CUDA graphs: .*{reason}"):
        losses = train(ours, "labels")
    assert losses == train(plain, "labels"), "dropout draws after a failed recording as before"
    assert_alike(ours, plain)
    assert graphs.recordings == 0
    both(lambda: small.model("labels", blocks=3, layers=3), "labels")  # others are recorded none the less
    assert graphs.recordings == 1


def test_a_layer_that_draws_on_the_host_is_not_recorded(graphs):
    class Drops(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, h):
            return self.inner(h) if torch.rand(()) < 0.5 else h

    torch.manual_seed(0)
    stem, head = nn.Linear(6, 8), nn.Linear(8, 3)
    layers = [Drops(small.Residual(8, 0.0)) for _ in range(6)]
    made = trainer(None, db.from_layers(layers, blocks=3, dim=8, stem=stem, head=head, target=db.LabelTarget(3, 8)))
    with pytest.warns(UserWarning, match="draws random numbers on the host"):
        train(made, "labels")
    assert graphs.recordings == 0
