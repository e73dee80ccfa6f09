"""Only the active block is there: counted in bytes, and nothing is lost on the way."""

from __future__ import annotations

import copy
import errno
import gc
import os
import shutil

import pytest
import torch
from torch import nn

import diffusionblocks as db
import small
from diffusionblocks.checkpoint.layout import PAGE
from diffusionblocks.offload.memory import count_bytes

CPU = torch.device("cpu")
waiting = pytest.mark.parametrize("offload", ["cpu", "disk"])
OPTIMIZERS = {
    "BlockAdamW": None,
    "SGD": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9),
    "AdamW": lambda params: torch.optim.AdamW(params, 0.01, amsgrad=True),  # counts steps in a tensor on the host
    "Adagrad": lambda params: torch.optim.Adagrad(params, 0.01),  # has state before its first step
}


def bytes_of(tensors):
    """Return bytes of tensors; a waiting tensor's one element stands for all and isn't counted."""
    return sum(t.nbytes for t in tensors if t.numel() == 1 or any(t.stride()))


def weights_of(module):
    return [*module.parameters(), *module.buffers()]


def trained(tmp_path, offload="disk", *, kind="labels", optimizer=None, steps=6, precision="float32", **options):
    """Return a trainer of three blocks, each of which has had its turn."""
    model = small.model(kind, blocks=3, layers=3, **options)
    trainer = db.Trainer(
        model, device="cpu", visit=1, offload=offload, folder=tmp_path / "waiting", optimizer=optimizer, ema=0.9,
        precision=precision,
    )  # fmt: skip
    trainer.fit(small.Loader(kind), steps=steps, progress=False)
    return trainer


def scrambled(tmp_path, offload="disk", **options):
    """Return an offloader all of whose tensors hold numbers of their own, and a copy of them."""
    trainer = trained(tmp_path, offload, **options)
    for part in trainer.offloader.parts:
        tensors = trainer.offloader.tensors(part)
        floats = {name: torch.rand_like(t) if t.is_floating_point() else t for name, t in tensors.items()}
        trainer.offloader.load(part, floats)
    return trainer.offloader, small.everything(trainer)


def everything(offloader):
    tensors = {f"{part}/{name}": t for part in offloader.parts for name, t in offloader.tensors(part).items()}
    return {name: t.detach().clone() for name, t in tensors.items()}


def same(offloader, expected):
    found = everything(offloader)
    return found.keys() == expected.keys() and all(torch.equal(t, expected[name]) for name, t in found.items())


@pytest.mark.parametrize("shared", ["shared", "per_block", "frozen"])
def test_only_the_active_block_and_the_shared_part_hold_bytes(tmp_path, shared):
    trainer = trained(tmp_path, shared=shared)
    offloader, modules = trainer.offloader, trainer.model.parts()
    counts = {name: sum(p.numel() for p in weights_of(m)) for name, m in modules.items()}
    offloader.retire()
    assert all(bytes_of(weights_of(m)) == 0 for name, m in modules.items() if name != "shared")
    for block in (0, 2, 1):
        offloader.activate(block)
        held = {name: bytes_of(weights_of(m)) for name, m in modules.items()}
        assert [name for name, n in held.items() if n] == ["shared", f"block_{block}"]
        usage = offloader.usage().by_category
        assert usage["buffers"] < PAGE
        assert usage["weights"] == held["shared"] + held[f"block_{block}"]
        optimizers = [trainer.optimizers.get(name) for name in ("shared", f"block_{block}")]
        trained_ = [sum(p.numel() for p in o.params()) for o in optimizers if o]
        assert usage["moments"] == 8 * sum(trained_) + 8 * len(trained_), "two moments, and one counter per part"
        assert (usage["averages"], usage["gradients"]) == (4 * sum(trained_), 0)
    assert {name: sum(p.numel() for p in weights_of(m)) for name, m in modules.items()} == counts


def test_no_tensor_in_the_process_belongs_to_a_waiting_block(tmp_path):
    gc.collect()
    before = {id(o) for o in gc.get_objects() if isinstance(o, torch.Tensor)}
    trainer = trained(tmp_path, shared="per_block")
    gc.collect()
    made = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and id(o) not in before]
    usage = trainer.offloader.usage().total
    counted = count_bytes(made, CPU)
    one_block = bytes_of(weights_of(trainer.model.blocks[trainer.offloader.active]))
    assert usage <= counted < usage + one_block, "the state of a second block would add four times its weights"


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_optimizers_state_goes_with_its_block(tmp_path, name, precision):
    """Training ends with the same bits wherever blocks wait, and on disk nothing of them stays behind."""
    results = []
    for offload in (None, "cpu", "disk"):
        trainer = trained(tmp_path, offload, optimizer=OPTIMIZERS[name], steps=9, precision=precision)
        results.append(small.everything(trainer))
    assert all(torch.equal(t, other[key]) for other in results[1:] for key, t in results[0].items())
    if precision == "bfloat16" and name == "BlockAdamW":
        assert any("/master/" in key for key in results[0])
    for part, optimizer in trainer.optimizers.items():
        here = part in ("shared", f"block_{trainer.offloader.active}")
        state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, torch.Tensor)]
        assert any(t.untyped_storage().nbytes() > 8 for t in state) == here, part


