"""Train each block as a Ray task of its own, wherever Ray finds room; the tasks exchange nothing.

python examples/ray_blocks.py --steps 300      (pip install ray)

A task that dies is started again by Ray and goes on from its last checkpoint. On a cluster `--folder` must be a folder
that all machines see.
"""

import argparse
import math
import tempfile
from pathlib import Path

import ray
import torch
from torch import nn

import diffusionblocks as db

BLOCKS, EVERY = 3, 100  # steps between checkpoints


def spirals(number: int, count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Return batch `number`: points of three spiral arms, (count, 2), and their arms, (count,)."""
    generator = torch.Generator().manual_seed(number)
    arm, radius = torch.randint(3, (count,), generator=generator), torch.rand(count, generator=generator)
    angle = 2 * math.pi * (arm / 3 + radius / 2)
    return torch.stack([angle.cos(), angle.sin()], 1) * radius.unsqueeze(1), arm


def make_trainer(steps: int, train_blocks: tuple[int, ...] | None = None) -> db.Trainer:
    """Return a trainer of all blocks or of some: the same code and seed in every task."""
    torch.manual_seed(0)
    layers = [
        nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2 * BLOCKS)
    ]
    model = db.from_layers(
        layers, stem=nn.Linear(2, 32), head=nn.Linear(32, 3), target=db.LabelTarget(3, 32), blocks=BLOCKS,
        shared="per_block",
    )  # fmt: skip
    return db.Trainer(model, train_blocks=train_blocks, adapt=False, lr=3e-3, steps=steps, visit=10, device="cpu")


@ray.remote(max_retries=3)
def train(block: int, steps: int, folder: Path) -> Path:
    """Train one block to the end, from its last checkpoint on; return its folder."""
    torch.set_num_threads(1)
    trainer = make_trainer(steps, (block,))
    if folder.exists():
        trainer.load(folder)
    while trainer.steps_done < steps:
        until = min(steps, trainer.steps_done + EVERY)
        trainer.fit(range(trainer.batches_done, until), batch=spirals, steps=until, progress=False)
        trainer.save(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="of all blocks together")
    parser.add_argument("--folder", type=Path, default=None, help="a folder that all machines see")
    arguments = parser.parse_args()
    folder = (arguments.folder or Path(tempfile.mkdtemp())).absolute()  # tasks run in other folders
    ray.init(log_to_driver=False)
    parts = ray.get([train.remote(block, arguments.steps, folder / f"block{block}") for block in range(BLOCKS)])
    ray.shutdown()
    db.merge(parts, folder / "whole")
    trainer = make_trainer(arguments.steps)
    trainer.load(folder / "whole")
    x, arm = spirals(-1, 2000)
    accuracy = (trainer.model.eval()(x).argmax(-1) == arm).float().mean()
    print(f"{BLOCKS} blocks, trained apart: accuracy {100 * accuracy:.0f}%, in {folder / 'whole'}")


if __name__ == "__main__":
    main()
