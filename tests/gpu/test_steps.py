"""Training steps on a device give the CPU's losses, whatever the target, and bfloat16 gives nearly the same."""

from __future__ import annotations

import pytest
import torch

import dbkernels
import diffusionblocks as db
import small

CPU = torch.device("cpu")
STEPS = 12  # every block has its turn: visits are of three steps
every_kind = pytest.mark.parametrize("kind", small.KINDS)


def trainer(kind, device, **settings):
    settings = {"lr": 2e-3, "steps": 40, "warmup": 0.2, "visit": 3, "offload": "cpu", "ema": 0.9, **settings}
    model = small.model(kind, blocks=3, layers=3)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # drawn by torch's own generator, another on each device
    return db.Trainer(model, device=str(device), **settings)


def losses(made, kind):
    return [float(made.step(*small.batch(kind, step)).loss) for step in range(STEPS)]


@every_kind
def test_losses_are_the_cpus(kind, device):
    expected, made = losses(trainer(kind, CPU), kind), trainer(kind, device)
    found = losses(made, kind)
    # Sums in another order: some 1e-6 in the first losses. Adam divides by the root of its second moment, so that where
    # a gradient is nearly nothing its rounding moves a weight as far as any other's: 1e-4 after a dozen steps.
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found == pytest.approx(expected, rel=1e-3)
    active = made.offloader.active
    assert {t.device.type for t in made.offloader.tensors(f"block_{active}").values()} == {device.type}


@every_kind
def test_bfloat16_autocast_trains_to_nearly_the_same_losses(kind, device):
    plain, made = losses(trainer(kind, device), kind), trainer(kind, device, precision="bfloat16")
    products = []
    for block in made.model.blocks:
        for module in block.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda module, args, out: products.append(out.dtype))
    found = losses(made, kind)
    assert set(products) == {torch.bfloat16}, "autocast must reach the linear layers"
    made.check()
    # bfloat16 has 8 bits: 2^-9 a rounding, a few of them in every path from x to the loss
    assert found == pytest.approx(plain, rel=0.03)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "fused AdamW", "capturable AdamW"])
def test_torchs_optimizers_train_as_on_the_cpu(name, device):
    if name == "capturable AdamW" and device.type == "cpu":
        pytest.skip("for CUDA alone")
    settings = {"fused AdamW": {"fused": True}, "capturable AdamW": {"capturable": True}}.get(name, {})

    def make(params, **settings):
        return (
            torch.optim.SGD(params, 0.1, momentum=0.9) if name == "SGD" else torch.optim.AdamW(params, 2e-3, **settings)
        )

    def run(where, make):
        made = db.Trainer(small.model("images", blocks=3, layers=3).eval(), device=str(where), visit=3, offload="cpu",
                          optimizer=make)  # fmt: skip
        for module in made.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return losses(made, "images")

    expected = run(CPU, make)
    assert run(device, lambda params: make(params, **settings)) == pytest.approx(expected, rel=1e-3)


class Rows(list):
    def on_log(self, trainer, row):
        self.append(row)


def test_the_peak_is_the_trainings_own(device):
    torch.empty(2**28, dtype=torch.uint8, device=device)  # freed at once
    rows = Rows()
    made = trainer("images", device, log_every=2, callbacks=[rows])
    losses(made, "images")
    assert rows and all(sum(row["bytes"].values()) <= row["allocated"] < 2**28 for row in rows)
    assert made.memory().allocated >= made.memory().total


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_optimizer_moves_weights_moments_and_averages_as_on_the_cpu(device, ema):
    def trained(where):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(33, 17), torch.nn.LayerNorm(17), torch.nn.Linear(17, 5)).to(where)
        optimizer = db.BlockAdamW(network.parameters(), lr=1e-2, weight_decay=0.1, ema_decay=ema)
        generator, norms = torch.Generator().manual_seed(1), []
        for _ in range(8):
            for p in network.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(where)
            norms.append(dbkernels.total_norm([p.grad for p in network.parameters()]))
            optimizer.step(norm=norms[-1], max_norm=5.0)
        assert all(norm.device.type == where.type for norm in norms)
        state = {f"{i}/{key}": t for i, p in enumerate(network.parameters()) for key, t in optimizer.state[p].items()}
        return torch.stack(norms), {str(i): p.detach() for i, p in enumerate(network.parameters())} | state

    (norms, found), (expected_norms, expected) = trained(device), trained(CPU)
    # the gradients are the same bits, so nothing amplifies: float32 in another order of operations
    torch.testing.assert_close(norms.cpu(), expected_norms, rtol=1e-6, atol=0)
    assert found.keys() == expected.keys() and any(name.endswith("/ema") for name in found) == bool(ema)
    for name, t in found.items():
        torch.testing.assert_close(t.cpu(), expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_gradient_that_is_not_finite_changes_nothing(device):
    layer = torch.nn.Linear(5, 3).to(device)
    optimizer = db.BlockAdamW(layer.parameters(), lr=1e-2, ema_decay=0.9)
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    before = {key: t.clone() for key, t in optimizer.state[layer.weight].items()} | {"p": layer.weight.detach().clone()}
    layer.weight.grad = torch.full_like(layer.weight, torch.nan)
    optimizer.step(max_norm=1.0)
    after = optimizer.state[layer.weight] | {"p": layer.weight.detach()}
    assert all(torch.equal(t, before[key]) for key, t in after.items()) and optimizer.counts == [1, 0]
