"""Any stem, list of layers and head as diffusion blocks."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from ..arguments import check_whole
from ..blocks import DiffusionBlocks
from ..denoiser import StemHead
from ..noise.density import LogNormal, NoiseDensity, Uniform
from ..noise.information import closed_form_density
from ..noise.mask_schedule import edges as mask_edges
from ..noise.partition import Partition, make_partition, spread_layers
from ..targets.base import Target
from ..targets.codebook import CodebookTarget
from ..targets.masked import T_MIN, MaskedTarget
from ..targets.tokens import TokenTarget
from .checks import check_initialized
from .conditioning import Conditioned, PlainHead, PlainStem, check_layer, pass_by_keyword, takes

CONTEXT = 0.5  # share of a batch at sigma_max, where the answer must come from x alone


def from_layers(
    layers: Sequence[nn.Module],
    *,
    stem: nn.Module,
    head: nn.Module,
    target: Target,
    blocks: int | Sequence[int],
    shared: str = "shared",
    overlap: float = 0.05,
    context: float | None = None,
    density: NoiseDensity | None = None,
    dim: int | None = None,
    cond: int | None = None,
) -> DiffusionBlocks:
    """Return a network as denoising blocks; its modules are used in place, but for copies that `shared` asks for.

    Args:
        layers: Residual layers in order, layer(h) -> h or layer(h, cond) -> h, which keep h's shape and require no
            other argument. Plain ones get AdaLN conditioning around them, which does nothing at the start.
        stem: stem(x) -> h, (B, D) or (B, N, D): z enters the first token (with a z per token, each) by a learned
            projection. Or stem(x, z, c_noise) -> (h, cond), with z scaled by c_in.
        head: head(h) -> logits or F. Or a module with features(h) and forward(features, cond).
        target: LabelTarget, ContinuousTarget, TokenTarget or MaskedTarget.
        blocks: How many blocks (layers are spread evenly), or the layers of each.
        shared: "shared": one stem and head, trained by every block; "per_block": a copy for each; "frozen".
        overlap: Each block trains on its range of noise widened by this share of its width in ln sigma.
        context: Share of a batch at the highest noise; by default half for labels and tokens, else none.
        density: Density of training noise; by default by equal information for labels and tokens, EDM's for continuous
            targets.
        dim: Width D of h, if it can't be seen from the first layer.
        cond: Width of the noise conditioning of plain parts; D / 4, at least 8, by default.

    Raises: ValueError or TypeError if the parts don't fit together.

    Examples:
        >>> import torch, diffusionblocks as db
        >>> layers = [torch.nn.TransformerEncoderLayer(32, 2, 64, batch_first=True) for _ in range(4)]
        >>> stem = torch.nn.Sequential(torch.nn.Unflatten(1, (4, 16)), torch.nn.Linear(16, 32))
        >>> head = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4 * 32, 10))
        >>> model = db.from_layers(layers, stem=stem, head=head, target=db.LabelTarget(10, 32), blocks=2)
        >>> model(torch.randn(5, 64)).shape
        torch.Size([5, 10])
    """
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers must be a list of modules, such as network.layers, got {type(layers).__name__}")
    layers = list(layers)
    _check_modules(layers, stem, head, target)
    counts = layer_counts(len(layers), blocks)
    plain = [not takes(layer, "h", "cond") for layer in layers]
    plain_stem = not takes(stem, "x", "z", "c_noise")
    for layer in (layer for layer, p in zip(layers, plain, strict=True) if not p):
        pass_by_keyword(layer, "h", "cond")
    if not plain_stem:
        pass_by_keyword(stem, "x", "z", "c_noise")
    if any(plain) or plain_stem:
        width = _width(layers[0]) if dim is None else dim
        cond = max(8, width // 4) if cond is None else cond
        check_whole("dim", width, 1)
        check_whole("cond", cond, 1, " (the noise's conditioning can't be left out here as convert's cond=0 does)")
        layers = [Conditioned(layer, width, cond) if p else layer for layer, p in zip(layers, plain, strict=True)]
        if plain_stem:
            like = next((p for layer in layers for p in layer.parameters()), torch.empty(0))
            stem = PlainStem(stem, width, _z_dim(target), cond, aligned=isinstance(target, TokenTarget))
            for added in (stem.z, stem.noise):
                added.to(None if like.is_meta else like.device, like.dtype)  # lazy layers get values later
    around = StemHead(stem, head if hasattr(head, "features") else PlainHead(head))
    return DiffusionBlocks(
        [copy.deepcopy(around) for _ in counts] if shared == "per_block" else around,
        layers,
        target,
        partition_for(target, counts, density=density, overlap=overlap),
        shared=shared,
        context=(CONTEXT if isinstance(target, CodebookTarget) else 0.0) if context is None else context,
    )


def layer_counts(depth: int, blocks: int | Sequence[int]) -> tuple[int, ...]:
    """Return the number of layers of each block: spread evenly over `blocks` of them, or as `blocks` gives them.

    Raises: TypeError or ValueError, naming blocks.
    """
    counts = blocks if isinstance(blocks, (list, tuple)) else [blocks]
    if any(type(count) is not int for count in counts):
        raise TypeError(f"blocks must be their number or the layers of each, e.g. 2 or (6, 6), got {blocks!r}")
    if isinstance(blocks, int):
        return spread_layers(depth, blocks)
    if sum(counts) != depth or min(counts) < 1:
        raise ValueError(f"blocks={blocks} must share the network's {depth} layers, each block at least one")
    return tuple(counts)


def partition_for(
    target: Target, counts: Sequence[int], *, density: NoiseDensity | None = None, overlap: float = 0.05
) -> Partition:
    """Return the default partition of a target's noise among blocks of `counts` layers."""
    if density is not None:
        return make_partition(density, counts, overlap=overlap)
    if isinstance(target, MaskedTarget):  # widening by logarithms means nothing near t = 0
        edges = [*mask_edges(len(counts))[:-1], T_MIN]
        return make_partition(Uniform(T_MIN, 1.0), counts, edges=edges, overlap=0.0)
    if isinstance(target, CodebookTarget):
        return make_partition(closed_form_density(target.embeddings()), counts, overlap=overlap)
    return make_partition(LogNormal(), counts, overlap=overlap)