@waiting
def test_a_block_comes_back_bit_for_bit(tmp_path, offload):
    offloader, expected = scrambled(tmp_path, offload)
    for block in (1, 0, 2, 1):
        offloader.activate(block)
        assert offloader.active == block and same(offloader, expected)
    offloader.retire()
    assert offloader.active is None and same(offloader, expected)


@waiting
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_averages_swap_in_and_out(tmp_path, offload, precision):
    offloader, expected = scrambled(tmp_path, offload, precision=precision)
    names = {key for key in expected if "/ema/" in key}
    assert names
    with offloader.averages():
        for block in (1, 0, 1):
            offloader.activate(block)
            part = f"block_{block}"
            for name, p in offloader.parts[part].module.named_parameters():
                if f"{part}/ema/{name}" in names:
                    assert torch.equal(p, expected[f"{part}/ema/{name}"])
        outer = offloader.weights()
        with offloader.averages():  # changes nothing
            inner = offloader.weights()
        assert all(torch.equal(t, inner[name]) for name, t in outer.items())
        for part in ("block_0", "block_1", "block_2"):  # those that wait, too
            own = {key.removeprefix(f"{part}/ema/") for key in names if key.startswith(f"{part}/")}
            prefix = f"blocks.{part[-1]}."
            assert own and all(torch.equal(outer[prefix + name], expected[f"{part}/ema/{name}"]) for name in own)
        assert not same(offloader, expected)
    assert same(offloader, expected)
    plain = offloader.weights()
    assert all(torch.equal(plain[f"blocks.1.{key[15:]}"], t) for key, t in expected.items() if "block_1/weight" in key)


def test_an_error_within_averages_puts_the_weights_back(tmp_path):
    offloader, expected = scrambled(tmp_path)
    with pytest.raises(KeyError), offloader.averages():
        offloader.activate(2)
        raise KeyError
    assert same(offloader, expected)


@waiting
def test_the_model_brings_its_blocks_by_itself(tmp_path, offload):
    model = small.model(blocks=3, layers=3).eval()
    expected = [float(model.loss(b, *small.batch(), seed=0, step=0).loss.detach()) for b in range(3)]
    offloader = db.Offloader(model, device="cpu", offload=offload, folder=tmp_path)
    for block in (2, 0, 1):
        found = model.loss(block, *small.batch(), seed=0, step=0).loss
        assert float(found.detach()) == expected[block] and offloader.active == block


@waiting
def test_waiting_weights_have_shapes_but_no_values(tmp_path, offload):
    """They read as NaN; a storage of no bytes would crash the process."""
    trainer = trained(tmp_path, offload)
    trainer.model.activate(0)
    layer = trainer.model.blocks[2].layers[0].layer.linear
    assert layer.weight.shape == (8, 8) and layer.weight.numel() == 64
    state = trainer.optimizers["block_2"].state[layer.weight]
    for t in (layer.weight, layer.bias, state["exp_avg"], state["ema"]):
        assert t.isnan().all() and t.untyped_storage().nbytes() == 4
    assert layer(torch.ones(2, 8)).isnan().all() and "nan" in repr(layer.weight)
    with pytest.raises(RuntimeError, match="single memory location"):
        layer.weight.data.add_(1)
    with pytest.raises(RuntimeError, match="single memory location"):
        layer.weight.data.copy_(torch.ones(8, 8))
    trainer.model.activate(2)
    assert layer.weight.isfinite().all()


@waiting
def test_release_leaves_an_ordinary_module(tmp_path, offload):
    offloader, expected = scrambled(tmp_path, offload)
    model = offloader.model
    offloader.activate(1)
    offloader.release()
    assert model.offloader is None and offloader.active is None
    found = {f"{part}/{name}": t for part in offloader.parts for name, t in offloader.parts[part].tensors().items()}
    assert found.keys() == expected.keys() and all(torch.equal(t, expected[name]) for name, t in found.items())
    twin = copy.deepcopy(model).to(torch.float64)
    twin.load_state_dict(model.state_dict())
    assert twin(small.batch()[0].double()).isfinite().all()
    db.Offloader(model, device="cpu", offload=offload, folder=tmp_path)  # may be managed again


