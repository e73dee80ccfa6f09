"""transformers' embeddings, layers and heads in the hands of blocks: tokens travel with their layers' arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..targets.devices import check_labels, on_host
from .families import Family


class Tokens(NamedTuple):
    """Tokens between layers. h: (B, N, D); arguments: of layers, by their kind of attention; real: (B, N), False at
    padding, or None where there is none."""

    h: Tensor
    arguments: dict[str, dict[str, Any]]
    real: Tensor | None = None


class Images(nn.Module):
    """Base class: images (B, C, H, W) to tokens.

    channels: C. size, patch: height and width; any_size: they need only be multiples of a patch's.
    """

    def __init__(self, channels: int, size: Any, patch: Any, *, any_size: bool):
        super().__init__()
        self.channels, self.size, self.patch, self.any_size = channels, _pair(size), _pair(patch), any_size

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless `x` is a batch of images of a size that the network takes."""
        if x.dim() != 4 or x.shape[1] != self.channels or not x.is_floating_point():
            raise ValueError(f"x must be floating images (B, {self.channels}, H, W), got {tuple(x.shape)} {x.dtype}")
        height, width = x.shape[2:]
        if self.any_size and (height % self.patch[0] or width % self.patch[1]):
            raise ValueError(f"{height}x{width} images don't split into patches of {self.patch[0]}x{self.patch[1]}")
        if not self.any_size and (height, width) != self.size:
            raise ValueError(f"images must be {self.size[0]}x{self.size[1]}, got {height}x{width}: resize them")


class ImageEmbedding(Images):
    """Images to tokens, by one of transformers' networks."""

    def __init__(self, network: Any, family: Family):
        config = network.config
        super().__init__(config.num_channels, config.image_size, config.patch_size, any_size=family.any_size)
        self.embeddings = network.get_submodule(family.embeddings)
        self.kinds = ["full_attention"] * config.num_hidden_layers

    def forward(self, x: Tensor) -> Tokens:
        h = self.embeddings(x.to(self.embeddings.cls_token.dtype))
        return Tokens(h, {"full_attention": {}})


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class TokenEmbedding(nn.Module):
    """Token ids (B, N) to tokens, with attention masks and rotary angles."""

    def __init__(self, network: nn.Module, family: Family):
        super().__init__()
        config: Any = network.config
        self.embeddings = network.get_submodule(family.embeddings)
        self.positions = nn.ModuleList(network.get_submodule(name) for name in family.positions)
        self.rotary = network.get_submodule(family.rotary) if family.rotary else None
        self.rotary_by_type = family.rotary_by_type
        self.window = getattr(config, "sliding_window", None)
        every = "sliding_attention" if self.window else "full_attention"
        self.kinds = list(getattr(config, "layer_types", None) or [every] * config.num_hidden_layers)
        self.limit = None if family.rotary else config.max_position_embeddings
        self.vocab_size, self.padding = config.vocab_size, padding_of(config)
        self.hides_padding = family.kind == "texts"  # elsewhere it is refused
        self.additive = config._attn_implementation == "eager"  # which adds masks to its scores

    def embed(self, ids: Tensor, first: int = 0) -> Tensor:
        """Return (B, N, D) of tokens at the positions first, first + 1, ..."""
        h: Tensor = self.embeddings(ids)
        if self.positions:
            places, dropout = self.positions
            h = dropout(h + places(torch.arange(first, first + ids.shape[1], device=ids.device)))
        return h

    def forward(self, ids: Tensor) -> Tokens:
        """Return tokens that attend to all others but padding."""
        h, places = self.embed(ids), torch.arange(ids.shape[1], device=ids.device)
        real = ids != self.padding if self.hides_padding and self.padding is not None else None

        def visible(window: int | None) -> Tensor:
            far = (places[:, None] - places).abs()
            near = far <= window if window else torch.ones_like(far, dtype=torch.bool)
            return near if real is None else near & real[:, None, None]

        return Tokens(h, self.arguments(h, places, visible), real)

    def arguments(
        self, h: Tensor, places: Tensor, visible: Callable[[int | None], Tensor]
    ) -> dict[str, dict[str, Any]]:
        """Return the layers' arguments by their kind of attention.

        places: positions (N,); visible: a window's width, or None, -> which keys a query attends to, (..., N, N).
        """
        made: dict[str, dict[str, Any]] = {}
        for kind in sorted(set(self.kinds)):
            mask = visible(self.window if kind == "sliding_attention" else None)
            mask = mask.expand(len(h), 1, *mask.shape[-2:])
            if self.additive:
                mask = torch.zeros_like(mask, dtype=h.dtype).masked_fill(~mask, torch.finfo(h.dtype).min)
            made[kind] = {"attention_mask": mask}
            if self.rotary is not None:
                by_type = [kind] if self.rotary_by_type else []
                made[kind]["position_embeddings"] = self.rotary(h, places.unsqueeze(0), *by_type)
        return made

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless `x` is a batch of token ids that the network takes."""
        if x.dim() != 2 or x.dtype != torch.int64 or x.numel() == 0:
            raise ValueError(f"x must be non-empty int64 tokens (B, N), got {tuple(x.shape)} {x.dtype}")
        check_labels("x's tokens", x, self.vocab_size)
        self.check_length(x)

    def check_length(self, tokens: Tensor) -> None:
        """Raise ValueError if there are more tokens than position embeddings."""
        if self.limit is not None and tokens.shape[1] > self.limit:
            raise ValueError(
                f"{tokens.shape[1]} tokens are more than the network's {self.limit} position embeddings: cut them"
            )


def padding_of(config: Any) -> int | None:
    """Return the id of padding; None if there is none, or if it also begins or ends texts."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    padding: int | None = config.pad_token_id
    return None if padding in (*ends, config.bos_token_id) else padding


