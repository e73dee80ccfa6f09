"""Training steps on a device give the CPU's losses, whatever the architecture, and bfloat16 gives nearly the same."""

from __future__ import annotations

import pytest
import torch

import tiny_all
from diffusionblocks.experiments.session import train
from diffusionblocks.training.optimizer import PartOptimizer

CPU = torch.device("cpu")
STEPS = 12  # every block has its turn: visits are of three steps
every_architecture = pytest.mark.parametrize("name", tiny_all.CONFIGS)


def losses(name, tmp_path, device, **changes):
    session = tiny_all.session(tiny_all.config(name, tmp_path, steps=40, **changes), device)
    found = tiny_all.run(session, until=STEPS)
    assert len(found) == STEPS
    return found, session


@every_architecture
def test_losses_are_the_cpus(name, tmp_path, device):
    expected, _ = losses(name, tmp_path / "cpu", CPU)
    found, session = losses(name, tmp_path / "device", device)
    # Sums in another order: some 1e-6 in the first losses. Adam divides by the root of its second moment, so that where
    # a gradient is nearly nothing its rounding moves a weight as far as any other's: 1e-4 after a dozen steps.
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found == pytest.approx(expected, rel=1e-3)
    active = session.residency.active
    assert {t.device.type for t in session.residency.tensors(f"block_{active}").values()} == {device.type}


@every_architecture
def test_bfloat16_autocast_trains_to_nearly_the_same_losses(name, tmp_path, device):
    plain, _ = losses(name, tmp_path / "float32", device)
    session = tiny_all.session(tiny_all.config(name, tmp_path / "bf16", steps=40, precision="bfloat16"), device)
    norms, products = [], []
    session.watch = lambda step, block, loss, norm: norms.append(norm)
    hooks = [
        module.register_forward_hook(lambda module, args, out: products.append(out.dtype))
        for module in session.model.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    found = tiny_all.run(session, until=STEPS)
    for hook in hooks:
        hook.remove()
    assert torch.bfloat16 in products, "autocast must reach the linear layers"
    assert torch.stack(norms).isfinite().all()
    # bfloat16 has 8 bits: 2^-9 a rounding, a few of them in every path from x to the loss
    assert found == pytest.approx(plain, rel=0.03)


def test_the_peak_is_the_trainings_own(tmp_path, device):
    torch.empty(2**28, dtype=torch.uint8, device=device)  # freed at once
    session, rows = tiny_all.session(tiny_all.config("vit", tmp_path, steps=10), device), []
    batches = tiny_all.adapter(session.config).batches(device)
    train(session, batches, on_log=rows.append, on_step=lambda: None)
    assert all(sum(row["bytes"].values()) <= row["allocated"] < 2**28 for row in rows)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_optimizer_moves_weights_moments_and_averages_as_on_the_cpu(device, ema):
    def trained(where):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(33, 17), torch.nn.LayerNorm(17), torch.nn.Linear(17, 5)).to(where)
        optimizer = PartOptimizer(network.named_parameters(), weight_decay=0.1, ema_decay=ema)
        generator = torch.Generator().manual_seed(1)
        norms = []
        for _ in range(8):
            for p in network.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(where)
            norms.append(optimizer.step(1e-2))
        assert all(norm.device.type == where.type for norm in norms)
        weights = {name: p.detach() for name, p in network.named_parameters()}
        return torch.stack(norms), weights | optimizer.tensors()

    (norms, found), (expected_norms, expected) = trained(device), trained(CPU)
    # the gradients are the same bits, so nothing amplifies: float32 in another order of operations
    torch.testing.assert_close(norms.cpu(), expected_norms, rtol=1e-6, atol=0)
    assert found.keys() == expected.keys() and any(name.startswith("ema/") for name in found) == bool(ema)
    for name, t in found.items():
        torch.testing.assert_close(t.cpu(), expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_gradient_that_is_not_finite_changes_nothing(device):
    layer = torch.nn.Linear(5, 3).to(device)
    optimizer = PartOptimizer(layer.named_parameters(), ema_decay=0.9)
    before = {name: t.clone() for name, t in optimizer.tensors().items()} | {"weight": layer.weight.detach().clone()}
    layer.weight.grad = torch.full_like(layer.weight, torch.nan)
    norm = optimizer.step(1e-2)
    assert not norm.isfinite()
    after = optimizer.tensors() | {"weight": layer.weight.detach()}
    assert all(torch.equal(t, before[name]) for name, t in after.items())
