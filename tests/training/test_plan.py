"""A plan is what training then takes, to the byte."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import diffusionblocks as db
import small
from diffusionblocks.offload.lanes import CHUNK
from diffusionblocks.offload.memory import CATEGORIES, SavedTensors
from diffusionblocks.training.precision import to_bfloat16

OFFLOADS = (None, "cpu", "disk")


class OnLog:
    """Keeps each row's bytes."""

    def __init__(self):
        self.rows = []

    def on_log(self, trainer, row):
        self.rows.append(row["bytes"])


class Aware(nn.Module):
    """A layer that takes the conditioning, and has a buffer, a vector and a frozen matrix."""

    def __init__(self, dim, unused=False):
        super().__init__()
        self.inner, self.scale = nn.Linear(dim, dim), nn.Linear(8, dim)
        self.frozen = nn.Parameter(torch.eye(dim), requires_grad=False)
        self.register_buffer("shift", torch.zeros(dim))
        self.unused = nn.Parameter(torch.zeros(3, 3)) if unused else None

    def forward(self, h, cond):
        scale = self.scale(cond)
        return h + (self.inner(h) @ self.frozen + self.shift).tanh() * (scale.unsqueeze(1) if h.dim() > 2 else scale)


def rebuild(model, blocks, shared="shared"):
    """Return a copy of a model in another number of blocks."""
    model = copy.deepcopy(model)
    around = model.blocks[0].around(model.stem_head)
    if shared == "per_block":
        around = [copy.deepcopy(around) for _ in range(blocks)]
    layers = [layer for block in model.blocks for layer in block.layers]
    counts = db.make_partition(model.partition.density, len(layers), blocks)
    return db.DiffusionBlocks(around, layers, model.target, counts, shared=shared)


def measured(model, batch, folder, **settings):
    """Return the bytes of the largest of all blocks, each trained for two steps, and the trainer."""
    watch = OnLog()
    trainer = db.Trainer(model, callbacks=[watch], visit=1, log_every=1, folder=folder, device="cpu", **settings)
    for _ in range(2 * len(model.blocks) * trainer.config.accumulate):
        trainer.step(*batch)
    rows = watch.rows[len(model.blocks) :]  # once every block has its optimizer state
    return max(rows, key=lambda row: sum(row.values())), trainer


def assert_as_planned(model, batch, tmp_path, shared="shared", **settings):
    table = db.plan(model, batch, device="cpu", **settings)
    assert list(table.rows) == list(range(1, sum(model.partition.layers) + 1))
    for blocks, usage in table.rows.items():
        cut = rebuild(model, blocks, shared)
        took, trainer = measured(cut, batch, tmp_path / f"waiting{blocks}", **settings)
        if isinstance(model.target, db.MaskedTarget):  # it may be that not all tokens are masked
            assert 0.4 * usage.by_category["activations"] < took["activations"] <= usage.by_category["activations"]
            took["activations"] = usage.by_category["activations"]
        assert {c: took[c] for c in CATEGORIES} == {c: usage.by_category[c] for c in CATEGORIES}, f"B={blocks}"
        held = trainer.memory().by_category
        if settings.get("offload") is None:  # else the last block may be a smaller one
            for c in ("weights", "moments", "averages"):
                assert held[c] == usage.by_category[c]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "kind, offload", [*((kind, "disk") for kind in small.KINDS), ("labels", None), ("tokens", "cpu")]
)
def test_measured_bytes_are_the_plan(tmp_path, kind, offload, precision):
    model = small.model(kind, layers=3, blocks=2)
    assert_as_planned(model, small.batch(kind), tmp_path, offload=offload, precision=precision)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_masked_tokens_are_planned_as_if_all_were_masked(precision):
    model, (x, y) = small.model("masked", layers=3, blocks=1), small.batch("masked")
    planned = db.plan(model, (x, y), device="cpu", precision=precision).rows[1].by_category["activations"]
    half = precision == "bfloat16"
    if half:
        to_bfloat16(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=half), SavedTensors(model.parameters()).count() as saved:
        model.loss_at(0, x, y, torch.ones(len(y)), seed=0, step=0)
    assert saved.bytes == planned


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", small.KINDS)
def test_checkpointed_layers_are_counted(tmp_path, kind, precision):
    model, settings = small.model(kind, layers=4, blocks=2), {"precision": precision, "checkpoint_layers": True}
    assert_as_planned(model, small.batch(kind), tmp_path, **settings)
    plain = db.plan(model, small.batch(kind), device="cpu", precision=precision).rows[1]
    ours = db.plan(model, small.batch(kind), device="cpu", **settings).rows[1]
    assert ours.by_category["activations"] < plain.by_category["activations"]


SETTINGS = {
    "no ema": {"ema": 0.0},
    "accumulate": {"accumulate": 3},
    "two slots": {"slots": 2},
    "bfloat16 moments": {"moments": "bfloat16"},
    "sgd": {"optimizer": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9)},
    "adam": {"optimizer": lambda params: torch.optim.Adam(params, 0.1)},
}


