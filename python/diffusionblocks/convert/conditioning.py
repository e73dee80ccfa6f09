"""Somebody's stem, layers and head, made aware of the noise level and of z."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_BY_KEYWORD = inspect.Parameter.KEYWORD_ONLY
_ANY_NUMBER = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_CONDITIONING = re.compile(r"^(c|t|e|y)$|cond|emb|time|noise|sigma|step|level|style|vec|modulation|ada")
_SOMETHING_ELSE = re.compile(r"mask|pos|token|past|cache")
Z_GAIN = 0.1  # of z beside the features it enters: to them it is noise


class NoiseEmbedding(nn.Module):
    """c_noise (B,) -> conditioning (B, cond): sinusoids, then an MLP."""

    def __init__(self, cond: int, frequencies: int = 64):
        super().__init__()
        rates = torch.exp(-math.log(1e4) * torch.arange(frequencies) / frequencies)
        self.register_buffer("rates", rates, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, cond), nn.SiLU(), nn.Linear(cond, cond))

    def forward(self, c_noise: Tensor) -> Tensor:
        # c_noise spans about [-1.6, 1.1]: scaled so that the fastest sinusoid turns several times over it
        angles = 16 * c_noise.unsqueeze(-1) * self.rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.mlp[0].weight.dtype))


class Conditioned(nn.Module):
    """A residual layer h -> layer(h) with AdaLN around it, which does nothing at the start.

    h: (B, D) or (B, N, D); cond: (B, C), or (B, N, C) with a level per token; arguments: the layer's own.
    """

    def __init__(self, layer: nn.Module, dim: int, cond: int):
        super().__init__()
        self.layer = layer
        own = next(layer.parameters(), torch.empty(0))
        self.linear = nn.Linear(cond, 3 * dim, device=own.device, dtype=own.dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the modulation do nothing; the layer's own weights stay."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def modulation(self, h: Tensor, cond: Tensor) -> Tensor:
        """Return shift, scale and gate side by side, (..., 3 D), for tokens h."""
        modulation: Tensor = self.linear(nn.functional.silu(cond))
        return modulation.unsqueeze(1) if h.dim() == modulation.dim() + 1 else modulation  # one level for all tokens

    def forward(self, h: Tensor, cond: Tensor, **arguments: Any) -> Tensor:
        modulation = self.modulation(h, cond)
        if modulation.shape[-1] != 3 * h.shape[-1]:
            raise ValueError(
                f"h is {h.shape[-1]} wide and the layers are taken for {modulation.shape[-1] // 3}, as their first "
                "norm or linear map: the stem must give their width, or pass from_layers dim="
            )
        shift, scale, gate = modulation.chunk(3, dim=-1)
        out = hidden_states(self.layer, self.layer(h * (1 + scale) + shift, **arguments), h.shape)
        return h + (1 + gate) * (out - h)


def hidden_states(layer: nn.Module, made: Any, shape: torch.Size) -> Tensor:
    """Return the hidden states of what a layer made: all, or the first of a tuple. Raises: ValueError if unclear."""
    tensors = made if isinstance(made, tuple) else (made,)
    if isinstance(layer, nn.RNNBase):
        tensors = tensors[:1]  # the last state has h's shape where that is of one token
    alike = [i for i, t in enumerate(tensors) if isinstance(t, Tensor) and t.shape == shape]
    if alike != [0]:
        told = ", ".join(str(tuple(t.shape)) if isinstance(t, Tensor) else type(t).__name__ for t in tensors)
        raise ValueError(
            f"a layer ({type(layer).__name__}) made {told} of h {tuple(shape)}: it must return h of the same shape, or "
            "a tuple in which that is the first tensor and no other is of its shape; wrap it in a module that does"
        )
    first: Tensor = tensors[0]
    return first


class PlainStem(nn.Module):
    """A stem x -> h that knows no noise; z enters the first token (or each, if z has tokens) by a learned projection.

    Args:
        stem: x -> (B, D) or (B, N, D).
        dim: D.
        z_dim: Width of z, (B, z_dim) or (B, N, z_dim).
        cond: Width of the conditioning.
        aligned: z has a token for each of h, as many as x makes.
    """

    takes_float32 = True

    def __init__(self, stem: nn.Module, dim: int, z_dim: int, cond: int, aligned: bool = False):
        super().__init__()
        self.stem, self.aligned = stem, aligned
        self.z = nn.Linear(z_dim, dim, bias=False)
        nn.init.orthogonal_(self.z.weight, gain=Z_GAIN)
        self.noise = NoiseEmbedding(cond)

    @torch.no_grad()
    def places(self, x: Tensor) -> Tensor:
        """Return h of one x: z is as long. In evaluation mode, so that looking changes nothing."""
        modes = [(module, module.training) for module in self.stem.modules()]
        self.stem.eval()
        try:
            return embed(self.stem, x[:1])
        finally:
            for module, training in modes:
                module.training = training

    def forward(self, x: Tensor, z: Tensor, c_noise: Tensor) -> tuple[Tensor, Tensor]:
        h, noise = embed(self.stem, x), self.z(z.to(self.z.weight.dtype))
        if h.dim() == noise.dim() + 1:
            h = torch.cat([h[:, :1] + noise.unsqueeze(1).to(h.dtype), h[:, 1:]], dim=1)
        elif h.shape == noise.shape:
            h = h + noise.to(h.dtype)
        else:
            raise ValueError(
                f"the stem gives {tuple(h.shape)}, and z projected to its width is {tuple(noise.shape)}: z needs a "
                "first token or a token each; write the stem as stem(x, z, c_noise) -> (h, cond) instead"
            )
        return h, self.noise(c_noise)


class PlainHead(nn.Module):
    """A head h -> output that knows no noise. `linear`: the head itself, where it is one linear map."""

    is_linear = True

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    @property
    def linear(self) -> nn.Linear | None:
        """The whole head, if it is a linear map: its logits then needn't be held all at once."""
        return self.head if type(self.head) is nn.Linear else None

    def features(self, h: Tensor) -> Tensor:
        return h

    def forward(self, h: Tensor, cond: Any) -> Tensor:
        return self.head(h)


