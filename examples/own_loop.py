"""Train blocks with your own loop, optimizers and learning rates: Offloader instead of Trainer.

python examples/own_loop.py --steps 300
"""

import argparse
import math
import tempfile

import torch
from torch import nn

import diffusionblocks as db

LR = 3e-3


def spirals(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return points of three spiral arms, (count, 2), and their arms, (count,)."""
    arm, radius = torch.randint(3, (count,)), torch.rand(count)
    angle = 2 * torch.pi * (arm / 3 + radius / 2)
    return torch.stack([angle.cos(), angle.sin()], 1) * radius.unsqueeze(1), arm


class Layer(nn.Module):
    """A residual MLP layer."""

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.mlp(h)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--visit", type=int, default=10, help="steps before the next block's turn")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    layers = [Layer(32) for _ in range(4)]
    target = db.LabelTarget(num_classes=3, dim=16)
    model = db.from_layers(layers, stem=nn.Linear(2, 32), head=nn.Linear(32, 3), target=target, blocks=2)
    optimizers = {
        name: torch.optim.AdamW([p for p in part.parameters() if p.requires_grad], lr=LR)
        for name, part in model.parts().items()
    }
    with tempfile.TemporaryDirectory() as folder:
        offloader = db.Offloader(model, optimizers, device=args.device, offload="disk", folder=folder)
        for step in range(args.steps):
            block = step // args.visit % len(model.blocks)
            x, y = (t.to(args.device) for t in spirals(128))
            model.loss(block, x, y).loss.backward()  # brings the block
            for part in ("shared", f"block_{block}"):
                for group in optimizers[part].param_groups:  # along a cosine, by the step of the whole training
                    group["lr"] = LR * (1 + math.cos(math.pi * step / args.steps)) / 2
                optimizers[part].step()
                optimizers[part].zero_grad(set_to_none=True)
        offloader.release()  # everything back in memory: an ordinary module

    x, y = spirals(1000)
    print(f"accuracy {(model.eval()(x).argmax(-1) == y).float().mean():.1%}")


if __name__ == "__main__":
    main()
