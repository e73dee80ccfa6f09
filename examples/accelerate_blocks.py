"""Train by blocks within Hugging Face Accelerate: its data loader, tracking and checkpoints; resume if stopped.

python examples/accelerate_blocks.py --steps 300     (pip install accelerate)

`prepare` gets the loader alone: it would move a model to the device as a whole, and optimizers are the Trainer's, which
brings one block at a time.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from torch import nn

import diffusionblocks as db


def spirals(count: int) -> torch.utils.data.TensorDataset:
    """Return points of three spiral arms, (count, 2), and their arms, (count,)."""
    arm, radius = torch.randint(3, (count,)), torch.rand(count)
    angle = 2 * math.pi * (arm / 3 + radius / 2)
    return torch.utils.data.TensorDataset(torch.stack([angle.cos(), angle.sin()], 1) * radius.unsqueeze(1), arm)


class Best:
    """The lowest loss of an epoch: a state of one's own, which Accelerate saves and loads."""

    def __init__(self) -> None:
        self.loss = math.inf

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self.loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss = state["loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=Path, default=Path("accelerate"))
    args = parser.parse_args()

    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    if accelerator.num_processes > 1:
        raise SystemExit("one process: several share blocks and data by Trainer(mesh=...), see docs/guides/machines.md")
    loader = accelerator.prepare(torch.utils.data.DataLoader(spirals(2560), batch_size=128, shuffle=True))
    layers = [
        nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(4)
    ]  # fmt: skip
    model = db.from_layers(layers, stem=nn.Linear(2, 32), head=nn.Linear(32, 3), target=db.LabelTarget(3, 16), blocks=2)
    trainer = db.Trainer(model, lr=3e-3, visit=10, device=str(accelerator.device), offload="cpu")
    best = Best()
    accelerator.register_for_checkpointing(best)
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: trainer.save(Path(folder) / "blocks"))
    accelerator.register_load_state_pre_hook(lambda models, folder: trainer.load(Path(folder) / "blocks"))
    if (args.folder / "blocks").exists():
        accelerator.load_state(str(args.folder))

    while trainer.steps_done < args.steps:
        epoch, done = divmod(trainer.batches_done, len(loader))
        loader.set_epoch(epoch)
        losses = []
        for x, y in skip_first_batches(loader, done):
            losses.append(trainer.step(x, y).loss)  # no accelerator.backward, no optimizer.step
            if trainer.steps_done == args.steps:
                break
        best.loss = min(best.loss, float(torch.stack(losses).mean()))
        accelerator.save_state(str(args.folder))

    x, y = spirals(1000).tensors
    accuracy = (model.eval()(x).argmax(-1) == y).float().mean()
    print(f"accuracy {accuracy:.1%} after {trainer.steps_done} steps, best loss {best.loss:.3f}")


if __name__ == "__main__":
    main()