def _check_modules(layers: list[nn.Module], stem: nn.Module, head: nn.Module, target: Target) -> None:
    named = {"stem": stem, "head": head, **{f"layers[{i}]": layer for i, layer in enumerate(layers)}}
    for name, module in named.items():
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
        check_initialized(name, module)
    if not isinstance(target, Target):
        raise TypeError(f"target must be a Target such as LabelTarget(num_classes, dim), got {type(target).__name__}")
    if not layers:
        raise ValueError("layers must hold at least one layer")
    required = [p for p in inspect.signature(head.forward).parameters.values() if p.default is p.empty]
    if (
        not hasattr(head, "features")
        and sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in required) > 1
    ):
        raise ValueError(
            f"head ({type(head).__name__}) takes the conditioning, too: give it features(h), e.g. one that returns h"
        )
    for i, layer in enumerate(layers):
        check_layer(f"layers[{i}]", layer)
    if len({id(layer) for layer in layers}) < len(layers):
        raise ValueError("one layer object stands in `layers` twice: blocks train apart, so give each its own copy")


def _width(layer: nn.Module) -> int:
    """Return the width of a layer's input, by its first norm or linear map."""
    for module in layer.modules():
        shape = getattr(module, "normalized_shape", None)
        if shape is not None:
            return int(shape[-1])
        if isinstance(module, (nn.Linear, nn.MultiheadAttention)):
            return int(module.in_features if isinstance(module, nn.Linear) else module.embed_dim)
    raise ValueError("the width of the layers' input can't be seen from the first one: pass dim=")


def _z_dim(target: Target) -> int:
    if target.shape is not None and 0 < len(target.shape) < 3 and not isinstance(target, MaskedTarget):
        return target.shape[-1]  # a vector, or one per token
    if not isinstance(target, CodebookTarget):
        known = ", or give the target its shape here, e.g. shape=(1,) for one number a sample, where z is a vector"
        raise ValueError(
            f"a plain stem(x) can't take a {type(target).__name__}'s z: write stem(x, z, c_noise) -> (h, cond), "
            f"where z is the noised target scaled by c_in{known if target.shape is None else ''}"
        )
    return int(target.embeddings().shape[1])
