"""A part of a model as named tensors: weights, optimizer state, averages."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import diffusionblocks as db
from diffusionblocks.checkpoint.layout import Layout
from diffusionblocks.offload.part import Part, common_tensors
from diffusionblocks.training.optimizer import keep_average


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.frozen = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.two.weight = self.one.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("table", torch.ones(2), persistent=False)


WEIGHTS = {"one.weight", "one.bias", "two.bias", "frozen.weight", "frozen.bias", "table"}  # a tie by its first name
TRAINED = {"one.weight", "one.bias", "two.bias"}


def part(make=lambda params: db.BlockAdamW(params, lr=0.1, ema_decay=0.9), steps=1, module=None):
    module = module or Tied()
    params = [p for p in module.parameters() if p.requires_grad]
    optimizer = make(params) if make else None
    for _ in range(steps if make else 0):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    return Part(module, optimizer, {}, owns_common=True)


def names(tensors, key):
    return {name.partition("/")[2] for name in tensors if name.startswith(f"{key}/")}


def test_tensors_are_weights_and_state_by_name():
    tensors = part().tensors()
    assert names(tensors, "weight") == WEIGHTS
    assert all(names(tensors, key) == TRAINED for key in ("exp_avg", "exp_avg_sq", "ema", "next_step"))
    assert names(part(steps=0).tensors(), "exp_avg") == set() and part(None).tensors().keys() == {
        f"weight/{name}" for name in WEIGHTS
    }


def test_what_is_no_tensor_is_a_scalar():
    def make(params):
        optimizer = torch.optim.SGD(params, 0.1)  # no momentum: its buffer is None
        keep_average(optimizer, 0.9)
        return optimizer

    made = part(make, steps=3)
    assert made.scalars() == {f"ema_updates/{name}": 3 for name in TRAINED}
    fresh = part(make, steps=0)
    fresh.take(made.tensors())
    fresh.take_scalars(made.scalars())
    assert fresh.scalars() == made.scalars()
    assert torch.equal(fresh.tensors()["ema/one.bias"], made.tensors()["ema/one.bias"])


def test_state_that_a_part_has_not_yet_is_made_from_a_file():
    made, fresh = part(steps=3), part(steps=0)
    stored = {name: t.detach().clone() for name, t in made.tensors().items()}  # each counter is a tensor of its own
    fresh.check(stored)
    fresh.take(stored)
    assert all(torch.equal(t, stored[name]) for name, t in fresh.tensors().items())
    assert fresh.optimizer.counts == [3, 3, 3]
    assert len({id(state["next_step"]) for state in fresh.optimizer.state.values()}) == 1, "one launch, one counter"
    assert fresh.module.two.weight is fresh.module.one.weight


@pytest.mark.parametrize(("change", "name"), [
    (lambda t: t.pop("weight/one.bias"), "weight/one.bias"),
    (lambda t: t.update({"weight/one.bias": torch.zeros(4)}), "weight/one.bias"),
    (lambda t: t.update({"weight/other": torch.zeros(4)}), "weight/other"),
    (lambda t: t.update({"ema/frozen.bias": torch.zeros(2)}), "ema/frozen.bias"),
])  # fmt: skip
def test_tensors_of_another_model_are_refused_by_name(change, name):
    made = part()
    tensors = dict(made.tensors())
    change(tensors)
    with pytest.raises(ValueError, match=f"do not fit the model: {name}"):
        made.check(tensors)


def test_without_an_optimizer_state_is_not_checked():
    part(None).check(part().tensors())


def test_weights_have_the_names_of_the_state_dict():
    made = part()
    state = made.module.state_dict()
    for averaged in (False, True):
        found = made.weights(made.tensors(), averaged=averaged)
        assert found.keys() == state.keys(), "both names of a tie, no buffer that isn't persistent"
        expected = made.optimizer.state[made.module.one.weight]["ema"] if averaged else state["one.weight"]
        assert torch.equal(found["one.weight"], expected) and torch.equal(found["two.weight"], expected)
        assert torch.equal(found["frozen.bias"], state["frozen.bias"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True])
def test_swapping_twice_changes_no_bit(dtype, wide):
    """Half weights' averages are rounded into their place, or take it in their own dtype (`wide`)."""
    made = part(module=nn.Linear(4, 4).to(dtype))
    made.wide = wide
    state = made.optimizer.state[made.module.weight]
    weights, average = made.module.weight.detach().clone(), torch.rand_like(state["ema"])
    state["ema"].copy_(average)
    for _ in range(3):
        made.swap()
        assert torch.equal(made.module.weight, average if wide else average.to(dtype))
        made.swap()
        assert torch.equal(made.module.weight, weights) and made.module.weight.dtype == dtype
        assert torch.equal(state["ema"], average)


