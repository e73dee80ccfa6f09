"""Networks made on the meta device get their memory a part at a time; of any depth they take one block's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deep
import diffusionblocks as db
import small
import warm
from diffusionblocks.offload.materialize import materialize


def model_on_meta(dim=8, layers=4, blocks=2):
    with torch.device("meta"):
        made = [deep.Layer(dim) for _ in range(layers)]
    return db.from_layers(
        made, stem=nn.Linear(6, dim), head=nn.Linear(dim, 3), target=db.LabelTarget(3, dim), blocks=blocks
    )


def test_parameters_stay_the_same_objects_and_get_their_modules_values():
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(200, 100), nn.BatchNorm1d(100), nn.MultiheadAttention(100, 2))
        module[0].twin = module[0].weight
    before = [id(p) for p in module.parameters()]
    module[0].weight.requires_grad_(False)
    torch.manual_seed(3)
    materialize(module)
    assert [id(p) for p in module.parameters()] == before and module[0].twin is module[0].weight
    assert not module[0].weight.requires_grad and module[0].bias.requires_grad
    assert module[0].weight.std() == pytest.approx((1 / 200 / 3) ** 0.5, rel=0.05)
    assert (module[1].running_var == 1).all() and module[1].num_batches_tracked == 0
    assert (module[2].out_proj.bias == 0).all(), "attention's own values come after its projection's"


def test_what_has_memory_is_left_alone():
    module = nn.Linear(3, 3)
    before = module.weight.clone()
    materialize(module)
    assert torch.equal(module.weight, before)


def test_a_module_that_cannot_say_its_values_is_refused_by_name():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, h):
            return h * self.scale

    with torch.device("meta"):
        layers = [Own(), Own()]
    model = db.from_layers(
        layers, stem=nn.Linear(6, 8), head=nn.Linear(8, 3), target=db.LabelTarget(3, 8), blocks=2, dim=8
    )
    with pytest.raises(ValueError, match=r"Own 'layers\.0\.layer' is on the meta device and has no reset_parameters"):
        db.Trainer(model, device="cpu")


@pytest.mark.parametrize("offload", [None, "cpu", "disk"])
def test_they_train_as_networks_made_in_memory_and_adaln_does_nothing_at_first(tmp_path, offload):
    model = model_on_meta()
    assert all(p.is_meta for p in model.blocks[0].layers[0].layer.parameters())
    torch.manual_seed(7)
    trainer = db.Trainer(model, device="cpu", offload=offload, folder=tmp_path, visit=2, precision="bfloat16")
    tensors = trainer.offloader.tensors("block_1")
    assert (tensors["weight/layers.0.linear.weight"] == 0).all(), "the modulation"
    assert tensors["weight/layers.0.layer.linear.weight"].float().std() > 0.1
    losses = [float(trainer.step(*small.batch(step=i)).loss) for i in range(40)]
    assert sum(losses[-8:]) < sum(losses[:8])
    trainer.offloader.release()
    assert not any(t.is_meta for t in model.state_dict().values())


def test_every_place_draws_the_same_first_values(tmp_path):
    found = []
    for offload in (None, "cpu", "disk"):
        torch.manual_seed(5)
        model = model_on_meta()
        found.append(small.everything(db.Trainer(model, device="cpu", offload=offload, folder=tmp_path)))
    assert all(torch.equal(t, other[name]) for other in found[1:] for name, t in found[0].items())


def peak_kib(*arguments):
    return int(warm.run(deep.__file__, *map(str, arguments), imports=warm.TRAINING).stdout)


def test_host_memory_is_that_of_one_block_whatever_the_depth():
    """Of 4 and 16 layers; held in memory, 12 more (with moments and averages, 4 MiB x 5 each) would add 240 MiB."""
    few, many = peak_kib(4, 512, 1), peak_kib(16, 512, 1)
    assert many < few + 100 * 1024
