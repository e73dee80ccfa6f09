"""A trained model read where it stands, a block at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks import DiffusionBlocks
from ..targets.base import Output
from ..training.offload import Residency, handed

BATCH = 512


class Walker:
    """Denoises whole splits, one resident block at a time. Weights are used as they are: enter `residency.averages()`
    for averages.

    residency: where the blocks wait; None for a model that is wholly on its device. prefetch: while a block works,
    bring the next one, which falling levels will want: no wait, for the memory of a second block.
    """

    def __init__(self, model: DiffusionBlocks, residency: Residency | None = None, *, prefetch: bool = False):
        self.model, self.residency, self.prefetch = model, residency, prefetch

    @property
    def device(self) -> torch.device:
        """Where the active block is."""
        return self.residency.device if self.residency else next(self.model.parameters()).device

    def weights(self) -> dict[str, Tensor]:
        """The weights in use, all blocks', by the names of the model's state_dict."""
        return self.residency.weights() if self.residency else self.model.state_dict()

    def owner(self, sigma: float) -> int:
        """The block that owns `sigma`, on the device from now on."""
        block = int(self.model.partition.block_of(sigma))
        self.activate(block)
        return block

    def activate(self, block: int) -> None:
        """Bring `block` to the device."""
        if self.residency:
            self.residency.activate(block)
            if self.prefetch and block + 1 < len(self.model.blocks):
                self.residency.prefetch(block + 1)

    def handed(self, block: int, x: Tensor) -> Tensor | None:
        """What other blocks hand `block`."""
        return handed(self.model, self.residency, block, x) if self.residency else self.model.handed(block, x)

    @torch.no_grad()
    def read(self, x: Tensor, z: Tensor, sigma: float, batch: int = BATCH) -> Output:
        """The owner's output for all of x, `batch` samples at a time."""
        block = self.owner(sigma)
        pieces = [
            self.model.denoise(x_, z_, sigma, block=block, handed=self.handed(block, x_))
            for x_, z_ in zip(x.split(batch), z.split(batch), strict=True)
        ]
        return Output(torch.cat([p.raw for p in pieces]), torch.cat([p.denoised for p in pieces]))
