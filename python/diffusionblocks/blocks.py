"""A network cut into blocks, each a denoiser for its own range of noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import dbkernels

from .denoiser import Block, Ends, mean_with
from .noise import edm
from .noise.density import NoiseDensity
from .noise.partition import Partition, make_partition
from .noise.rng import stream
from .targets.base import Output, Target
from .targets.devices import on_host

SHARING = ("shared", "per_block", "frozen")


class BlockLoss(NamedTuple):
    """One block's loss on one batch, and what it was made of.

    loss: 0-dim, to backpropagate, times the weight asked for. sigma: noise drawn, (B,) or as the target's level_shape
    says. per_sample: unweighted loss, of sigma's shape or the mean; error: |y - D|^2, of sigma's shape; both without
    gradient.
    """

    loss: Tensor
    sigma: Tensor
    per_sample: Tensor
    error: Tensor


class DiffusionBlocks(nn.Module):
    """B denoisers made of one network's layers.

    ends: one Ends for all blocks, or B of them (shared="per_block"). layers: all layers, layer(h, cond) -> h, in order.
    target: a ClassTarget or ContinuousTarget. partition: who owns which noise and which layers.
    shared: "shared" (one copy of the ends, trained by whichever block is active), "per_block" (each its own),
    "frozen" (one copy, never trained). context: share of each training batch drawn at sigma_max, where the answer must
    come from x alone. weighting: "none", or "batch_mean", the published mean(loss) * mean(weight). carries: for every
    block but the first, how what the blocks before made of x enters it, without gradient. ensemble: when evaluated, a
    block says the mean of all blocks' logits; they are trained alone, and must not look at z. For both the stem has
    clean(x).
    Raises: ValueError if the counts or options don't fit, or a trainable codebook meets independent blocks.
    Source: arXiv 2506.14202.
    """

    def __init__(
        self,
        ends: Ends | Sequence[Ends],
        layers: Sequence[nn.Module],
        target: Target,
        partition: Partition,
        *,
        shared: str = "shared",
        context: float = 0.0,
        weighting: str = "none",
        carries: Sequence[nn.Module] = (),
        ensemble: bool = False,
    ):
        super().__init__()
        copies = [ends] if isinstance(ends, Ends) else list(ends)
        _check_parts(copies, layers, target, partition, shared)
        if weighting not in ("none", "batch_mean"):
            raise ValueError(f"weighting must be 'none' or 'batch_mean', got {weighting!r}")
        if not 0 <= context <= 1:
            raise ValueError(f"context must be a share in [0, 1], got {context}")
        if ensemble and carries:
            raise ValueError("ensemble is of blocks that were trained alone, carries ties them together: choose one")
        own = shared == "per_block"
        self.shared, self.context, self.weighting, self.partition = shared, context, weighting, partition
        self.carried, self.ensemble = bool(carries), ensemble
        self.ends = None if own else copies[0]
        self.target = target
        remaining = iter(layers)
        self.blocks = nn.ModuleList(
            Block([next(remaining) for _ in range(count)], copies[b] if own else None, carry)
            for b, (count, carry) in enumerate(zip(partition.layers, _entries(carries, partition), strict=True))
        )
        if shared == "frozen" and self.ends is not None:
            self.ends.requires_grad_(False)
        _check_ties(self.parts())

    @property
    def sees_z(self) -> bool:
        """Whether the layers see z; if not, what a block says of x is the same at every noise level."""
        stem = self.blocks[0].own(self.ends).stem
        return getattr(stem, "sees_z", True)

    def draw_sigma(
        self, block: int | None, shape: tuple[int, ...], *, seed: int, step: int, device: torch.device
    ) -> Tensor:
        """Training noise levels of `block`, float32 on `device`, the same for the same (seed, block, step).

        block: None draws from the range of all. The first `context` share of them is sigma_max: of a batch that it
        doesn't divide, one more or not by chance, so that small batches get their share too.
        """
        key = stream(seed, "sigma", 0 if block is None else block)
        u = dbkernels.philox_uniform(shape, seed=key, offset=step, device=device)
        if self.target.stratified:
            parts = torch.arange(u.numel(), device=device).view(shape) / u.numel()
            u = (u.flatten()[0] + parts) % 1
        sigma = self.partition.draw_any(u) if block is None else self.partition.draw(block, u)
        return self.give_context(sigma, seed=seed, step=step)

    def give_context(self, sigma: Tensor, *, seed: int, step: int) -> Tensor:
        """Set the first `context` share of noise levels to sigma_max, in place; their number is right on average."""
        share = round(self.context * sigma.numel(), 9)
        sigma.view(-1)[: int(share)] = self.partition.sigma_max
        if share % 1:
            key = stream(seed, "context")
            more = dbkernels.philox_uniform((), seed=key, offset=step, device=sigma.device) < share % 1
            last = sigma.view(-1)[int(share)]
            last.copy_(torch.where(more, self.partition.sigma_max, last))
        return sigma

    def helpers(self, block: int) -> list[int]:
        """Whose work `block` needs: of those before it what they carry on; of an ensemble, when read, all others'."""
        if self.carried:
            return list(range(block))
        return [b for b in range(len(self.blocks)) if b != block] if self.ensemble and not self.training else []

    @torch.no_grad()
    def hand_on(self, block: int, x: Tensor, made: Tensor | None) -> Tensor:
        """What `block` hands on, given what it was handed: what is carried, or the sum of all logits so far."""
        if self.carried:
            return self.blocks[block].clean(x, self.ends, made)
        logits = self.blocks[block].logits(x, self.ends)
        return logits if made is None else made + logits

    def handed(self, block: int, x: Tensor) -> Tensor | None:
        """What its helpers hand `block`; all must be on its device (see residency.handed)."""
        made = None
        for b in self.helpers(block):
            made = self.hand_on(b, x, made)
        return made

    def loss(
        self,
        block: int,
        x: Tensor,
        y: Tensor,
        *,
        seed: int,
        step: int,
        sigma: Tensor | None = None,
        handed: Tensor | None = None,
        weight: float = 1.0,
    ) -> BlockLoss:
        """The denoising loss of one block; nothing of the other blocks is touched.

        x: conditioning. y: the target (labels or a tensor). seed, step: address the noise; the same pair gives the same
        noise on every device. sigma: levels to use instead of drawing them, of the target's level_shape.
        handed: what `handed` gives, for a block whose context is carried; an ensemble's blocks are trained alone.
        weight: what the loss to backpropagate is multiplied by, at no cost: 1 / (micro-batches that are accumulated).
        Raises: ValueError on a wrong shape, dtype, device, label, noise level or block; labels and levels on a GPU
        aren't read, since that would wait for it.
        """
        self.check(block, x, y)
        if self.carried:
            self._check_handed(block, handed)
        if sigma is None:
            sigma = self.draw_sigma(block, self.target.level_shape(y), seed=seed, step=step, device=x.device)
        else:
            _check_levels(sigma, y, self.target.level_shape(y))
        return self.loss_at(block, x, y, sigma, seed=seed, step=step, handed=handed, weight=weight)

    def loss_at(
        self,
        block: int,
        x: Tensor,
        y: Tensor,
        sigma: Tensor,
        *,
        seed: int,
        step: int,
        handed: Tensor | None = None,
        weight: float = 1.0,
    ) -> BlockLoss:
        """`loss` at given noise levels, without its checks."""
        z = self.target.noised(y, sigma, seed=stream(seed, "eps", block), offset=step)
        head, h, cond = self.blocks[block](x, z, sigma, self.target, self.ends, handed)
        per_sample, error = self.target.objective(head, h, cond, z, y, sigma, weight)
        loss = per_sample.mean()
        if self.weighting == "batch_mean":
            loss = loss * edm.weight(sigma, self.target.sigma_data).mean()
        per_sample = per_sample.detach() if weight == 1 else per_sample.detach() / weight
        return BlockLoss(loss, sigma, per_sample, error)

    @torch.no_grad()
    def denoise(
        self, x: Tensor, z: Tensor, sigma: float, *, block: int | None = None, handed: Tensor | None = None
    ) -> Output:
        """What the owner of `sigma` (or `block`) makes of z: raw output and D.

        Raises: ValueError if sigma is not positive, or shapes, devices or the block don't fit.
        """
        if not 0 < sigma < float("inf"):
            raise ValueError(f"sigma must be positive and finite, got {sigma}")
        block = int(self.partition.block_of(sigma)) if block is None else block
        self.partition.check_block(block)
        self.target.check_noised(z)
        self._check_input(block, x, z, "z")
        self._check_handed(block, handed)
        levels = torch.full(self.target.level_shape(z), sigma, dtype=torch.float32, device=z.device)
        head, h, cond = self.blocks[block](x, z, levels, self.target, self.ends, handed)
        if self.ensemble and handed is not None:
            return self.target.read(mean_with(head, handed, len(self.helpers(block))), h, cond, z, levels)
        return self.target.read(head, h, cond, z, levels)

    def repartition(self, density: NoiseDensity) -> None:
        """Cut the noise anew, to equal mass under `density`; layers and overlap stay."""
        self.partition = make_partition(density, self.partition.layers, overlap=self.partition.overlap)

    def parts(self) -> dict[str, nn.Module]:
        """What is trained, moved and saved as one: "shared" (ends and codebook), "block_0", "block_1", ..."""
        shared = nn.ModuleDict({"target": self.target})
        if self.ends is not None:
            shared["ends"] = self.ends
        return {"shared": shared, **{f"block_{b}": block for b, block in enumerate(self.blocks)}}

    def check(self, block: int, x: Tensor, y: Tensor) -> None:
        """Raise ValueError unless (x, y) is a batch that `block` can be trained on, where its weights are."""
        self.partition.check_block(block)
        self.target.check(y)
        self._check_input(block, x, y, "y")

    def _check_handed(self, block: int, handed: Tensor | None) -> None:
        if self.helpers(block) and handed is None:
            raise ValueError(f"block {block} needs the others' work: pass handed=model.handed({block}, x)")

    def _check_input(self, block: int, x: Tensor, y: Tensor, name: str) -> None:
        if x.dim() == 0 or len(x) != len(y):
            raise ValueError(f"x and {name} must have the same batch size, got {tuple(x.shape)} and {tuple(y.shape)}")
        weight = next(self.blocks[block].parameters())
        if not weight.device == x.device == y.device or weight.numel() == 0:
            where = "not resident" if weight.numel() == 0 else f"on {weight.device}"
            raise ValueError(
                f"block {block} is {where}, x on {x.device}, {name} on {y.device}: activate the block "
                "(Residency.activate) and move the batch to its device"
            )
        ends = self.blocks[block].ends or self.ends
        check_x = getattr(ends.stem, "check", None) if ends is not None else None
        if check_x is not None:
            check_x(x)


