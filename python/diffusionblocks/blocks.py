"""A network cut into blocks, each a denoiser for its own range of noise."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import dbkernels

from .checks import check_levels, check_parts, check_ties
from .denoiser import Block, BlockLoss, StemHead
from .noise.density import NoiseDensity
from .noise.partition import Partition, make_partition, step_levels
from .noise.rng import stream
from .offloadable import Offloadable
from .targets.base import Noised, Output, Target

SHARING = ("shared", "per_block", "frozen")
STEPS = 8  # of the sampling trajectory, if not said


class DiffusionBlocks(Offloadable):
    """B denoisers made of one network's layers. `from_layers` and `convert` build one.

    Args:
        around: One StemHead for all blocks, or B of them (shared="per_block").
        layers: All layers, layer(h, cond) -> h, in order.
        target: The target y, e.g. a LabelTarget.
        partition: Each block's range of noise and number of layers.
        shared: "shared": one stem and head, trained by whichever block is active; "per_block": each its own;
            "frozen": one, never trained.
        context: Share of each training batch drawn at sigma_max, where the answer must come from x alone.
        ensemble: Decode with the mean of all blocks' logits of x; blocks are trained alone and must not look at z.

    Raises: ValueError if counts or options don't fit, or a weight is shared by blocks that train it apart.
    Source: arXiv 2506.14202.
    """

    def __init__(
        self,
        around: StemHead | Sequence[StemHead],
        layers: Sequence[nn.Module],
        target: Target,
        partition: Partition,
        *,
        shared: str = "shared",
        context: float = 0.0,
        ensemble: bool = False,
    ):
        super().__init__()
        if shared not in SHARING:
            raise ValueError(f"shared must be one of {', '.join(SHARING)}, got {shared!r}")
        copies = [around] if isinstance(around, StemHead) else list(around)
        check_parts(copies, layers, target, partition, shared)
        if not 0 <= context <= 1:
            raise ValueError(f"context must be a share in [0, 1], got {context}")
        own = shared == "per_block"
        self.shared, self.context, self.partition, self.ensemble = shared, context, partition, ensemble
        self.stem_head = None if own else copies[0]
        self.target = target
        remaining = iter(layers)
        self.blocks = nn.ModuleList(
            Block([next(remaining) for _ in range(count)], copies[b] if own else None)
            for b, count in enumerate(partition.layers)
        )
        if shared == "frozen" and self.stem_head is not None:
            self.stem_head.requires_grad_(False)
        check_ties(self.parts())

    @property
    def sees_z(self) -> bool:
        """Whether the layers see z; if not, a block's logits of x are the same at every noise level."""
        return bool(getattr(self.blocks[0].around(self.stem_head).stem, "sees_z", True))

    def parts(self) -> dict[str, nn.Module]:
        """Return what is trained, moved and saved as one: "shared" (target, stem, head), "block_0", "block_1", ..."""
        shared = nn.ModuleDict({"target": self.target})
        if self.stem_head is not None:
            shared["stem_head"] = self.stem_head
        return {"shared": shared, **{f"block_{b}": block for b, block in enumerate(self.blocks)}}

    def repartition(self, density: NoiseDensity) -> None:
        """Cut the noise anew, to equal mass under `density`; layers and overlap stay."""
        self.partition = make_partition(density, self.partition.layers, overlap=self.partition.overlap)

    def draw_sigma(
        self, block: int | None, shape: tuple[int, ...], *, seed: int, step: int, device: torch.device
    ) -> Tensor:
        """Return training noise levels of a block, float32, the same for one (seed, block, step) on every device.

        block: None draws from the range of all blocks.
        """
        key = stream(seed, "sigma", 0 if block is None else block)
        u = dbkernels.philox_uniform(shape, seed=key, offset=step, device=device)
        if self.target.stratified:
            parts = torch.arange(u.numel(), device=device).view(shape) / u.numel()
            u = (u.flatten()[0] + parts) % 1
        sigma = self.partition.draw_any(u) if block is None else self.partition.draw(block, u)
        return self.give_context(sigma, seed=seed, step=step)

    def give_context(self, sigma: Tensor, *, seed: int, step: int) -> Tensor:
        """Set the first `context` share of noise levels to sigma_max, in place.

        Of a batch that the share doesn't divide one more or not, by chance: small batches get their share on average.
        """
        share = round(self.context * sigma.numel(), 9)
        sigma.view(-1)[: int(share)] = self.partition.sigma_max
        if share % 1:
            key = stream(seed, "context")
            more = dbkernels.philox_uniform((), seed=key, offset=step, device=sigma.device) < share % 1
            last = sigma.view(-1)[int(share)]
            last.copy_(torch.where(more, self.partition.sigma_max, last))
        return sigma

    def loss(
        self,
        block: int,
        x: Tensor,
        y: Tensor,
        *,
        sigma: Tensor | None = None,
        seed: int | None = None,
        step: int | None = None,
        weight: float = 1.0,
        error: bool = False,
    ) -> BlockLoss:
        """Return the denoising loss of one block; the other blocks aren't touched.

        Args:
            block: The block to train; brought to the device if it is elsewhere.
            x: Conditioning, (B, ...).
            y: Targets, (B, ...): labels or a tensor, as the target takes them.
            sigma: Noise levels, of the target's level_shape; drawn from the block's range by default.
            seed, step: Address of the noise: one pair gives one noise on every device. By default the model's own
                `seed`, and its counter `step`, which then moves on.
            weight: Factor of the loss to backpropagate, at no cost: 1 / (micro-batches that are accumulated).
            error: Also return |y - D|^2.

        Raises:
            ValueError: on a wrong shape, dtype, device, label, noise level or block; labels and levels on a GPU aren't
                read, since that would wait for it.
        """
        self.activate(block)
        self.check(block, x, y)
        seed = self.seed if seed is None else seed
        if step is None:
            step, self.step = self.step, self.step + 1
        if sigma is None:
            sigma = self.draw_sigma(block, self.target.level_shape(y), seed=seed, step=step, device=x.device)
        else:
            check_levels(sigma, y, self.target.level_shape(y))
        return self.loss_at(block, x, y, sigma, seed=seed, step=step, weight=weight, error=error)

    def loss_at(
        self,
        block: int,
        x: Tensor,
        y: Tensor,
        sigma: Tensor,
        *,
        seed: int,
        step: int | Tensor,
        weight: float = 1.0,
        error: bool = False,
        rows: slice | None = None,
        key: Tensor | None = None,
    ) -> BlockLoss:
        """Return `loss` at given noise levels, without its checks.

        rows: Take these samples alone, with the noise that they have in the whole batch.
        key, step: The noise's stream (by default that of `seed` and `block`) and its offset, as 0-dim int64 tensors
            on the device: a CUDA graph reads them anew.
        """
        if self.target.shape is None:
            self.target.shape = self.target.sample_shape(y)
        noise = stream(seed, "eps", block) if key is None else key
        noised = self.target.add_noise(y, sigma, seed=noise, offset=step)
        if rows is not None:
            x, y, sigma, noised = x[rows], y[rows], sigma[rows], Noised(*(t[rows] for t in noised))
        features = self.blocks[block](x, noised.scaled, noised.c_noise, self.stem_head)
        per_sample, wrong = self.target.loss(features, noised, y, sigma, weight=weight, error=error)
        unweighted = per_sample.detach() if weight == 1 else per_sample.detach() / weight
        return BlockLoss(per_sample.mean(), sigma, unweighted, wrong)

    @torch._disable_dynamo(recursive=False)
    @torch.no_grad()
    def denoise(self, x: Tensor, z: Tensor, sigma: float, *, block: int | None = None) -> Output:
        """Return the raw output and the denoised estimate D of the block that owns `sigma` (or of `block`).

        Raises: ValueError if sigma is not positive, or shapes, devices or the block don't fit.
        """
        if not 0 < sigma < float("inf"):
            raise ValueError(f"sigma must be positive and finite, got {sigma}")
        block = self.partition.owner(sigma) if block is None else block
        with self.at_work(block):
            self.target.check_noised(z)
            self._check_input(block, x, z, "z")
            levels = torch.full(self.target.level_shape(z), sigma, dtype=torch.float32, device=z.device)
            if not self.ensemble or self.training:
                features = self.blocks[block](x, *self.target.inputs(z, levels), self.stem_head)
                return self.target.read(features, z, levels)
        return self.target.posterior(self.logits(x), z, levels)

    @torch._disable_dynamo(recursive=False)
    @torch.no_grad()
    def logits(self, x: Tensor, block: int | None = None) -> Tensor:
        """Return the logits from x alone, float32: of a block, or by default the mean over all blocks."""
        if block is not None:
            with self.at_work(block):
                return self.blocks[block].logits(x, self.stem_head)
        others = (self.logits(x, b) for b in range(1, len(self.blocks)))
        return sum(others, self.logits(x, 0)) / len(self.blocks)

    @torch._disable_dynamo(recursive=False)
    @torch.no_grad()
    def forward(self, x: Tensor, *, steps: int = STEPS, seed: int = 0) -> Tensor:
        """Return the answer at the end of the sampling trajectory, with averaged weights where there are any.

        From the highest noise to none, each level by its owner, without gradient: logits of classes and tokens, else y
        itself, of one draw. `sample` gives y of all of them, and offers samplers and guidance.

        Args:
            x: Conditioning, (B, ...).
            steps: Steps of the trajectory; at least one per block is taken.
            seed: Of what is drawn on the way, if the target draws.
        """
        with self.averages():
            levels = step_levels(self.partition, max(steps, self.partition.blocks))
            z = self.start(x, levels[0], seed=seed)
            for i, (sigma, below) in enumerate(itertools.pairwise(levels)):
                output = self.denoise(x, z, sigma)
                z = self.target.advance(z, output, sigma, below, seed=seed, step=i)
        return self.target.answer(output)

    def start(self, x: Tensor, sigma: float, *, seed: int) -> Tensor:
        """Return z at the highest noise for each of x, whose length is z's where y holds a token for each of x's."""
        stem = self.blocks[0].around(self.stem_head).stem
        if getattr(stem, "aligned", False):
            self.activate(0)
            like = stem.places(x) if hasattr(stem, "places") else x
            self.target.shape = self.target.sample_shape(like) if like.dim() < 4 else self.target.shape
        return self.target.start(len(x), sigma, seed=stream(seed, "sample"), device=x.device)

    def check(self, block: int, x: Tensor, y: Tensor) -> None:
        """Raise ValueError unless (x, y) is a batch that `block` can be trained on, where its weights are."""
        self.partition.check_block(block)
        self.target.check(y)
        self._check_input(block, x, y, "y")

    def _check_input(self, block: int, x: Tensor, y: Tensor, name: str) -> None:
        if x.dim() == 0 or len(x) != len(y):
            raise ValueError(f"x and {name} must have the same batch size, got {tuple(x.shape)} and {tuple(y.shape)}")
        device = next((p.device for p in self.blocks[block].parameters()), self.device)
        if not device == x.device == y.device:
            raise ValueError(
                f"block {block} is on {device}, x on {x.device}, {name} on {y.device}: move the batch there"
            )
        check_x = getattr(self.blocks[block].around(self.stem_head).stem, "check", None)
        if check_x is not None:
            check_x(x)
