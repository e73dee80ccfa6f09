"""Train a network of a given depth on disk, made on the meta device; print peak memory. A process of its own."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import diffusionblocks as db


class Layer(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(dim), nn.Linear(dim, dim)

    def forward(self, h):
        return h + self.linear(self.norm(h))


def main(depth, dim, slots):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.device("meta"):
        layers = [Layer(dim) for _ in range(depth)]
    target = db.LabelTarget(num_classes=3, dim=16)
    model = db.from_layers(layers, stem=nn.Linear(6, dim), head=nn.Linear(dim, 3), target=target, blocks=depth // 2)
    with tempfile.TemporaryDirectory() as folder:
        trainer = db.Trainer(model, device="cpu", offload="disk", folder=folder, visit=1, slots=slots)
        x, y = torch.randn(16, 6), torch.randint(3, (16,))
        for _ in range(depth // 2 + 2):
            assert trainer.step(x, y).loss.isfinite()
    status = Path("/proc/self/status").read_text()
    print(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