def check_windows(tokens: Tensor, padding: int | None) -> None:
    """Raise ValueError if tokens (B, N) hold padding, which would be learned as text; on a device they aren't read."""
    if padding is not None and on_host(tokens) and bool((tokens == padding).any()):
        raise ValueError(
            f"the tokens hold padding (id {padding}), which would be learned as text: pack texts into full windows"
        )


class Layer(nn.Module):
    """transformers' layer between Tokens, with its arguments. layer: plain, or Conditioned."""

    def __init__(self, layer: nn.Module, kind: str, *, conditioned: bool):
        super().__init__()
        self.layer, self.kind, self.conditioned = layer, kind, conditioned

    def forward(self, tokens: Tokens, cond: Tensor | None) -> Tokens:
        out = self.layer(tokens.h, *([cond] if self.conditioned else []), **tokens.arguments[self.kind])
        return tokens._replace(h=out[0] if isinstance(out, tuple) else out)


def _mean(tokens: Tokens) -> Tensor:
    if tokens.real is None:
        return tokens.h.mean(1)
    return (tokens.h * tokens.real.unsqueeze(-1)).sum(1) / tokens.real.sum(1, keepdim=True)


POOLS: dict[str | None, Callable[[Tokens], Tensor]] = {
    None: lambda tokens: tokens.h,
    "first": lambda tokens: tokens.h[:, 0],
    "first and mean": lambda tokens: torch.cat([tokens.h[:, 0], tokens.h[:, 1:].mean(1)], 1),
    "mean": _mean,
}


class Head(nn.Module):
    """transformers' final norm, pooling and classifier or vocabulary.

    pool: one of POOLS; noisy: of two streams, read the second.
    """

    is_linear = True

    def __init__(self, before: list[nn.Module], pool: str | None, after: list[nn.Module], *, noisy: bool = False):
        super().__init__()
        self.before, self.after = nn.ModuleList(before), nn.ModuleList(after)
        self.pool, self.noisy = pool, noisy

    @property
    def linear(self) -> nn.Module:
        """The map from features to logits: it then needn't hold them all at once."""
        return self.after[-1]

    def features(self, tokens: Tokens) -> Tensor:
        h = tokens.h[:, tokens.h.shape[1] // 2 :] if self.noisy else tokens.h
        for module in self.before:
            h = module(h)
        h = POOLS[self.pool](tokens._replace(h=h))
        for module in self.after[:-1]:
            h = module(h)
        return h

    def forward(self, h: Tensor, cond: Any) -> Tensor:
        logits: Tensor = self.linear(h)
        return logits