def check_layer(called: str, layer: nn.Module) -> None:
    """Raise ValueError unless a layer's forward takes h, or h and the noise's conditioning, and requires no more."""
    parameters = inspect.signature(layer.forward).parameters.values()
    required = [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in _ANY_NUMBER]
    others = [name for name in required[1:] if not _CONDITIONING.search(name) or _SOMETHING_ELSE.search(name)]
    if len(required) > 2 or others:
        raise ValueError(
            f"{called} ({type(layer).__name__}) takes ({', '.join(required)}), and layers take h, or h and the noise's "
            "conditioning, called cond: wrap it in a module whose forward takes h and makes or holds the others"
        )
    if any(map(_is_batch_second, layer if isinstance(layer, nn.Sequential) else [layer])):
        raise ValueError(
            f"{called} ({type(layer).__name__}) was made with batch_first=False, and h is (B, N, D): it would take "
            "rows of a batch for tokens; make it with batch_first=True"
        )


def _is_batch_second(module: nn.Module) -> bool:
    own = module.self_attn if isinstance(module, nn.TransformerEncoderLayer) else module
    return isinstance(module, (nn.TransformerEncoderLayer, nn.RNNBase)) and not own.batch_first


def takes(module: nn.Module, *names: str) -> bool:
    """Return whether a module's forward takes as many arguments as there are names: it requires them, or calls some so.

    names: the first argument can have any name, the others are looked for, e.g. takes(layer, "h", "cond").
    """
    parameters = inspect.signature(module.forward).parameters
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters.values())
    return required >= len(names) or all(name in parameters for name in names[1:])


def pass_by_keyword(module: nn.Module, *names: str) -> None:
    """Let a module be called by position whose forward takes some of these names by keyword only, by a hook on it."""
    parameters = inspect.signature(module.forward).parameters
    keywords = {name for name in names if name in parameters and parameters[name].kind is _BY_KEYWORD}
    if keywords:
        module.register_forward_pre_hook(functools.partial(_by_keyword, names, keywords), with_kwargs=True)


def _by_keyword(
    names: tuple[str, ...], keywords: set[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    named = list(zip(names, args, strict=True))
    positional = tuple(value for name, value in named if name not in keywords)
    return positional, kwargs | {name: value for name, value in named if name in keywords}


def embed(stem: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return stem(x). Raises: ValueError, naming x, if it doesn't fit the stem."""
    try:
        return stem(x)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, LookupError) as error:
        raise ValueError(
            f"x, {tuple(x.shape)} {x.dtype}, does not fit the stem ({type(stem).__name__}): {error}"
        ) from error