def test_release_within_averages_is_of_the_weights(tmp_path):
    offloader, expected = scrambled(tmp_path)
    with offloader.averages():
        pass
    offloader.release()
    weight = offloader.model.blocks[1].layers[0].layer.linear.weight
    assert torch.equal(weight, expected["block_1/weight/layers.0.layer.linear.weight"])


def test_errors_name_the_argument(tmp_path):
    model = small.model(blocks=3, layers=3)
    sgd = torch.optim.SGD(model.blocks[0].parameters(), 0.1)
    for wrong, found in ((sgd, "SGD"), ({"block0": sgd}, "block0")):
        with pytest.raises(ValueError, match=f"optimizers must be a dict by part, of shared, block_0, .*got {found}"):
            db.Offloader(model, wrong, device="cpu", offload=None)
    with pytest.raises(ValueError, match="offload must be None, 'cpu' or 'disk', got 'cloud'"):
        db.Offloader(model, device="cpu", offload="cloud")
    with pytest.raises(ValueError, match="needs a folder"):
        db.Offloader(model, device="cpu", offload="disk")
    offloader = db.Offloader(model, device="cpu", offload="disk", folder=tmp_path)
    with pytest.raises(ValueError, match="managed already"):
        db.Offloader(model, device="cpu")
    with pytest.raises(ValueError, match="managed already"):
        db.Trainer(model, device="cpu")
    for call in (offloader.activate, offloader.prefetch):
        with pytest.raises(ValueError, match="no block 7"):
            call(7)
    tensors = offloader.tensors("block_0")
    weight = next(iter(tensors))
    for wrong in ({**tensors, "weight/other": torch.zeros(1)}, {**tensors, weight: torch.zeros(3, 3, 3)},
                  {name: t for name, t in tensors.items() if name != weight}):  # fmt: skip
        with pytest.raises(ValueError, match="do not fit the model"):
            offloader.load("block_0", wrong)


def test_everything_on_the_device_is_managed_too(tmp_path):
    model = small.model(blocks=3, layers=3)
    offloader = db.Offloader(model, device="cpu", offload=None)
    expected = everything(offloader)
    offloader.activate(2)
    assert offloader.active == 2 and same(offloader, expected)
    assert offloader.usage().by_category["weights"] == count_bytes(weights_of(model), CPU)
    with pytest.raises(RuntimeError, match="managed"):
        nn.Sequential(model).to(torch.float64)


def test_another_models_files_are_not_taken_for_ones_own(tmp_path):
    offloader, _ = scrambled(tmp_path)
    offloader.retire()
    db.Offloader(small.model(blocks=3, layers=3, seed=7), device="cpu", offload="disk", folder=offloader.folder)
    for call in (lambda: offloader.activate(1), lambda: offloader.tensors("block_1"), offloader.release):
        with pytest.raises(RuntimeError, match="another Offloader has written"):
            call()


def test_a_folder_that_was_removed_is_named(tmp_path):
    offloader, _ = scrambled(tmp_path)
    shutil.rmtree(offloader.folder)
    with pytest.raises(RuntimeError, match=r"waiting was removed, .* go on from a checkpoint"):
        offloader.activate((offloader.active + 1) % 3)


def test_a_full_disk_costs_no_weights(tmp_path, monkeypatch):
    model, write, calls = small.model(blocks=3, layers=3), os.pwrite, []

    def full(*args):
        calls.append(args)
        if len(calls) in (3, 11):  # in the second block's file; when the first block leaves
            raise OSError(errno.ENOSPC, "no space left on device")
        return write(*args)

    monkeypatch.setattr(os, "pwrite", full)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(OSError, match="no space"):
        db.Offloader(model, device="cpu", offload="disk", folder=tmp_path)
    assert model.offloader is None and all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    trainer = db.Trainer(model, device="cpu", offload="disk", folder=tmp_path)
    trainer.step(*small.batch())
    before, active = small.everything(trainer), trainer.offloader.active
    with pytest.raises(OSError, match=r"no space.*block_.*tmp"), trainer.averages():
        trainer.model.activate((active + 1) % 3)
    assert trainer.offloader.active == active, "it couldn't leave"
    after = small.everything(trainer)
    assert all(torch.equal(t, before[name]) for name, t in after.items())
    assert not list(tmp_path.glob("*.tmp"))
    trainer.step(*small.batch())  # with space again, it goes on
