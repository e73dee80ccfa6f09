"""Converters are found by a network's class."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import diffusionblocks as db
import small
from diffusionblocks.convert import registry


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(small.Residual(8) for _ in range(4))


class Derived(Net):
    pass


def converter(network, blocks, **options):
    return db.from_layers(
        network.layers, stem=network.stem, head=network.head, target=db.LabelTarget(3, 8), blocks=blocks, **options
    )


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_CONVERTERS", dict(registry._CONVERTERS))


@pytest.mark.parametrize("kind", [Net, f"{Net.__module__}.Net"])
def test_a_class_or_its_name_is_registered(kind):
    assert db.register(kind)(converter) is converter
    network = Net()
    model = db.convert(network, blocks=2, shared="per_block", overlap=0.1)
    assert len(model.blocks) == 2 and model.shared == "per_block" and model.partition.overlap == 0.1
    own = model.blocks[0].layers[0].layer.linear.weight
    assert own is not network.layers[0].linear.weight and torch.equal(own, network.layers[0].linear.weight)
    assert model.loss(1, *small.batch()).loss.isfinite()


def test_the_network_itself_is_left_untrained():
    db.register(Net)(converter)
    network = Net()
    before = copy.deepcopy(network.state_dict())
    trainer = db.Trainer(db.convert(network, blocks=2, shared="per_block"), lr=1e-2, device="cpu", offload="cpu")
    for _ in range(4):
        trainer.step(*small.batch())
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())


def test_a_derived_class_is_converted_as_its_base_unless_it_has_its_own():
    db.register(Net)(converter)
    assert len(db.convert(Derived(), blocks=4).blocks) == 4
    db.register(Derived)(lambda network, blocks: "its own")
    assert db.convert(Derived(), blocks=4) == "its own" and len(db.convert(Net(), blocks=2).blocks) == 2


def test_an_unknown_class_is_refused_with_the_ways_out():
    with pytest.raises(TypeError, match=r"no converter for torch\.nn\.modules\.linear\.Linear") as caught:
        db.convert(nn.Linear(1, 1), blocks=2)
    for words in ("ViTForImageClassification", "from_layers(layers, stem=, head=, target=, blocks=)", "@register"):
        assert words in str(caught.value)


def instance(name):
    """Return a module of a class of that name, as a library's own wrapper."""
    return type(name, (nn.Module,), {})()


@pytest.mark.parametrize(("network", "words"), [
    ("bert-base", "got 'bert-base': load it by from_pretrained first"),
    (nn.Linear, "got <class 'torch.nn.modules.linear.Linear'>: load it"),
    (SimpleNamespace(), "got a SimpleNamespace: load it"),  # a config
    (SimpleNamespace(transformer=Net()), "convert its transformer"),  # a pipeline
    (nn.DataParallel(Net()), r"DataParallel wraps the network: convert its \.module, and train by Trainer\(mesh="),
    (instance("DistributedDataParallel"), r"convert its \.module"),
    (instance("OptimizedModule"), r"convert its \._orig_mod, and compile blocks by Trainer\(compile=True\)"),
    (instance("PeftModel"), r"convert its \.get_base_model\(\).*import diffusionblocks\.integrations\.peft"),
    (small.model(), "DiffusionBlocks already"),
])  # fmt: skip
def test_what_is_no_bare_network_is_refused_with_what_to_do(network, words):
    with pytest.raises(TypeError, match=words):
        db.convert(network, 2)


def test_options_of_others_are_refused_with_the_known_ones():
    @db.register(Net)
    def own(network, blocks, overlap=0.1):
        raise AssertionError("not called")

    with pytest.raises(TypeError, match="no option 'cond' for a Net, only overlap"):
        db.convert(Net(), 2, cond=0)


def test_weights_without_a_shape_are_refused():
    db.register(Net)(converter)
    network = Net()
    network.head = nn.LazyLinear(3)
    with pytest.raises(ValueError, match=r"lazy weight, head\.weight, without a shape yet: run it on a batch once"):
        db.convert(network, 2)


def test_too_many_blocks_are_refused():
    db.register(Net)(converter)
    with pytest.raises(ValueError, match="layers"):
        db.convert(Net(), blocks=5)
