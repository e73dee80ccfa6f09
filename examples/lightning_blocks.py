"""Train by blocks within Lightning: its Trainer, loggers, callbacks and checkpoints; resume if stopped.

python examples/lightning_blocks.py --steps 300     (pip install lightning)

The blocks' trainer is no torch module: Lightning neither moves nor saves what it holds. It brings one block at a time,
and saves to a folder beside Lightning's file. One device: several share blocks and data by db.Trainer(mesh=...) alone.
"""

import argparse
import math
import shutil
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn

import diffusionblocks as db


def spirals(count: int) -> torch.utils.data.TensorDataset:
    """Return points of three spiral arms, (count, 2), and their arms, (count,)."""
    arm, radius = torch.randint(3, (count,)), torch.rand(count)
    angle = 2 * math.pi * (arm / 3 + radius / 2)
    return torch.utils.data.TensorDataset(torch.stack([angle.cos(), angle.sin()], 1) * radius.unsqueeze(1), arm)


class Blocks(lightning.LightningModule):
    """Hands batches to the blocks' trainer."""

    def __init__(self, blocks: db.Trainer):
        super().__init__()
        self.automatic_optimization = False
        self.blocks = blocks

    def training_step(self, batch: list[torch.Tensor], index: int) -> None:
        output = self.blocks.step(*batch)
        self.optimizers().step()  # counts the step
        self.log(f"loss of block {output.block}", output.loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return an optimizer of nothing: Lightning counts steps by one."""
        return torch.optim.SGD([nn.Parameter(torch.zeros(0))], lr=0.0)


class BlocksIO(TorchCheckpointIO):
    """Saves, loads and removes the blocks with Lightning's own file."""

    def __init__(self, blocks: db.Trainer):
        super().__init__()
        self.blocks = blocks

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.blocks.save(f"{path}.blocks")
        super().save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.blocks.load(f"{path}.blocks")
        return super().load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        super().remove_checkpoint(path)
        shutil.rmtree(f"{path}.blocks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=Path, default=Path("lightning"))
    args = parser.parse_args()

    torch.manual_seed(0)
    layers = [
        nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(4)
    ]  # fmt: skip
    model = db.from_layers(layers, stem=nn.Linear(2, 32), head=nn.Linear(32, 3), target=db.LabelTarget(3, 16), blocks=2)
    blocks = db.Trainer(model, lr=3e-3, visit=10, device="cpu", offload="cpu")
    trainer = lightning.Trainer(
        max_steps=args.steps, accelerator="cpu", devices=1, logger=False, enable_model_summary=False,
        default_root_dir=args.folder, plugins=[BlocksIO(blocks)], enable_progress_bar=False,
        callbacks=[ModelCheckpoint(args.folder, save_last=True, save_top_k=0)],
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(spirals(2560), batch_size=128, shuffle=True)
    last = args.folder / "last.ckpt"
    trainer.fit(Blocks(blocks), loader, ckpt_path=last if last.exists() else None)

    x, y = spirals(1000).tensors
    accuracy = (model.eval()(x).argmax(-1) == y).float().mean()
    print(f"accuracy {accuracy:.1%} after {blocks.steps_done} steps")


if __name__ == "__main__":
    main()