@pytest.mark.parametrize(
    "name, offload", [(name, place) for name in SETTINGS for place in OFFLOADS if place or name != "two slots"]
)
def test_settings_are_counted(tmp_path, name, offload):
    assert_as_planned(small.model(layers=3), small.batch(), tmp_path, offload=offload, **SETTINGS[name])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("shared", ["shared", "per_block", "frozen"])
def test_layers_that_differ_and_every_way_to_share(tmp_path, shared, precision):
    layers = [Aware(8), Aware(8, unused=True), small.Residual(8), nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8))]
    model = db.from_layers(
        layers, stem=nn.Linear(6, 8), head=nn.Linear(8, 3), target=db.LabelTarget(3, 8), blocks=2, shared=shared, cond=8
    )
    assert_as_planned(model, small.batch(), tmp_path, shared, offload="disk", precision=precision)


def test_a_buffer_that_all_layers_hold_is_counted_once(tmp_path):
    layers = [Aware(8) for _ in range(3)]
    for layer in layers:
        layer.shift = layers[0].shift
    model = db.from_layers(
        layers, stem=nn.Linear(6, 8), head=nn.Linear(8, 3), target=db.LabelTarget(3, 8), blocks=3, cond=8
    )
    assert_as_planned(model, small.batch(), tmp_path, offload="disk")


def test_blocks_as_the_model_has_them_not_spread(tmp_path):
    model = small.model(layers=4, blocks=(1, 3))
    table = db.plan(model, small.batch(), device="cpu", offload="disk")
    took, _ = measured(small.model(layers=4, blocks=(1, 3)), small.batch(), tmp_path, offload="disk")
    assert took == table.rows[2].by_category
    spread = db.plan(small.model(layers=4, blocks=(2, 2)), small.batch(), device="cpu", offload="disk")
    assert table.rows[2].total > spread.rows[2].total


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("optimizer", [None, lambda params: torch.optim.Adam(params, 0.1)], ids=["ours", "Adam"])
def test_waiting_blocks_are_counted(tmp_path, slots, optimizer):
    model, batch = small.model(layers=3, blocks=2), small.batch()
    settings = {"device": "cpu", "optimizer": optimizer, "slots": slots}
    trainer = measured(model, batch, tmp_path, offload="disk", optimizer=optimizer, slots=slots)[1]
    trainer.offloader.retire()  # the last block's file may be from before its state was made
    stored = sum(layout.nbytes for layout in trainer.offloader._slots.layouts.values())
    headers = sum(len(layout.header) for layout in trainer.offloader._slots.layouts.values())
    assert db.plan(model, batch, offload="disk", **settings).choice(2).disk == stored
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) == stored + headers
    model.offloader.release()
    kept = measured(model, batch, tmp_path, offload="cpu", optimizer=optimizer, slots=slots)[1]
    choice = db.plan(model, batch, offload="cpu", **settings).choice(2)
    assert choice.host == stored == sum(b.numel() for b in kept.offloader._slots.store.buffers)
    held = kept.memory().total  # the last block's counters may be fewer
    assert held == pytest.approx(choice.usage.with_(gradients=0, activations=0).total, abs=32)


def test_on_a_gpu_the_host_holds_all_blocks_and_the_disk_store_a_ring():
    kept, host, disk = (db.plan(small.model(layers=3), small.batch(), device="cuda", offload=o) for o in OFFLOADS)
    assert kept.choice(3).host == kept.choice(3).disk == host.choice(3).disk == host.choice(1).host == 0
    state = sum(host.rows[3].by_category[c] for c in ("weights", "moments", "averages", "buffers"))
    assert host.choice(3).host == disk.choice(3).disk and 0 < host.choice(3).host
    assert host.choice(3).usage == disk.choice(3).usage and state > host.cuts[3].slot
    assert disk.choice(2).host == disk.choice(3).host == 2 * CHUNK, "whatever the depth"
    two = db.plan(small.model(layers=3), small.batch(), device="cuda", offload="cpu", slots=2)
    assert two.rows[3].total - host.rows[3].total == host.cuts[3].slot


def test_fit_takes_the_fewest_blocks_and_of_those_the_place_that_moves_least():
    model, batch = small.model(layers=6, blocks=3), small.batch()
    table = db.plan(model, batch, device="cuda", offload="cpu", bandwidth=1e6)

    def chosen(memory, host=None):
        choice = table.fit(memory, host)
        return choice and (choice.blocks, choice.offload, choice.slots)

    alone = table.choice(1)
    assert chosen(alone.usage.total) == (1, None, 1) and alone.seconds == 0
    two, one = table.choice(2, "cpu", 2), table.choice(2, "cpu", 1)
    resident = table.choice(2, None)
    assert one.usage.total < two.usage.total < alone.usage.total
    assert one.usage.total < resident.usage.total
    assert resident.usage.total < two.usage.total, "B = 2: two slots are both blocks"
    assert chosen(resident.usage.total) == (2, None, 1)
    assert chosen(one.usage.total) == (2, "cpu", 1)
    assert chosen(one.usage.total, host=one.host) == (2, "cpu", 1)
    assert chosen(one.usage.total, host=3 * CHUNK) == (2, "cpu", 1)
    assert chosen(min(u.total for u in table.rows.values()) - 1) is None
    assert chosen(one.usage.total, host=one.host - 1) is None, "neither the store nor the ring of a disk store fits"
    assert one.seconds == pytest.approx(table.cuts[2].slot / 1e6)
    assert (one.least_visit, two.least_visit) == (pytest.approx(50 * one.seconds), one.seconds)
    assert one.visit(step_seconds=one.seconds) == 50 and two.visit(10.0) == 1
    assert "B = 2, blocks wait on the host, slots = 1; a move takes" in str(one)