@pytest.mark.parametrize(("settings", "stays"), [({}, True), ({"capturable": True}, False), ({"fused": True}, False)])
def test_torchs_own_optimizers_count_steps_on_the_host(settings, stays):
    made = part(lambda params: torch.optim.AdamW(params, 0.1))
    made.optimizer.param_groups[0].update(settings)
    counters = {f"step/{name}" for name in TRAINED}
    assert made.staying().keys() == (counters if stays else set())
    assert made.moving().keys() | made.staying().keys() == made.tensors().keys()
    assert (made.moving().keys() & counters) == (set() if stays else counters)


def test_blockadamw_counts_on_the_device():
    assert not part().staying()


def test_weights_come_first_then_what_stands_in_for_them():
    keys = [name.partition("/")[0] for name in part(module=Tied().to(torch.bfloat16)).moving()]
    assert list(dict.fromkeys(keys))[:3] == ["weight", "ema", "master"]


def test_bound_tensors_are_views_until_one_is_replaced():
    made = part()
    layout = Layout.of(made.moving())
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
    before = {name: t.detach().clone() for name, t in made.tensors().items()}
    layout.fill(buffer, made.moving())
    views = layout.views(buffer)
    assert not made.is_bound(views)
    made.bind(views)
    assert made.is_bound(views) and all(torch.equal(t, before[name]) for name, t in made.tensors().items())
    made.module.one.bias.data = torch.ones(3)
    assert not made.is_bound(views)
    made.bind(views)
    made.optimizer.state[made.module.one.bias]["more"] = torch.ones(3)
    assert not made.is_bound(views), "state made since"


def test_empty_keeps_shapes():
    made = part()
    shapes = {name: t.shape for name, t in made.tensors().items()}
    made.empty()
    assert {name: t.shape for name, t in made.tensors().items()} == shapes
    assert all(t.untyped_storage().nbytes() <= 8 for t in made.tensors().values())
    assert made.module.one.weight.isnan().all() and made.module.two.weight is made.module.one.weight


def test_frozen_tensors_of_several_parts_are_found():
    model, table = nn.ModuleDict({"a": Tied(), "b": Tied(), "c": Tied()}), torch.ones(2)
    model["a"].table = model["c"].table = table
    model["b"].frozen.bias = model["c"].frozen.bias
    common = common_tensors(model, dict(model.items()))
    assert {name for name, _ in common.values()} == {"a.table", "b.frozen.bias"}
    one = Part(model["c"], None, common, owns_common=False)
    owner = Part(model["a"], None, common, owns_common=True)
    assert names(one.tensors(), "weight") == WEIGHTS - {"table", "frozen.bias"}
    assert names(owner.tensors(), "weight") == WEIGHTS - {"table"} | {"a.table", "b.frozen.bias"}


class Coded(torch.Tensor):
    """Numbers as codes and a scale, as 8-bit optimizers keep them: a tensor that wraps others."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, size, stride):
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        raise NotImplementedError(f"{op}")


class EightBit(torch.optim.Optimizer):
    """Sign descent whose one moment is coded."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[p]
            if "moment" not in state:
                state["moment"] = Coded(torch.zeros(p.shape, dtype=torch.uint8), torch.zeros(()))
            state["moment"].codes += (p.grad > 0).to(torch.uint8)
            state["moment"].scale += 1
            p -= 0.1 * state["moment"].codes / state["moment"].scale


def test_state_that_wraps_tensors_moves_by_what_is_inside(tmp_path):
    made = part(EightBit, steps=3)
    tensors = made.tensors()
    assert names(tensors, "moment.codes") == names(tensors, "moment.scale") == TRAINED
    copy = {name: t.detach().clone() for name, t in tensors.items()}
    made.empty()
    state = made.optimizer.state[made.module.one.bias]["moment"]
    assert state.codes.untyped_storage().nbytes() == 1 and state.codes.shape == (3,)
    made.bind(copy)
    assert torch.equal(state.codes, torch.full((3,), 3, dtype=torch.uint8)) and float(state.scale) == 3
    fresh = part(EightBit, steps=0)
    fresh.check(copy)
    fresh.replace(copy)
    assert all(torch.equal(t, copy[name]) for name, t in fresh.tensors().items())
    assert fresh.module.one.bias.grad is None
