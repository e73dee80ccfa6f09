"""A trained model as the denoiser of given conditioning: whole splits, one resident block at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks import DiffusionBlocks
from ..targets.base import Output

BATCH = 512


class Sampler:
    """Denoises z given x: what samplers and evaluation call at falling noise levels.

    Weights are used as they are: enter `trainer.averages()` for averages. A block whose layers don't see z is run once.

    Args:
        model: The model; offloaded blocks come by themselves.
        x: Conditioning, (N, ...), the same for every level.
        batch: Samples per call of the network.
        prefetch: While a block works, bring the next one, where the model's Offloader has two slots.
    """

    def __init__(self, model: DiffusionBlocks, x: Tensor, *, batch: int = BATCH, prefetch: bool = False):
        self.model, self.x, self.batch, self.prefetch = model.eval(), x, batch, prefetch
        self._asked: tuple[int, Tensor] | None = None  # the last block that doesn't see z, and its logits of x

    @torch.no_grad()
    def __call__(self, z: Tensor, sigma: float) -> Output:
        """Return the raw output and D of the block that owns `sigma`, for all of z."""
        block = self.model.partition.owner(sigma)
        self.model.activate(block)
        if self.prefetch and self.model.offloader and block + 1 < len(self.model.blocks):
            self.model.offloader.prefetch(block + 1)
        if not self.model.sees_z:
            return self.model.target.posterior(self._logits(block), z, self._levels(z, sigma))
        pieces = [
            self.model.denoise(x, z_, sigma, block=block)
            for x, z_ in zip(self.x.split(self.batch), z.split(self.batch), strict=True)
        ]
        return Output(torch.cat([p.raw for p in pieces]), torch.cat([p.denoised for p in pieces]))

    def _logits(self, block: int) -> Tensor:
        """Return the logits of x alone: the block's, or the mean over all of an ensemble."""
        key = -1 if self.model.ensemble else block
        if self._asked is None or self._asked[0] != key:
            asked = None if self.model.ensemble else block
            self._asked = key, torch.cat([self.model.logits(x, asked) for x in self.x.split(self.batch)])
        return self._asked[1]

    def _levels(self, z: Tensor, sigma: float) -> Tensor:
        return torch.full(self.model.target.level_shape(z), sigma, dtype=torch.float32, device=z.device)