def _entries(carries: Sequence[nn.Module], partition: Partition) -> list[nn.Module | None]:
    """How each block is entered: the first one only by its stem."""
    if len(carries) not in (0, partition.blocks - 1):
        raise ValueError(f"{partition.blocks} blocks take {partition.blocks - 1} carries or none, got {len(carries)}")
    return [None, *carries] if carries else [None] * partition.blocks


def _check_ties(parts: dict[str, nn.Module]) -> None:
    """Raise ValueError if a trained parameter is in two parts: each would train it, and none could leave the device."""
    owners: dict[int, str] = {}
    for part, module in parts.items():
        for name, p in module.named_parameters():
            owner = owners.setdefault(id(p), f"{part}'s {name}")
            if p.requires_grad and not owner.startswith(f"{part}'s "):
                raise ValueError(
                    f"{part}'s {name} is the same parameter as {owner}: weights tied across blocks can't be trained "
                    "apart; give each block its own copy, put the layers that share it in one block, or freeze it"
                )


def _check_levels(sigma: Tensor, y: Tensor, shape: tuple[int, ...]) -> None:
    if sigma.shape != shape or not sigma.is_floating_point() or sigma.device != y.device:
        raise ValueError(
            f"sigma must be floating, of shape {shape} and on {y.device}, "
            f"got {tuple(sigma.shape)} {sigma.dtype} on {sigma.device}"
        )
    if on_host(sigma):
        edm.check_sigma(sigma)


def _check_parts(
    ends: list[Ends], layers: Sequence[nn.Module], target: Target, partition: Partition, shared: str
) -> None:
    if shared not in SHARING:
        raise ValueError(f"shared must be one of {', '.join(SHARING)}, got {shared!r}")
    if sum(partition.layers) != len(layers):
        raise ValueError(f"the partition places {sum(partition.layers)} layers, the network has {len(layers)}")
    wanted = partition.blocks if shared == "per_block" else 1
    if len(ends) != wanted:
        raise ValueError(f"shared={shared!r} with {partition.blocks} blocks needs {wanted} Ends, got {len(ends)}")
    if len({id(p) for e in ends for p in e.parameters()}) < sum(len(list(e.parameters())) for e in ends):
        raise ValueError(f"shared={shared!r} needs ends of their own for every block; two of them share a parameter")
    if shared != "shared" and any(p.requires_grad for p in target.parameters()):
        raise ValueError(f"shared={shared!r} needs a fixed codebook: the blocks must agree on the space of z")