def test_where_no_bandwidth_is_known_no_time_is_said():
    choice = db.plan(small.model(), small.batch(), device="cpu", offload="disk").choice(2)
    assert choice.seconds is None and "takes" not in str(choice)
    with pytest.raises(ValueError, match="give plan a bandwidth"):
        choice.visit(0.1)
    with pytest.raises(ValueError, match="bandwidth must be positive"):
        db.plan(small.model(), small.batch(), bandwidth=0)


def test_the_bandwidth_is_measured_where_blocks_will_wait(tmp_path):
    on_disk = db.plan(small.model(), small.batch(), device="cpu", offload="disk", folder=tmp_path).bandwidth
    in_memory = db.plan(small.model(), small.batch(), device="cpu", offload="cpu").bandwidth
    assert on_disk.keys() == {"disk"} and in_memory.keys() == {"cpu"}
    assert 1e6 < on_disk["disk"] < 1e12 and 1e6 < in_memory["cpu"] < 1e12
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("offload", OFFLOADS)
def test_an_offloaded_model_is_planned_as_it_was_before(tmp_path, offload):
    model, batch = small.model(layers=3), small.batch()
    before = db.plan(model, batch, device="cpu", offload="disk")
    trainer = measured(model, batch, tmp_path, offload=offload)[1]
    held = {name: t.clone() for name, t in model.state_dict().items()}
    assert db.plan(model, batch, device="cpu", offload="disk") == before
    assert all(torch.equal(held[name], t) for name, t in model.state_dict().items())
    assert trainer.step(*batch).loss.isfinite()


def test_more_blocks_take_less_and_smallest_finds_the_first_that_fits():
    table = db.plan(small.model(layers=3), small.batch(), device="cpu", offload="disk")
    totals = [usage.total for usage in table.rows.values()]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == 3
    assert table.smallest(totals[1]) == 2 and table.smallest(totals[0]) == 1
    assert table.smallest(totals[2] - 1) is None


def test_a_plan_allocates_nothing():
    x, y = torch.empty(1, 6).expand(10**9, 6), torch.empty(1, dtype=torch.int64).expand(10**9)
    assert db.plan(small.model(), (x, y), device="cpu").rows[1].total > 2**37


def test_the_table_is_aligned_and_narrow():
    x, y = small.batch()
    lines = str(db.plan(small.model(), (x, y), device="cuda:1", offload="disk")).splitlines()
    assert lines[0].split() == ["B", *CATEGORIES, "cuda:1", "host", "disk"]
    assert [line.split()[0] for line in lines[1:]] == ["1", "2", "3", "4"]
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= 80
    timed = str(db.plan(small.model(), (x, y), device="cuda:1", offload="cpu", bandwidth=1e9)).splitlines()
    assert timed[0].split() == ["B", *CATEGORIES, "cuda:1", "host", "move"] and timed[2].split()[-1].endswith("s")
    kept = str(db.plan(small.model(), (x, y), device="cpu")).splitlines()
    assert kept[0].split() == ["B", *(c for c in CATEGORIES if c != "buffers"), "cpu"]


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match="model must be DiffusionBlocks"):
        db.plan(nn.Linear(2, 2), small.batch())
    with pytest.raises(ValueError, match="batch size"):
        db.plan(small.model(), (torch.randn(3, 6), torch.zeros(2, dtype=torch.int64)))
    with pytest.raises(ValueError, match="device='mps'"):
        db.plan(small.model(), small.batch(), device="mps")
    with pytest.raises(ValueError, match="precision"):
        db.plan(small.model(), small.batch(), precision="float16")
    for given in ({"memory_bytes": "24GiB"}, {"memory_bytes": 1, "host_bytes": "1GiB"}):
        with pytest.raises(TypeError, match=r"_bytes must be a number of bytes, got '.*GiB'"):
            db.plan(small.model(), small.batch(), device="cpu").fit(**given)
    table = db.plan(small.model(), small.batch(), device="cpu")
    for call in (table.smallest, table.fit, table.choice(1).visit, lambda value: table.fit(1, value)):
        for value in (-1, 0, float("nan")):
            with pytest.raises(ValueError, match="must be positive"):
                call(value)
    with pytest.raises(ValueError, match="host_bytes: the device is the host itself"):
        table.fit(10**9, host_bytes=1)
    with pytest.raises(ValueError, match="blocks=9 is not among the plan's: 1, 2, 3, 4"):
        table.choice(9)
    for batch in (small.batch()[0], 5, ("x", "y")):
        with pytest.raises(TypeError, match=r"batch must be two tensors \(x, y\)"):
            db.plan(small.model(), batch)
