"""diffusers' transformers in the hands of blocks: what comes before, between and behind their layers, by class.

Parts keep the names that they have in the network, so that weights are given back by name.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..targets.devices import check_labels

VAE_SCALE = 8  # pixels per latent, of every VAE that PixArt was trained with
MASKED = -10000.0  # what diffusers adds to the scores of padding


class Stream(NamedTuple):
    """Tokens between layers. h: (B, N, D); arguments: of the layers; emb: the noise level and whatever else modulates
    the output, (B, D), None until a layer computes it; grid: patches, (rows, columns)."""

    h: Tensor
    arguments: dict[str, Any]
    emb: Tensor | None
    grid: tuple[int, int]


class Stem(nn.Module):
    """Base class: x_t, the timestep and what x holds -> Stream. A subclass defines `start`, `arguments` and `check`."""

    takes_float32 = True
    parts: ClassVar[tuple[str, ...]]

    def __init__(self, network: Any):
        super().__init__()
        self.patch: int = network.config.patch_size
        for name in self.parts:
            setattr(self, name, getattr(network, name))

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type."""
        return next(self.parameters()).dtype

    def forward(self, x: Tensor, z: Tensor, c_noise: Tensor) -> tuple[Stream, None]:
        return self.start(z.to(self.dtype), timestep=c_noise, **self.arguments(x, z)), None

    def start(self, hidden_states: Tensor, *, timestep: Tensor, **arguments: Any) -> Stream:
        """Return the first layer's input, given the arguments that the network itself takes."""
        raise NotImplementedError

    def arguments(self, x: Tensor, z: Tensor) -> dict[str, Any]:
        """Return x as the network's arguments."""
        raise NotImplementedError

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless `x` fits the network."""
        raise NotImplementedError

    def grid(self, latents: Tensor) -> tuple[int, int]:
        """Return how many rows and columns of patches there are."""
        return latents.shape[-2] // self.patch, latents.shape[-1] // self.patch


class Layer(nn.Module):
    """A network's layer between Streams; of two streams, (text, h) comes out."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, stream: Stream, cond: None) -> Stream:
        out = self.layer(stream.h, **stream.arguments)
        if not isinstance(out, tuple):
            return stream._replace(h=out)
        text, h = out
        return stream._replace(h=h, arguments={**stream.arguments, "encoder_hidden_states": text})


class Head(nn.Module):
    """Base class: Stream -> the prediction (B, C, H, W). A subclass defines `tokens`."""

    parts: ClassVar[tuple[str, ...]]

    def __init__(self, network: Any):
        super().__init__()
        self.patch: int = network.config.patch_size
        for name in self.parts:
            setattr(self, name, getattr(network, name))

    def tokens(self, h: Tensor, emb: Tensor) -> Tensor:
        """Return each token's patch, (B, N, patch * patch * C)."""
        raise NotImplementedError

    def features(self, stream: Stream) -> Tensor:
        assert stream.emb is not None
        rows, columns = stream.grid
        patches = self.tokens(stream.h, stream.emb)
        patches = patches.unflatten(1, stream.grid).unflatten(-1, (self.patch, self.patch, -1))
        return torch.einsum("nhwpqc->nchpwq", patches).reshape(
            len(patches), -1, rows * self.patch, columns * self.patch
        )

    def forward(self, latents: Tensor, cond: None) -> Tensor:
        return latents


class DiTStem(Stem):
    """Labels (B,). In training a tenth of them become the class of no label, as guidance needs."""

    parts = ("pos_embed",)

    def __init__(self, network: Any):
        super().__init__(network)
        embedder = network.transformer_blocks[0].norm1.emb.class_embedder
        self.classes, self.dropout = embedder.num_classes, embedder.dropout_prob

    def start(self, hidden_states: Tensor, *, timestep: Tensor, class_labels: Tensor) -> Stream:
        arguments = {"timestep": timestep, "class_labels": class_labels}
        return Stream(self.pos_embed(hidden_states), arguments, None, self.grid(hidden_states))

    def arguments(self, x: Tensor, z: Tensor) -> dict[str, Any]:
        if self.training:
            x = torch.where(torch.rand(len(x), device=x.device) < self.dropout, self.classes, x)
        return {"class_labels": x}

    def unconditional(self, x: Tensor) -> Tensor:
        """Return the class of no label, for guidance."""
        return torch.full_like(x, self.classes)

    def check(self, x: Tensor) -> None:
        if x.dim() != 1 or x.dtype != torch.int64 or len(x) == 0:
            raise ValueError(f"x must be non-empty int64 labels (B,), got {tuple(x.shape)} {x.dtype}")
        check_labels("labels", x, self.classes + 1)


class DiTLayer(Layer):
    """A layer that embeds timestep and label by itself; the first one's embedding also modulates the output."""

    def __init__(self, layer: Any):
        super().__init__(layer)
        layer.norm1.emb.class_embedder.dropout_prob = 0.0  # the stem drops labels, once for all layers

    def forward(self, stream: Stream, cond: None) -> Stream:
        if stream.emb is None:
            emb = self.layer.norm1.emb(**stream.arguments, hidden_dtype=stream.h.dtype)
            stream = stream._replace(emb=emb)
        return super().forward(stream, cond)


class DiTHead(Head):
    parts = ("norm_out", "proj_out_1", "proj_out_2")

    def tokens(self, h: Tensor, emb: Tensor) -> Tensor:
        shift, scale = self.proj_out_1(functional.silu(emb)).unsqueeze(1).chunk(2, -1)
        patches: Tensor = self.proj_out_2(self.norm_out(h) * (1 + scale) + shift)
        return patches


class PixArtStem(Stem):
    """A text's embeddings (B, N, C); rows of zeros are padding."""

    parts = ("pos_embed", "adaln_single", "caption_projection")

    def __init__(self, network: Any):
        super().__init__(network)
        self.width = network.config.caption_channels or network.config.cross_attention_dim
        self.sizes: bool = network.use_additional_conditions

    def start(
        self,
        hidden_states: Tensor,
        *,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor | None] | None = None,
    ) -> Stream:
        h: Tensor = self.pos_embed(hidden_states)
        t, emb = self.adaln_single(timestep, added_cond_kwargs, batch_size=len(h), hidden_dtype=h.dtype)
        text, mask = encoder_hidden_states, encoder_attention_mask
        if self.caption_projection is not None:
            text = self.caption_projection(text)
        if mask is not None and mask.dim() == 2:
            mask = ((1 - mask.to(h.dtype)) * MASKED).unsqueeze(1)
        arguments = {"timestep": t, "encoder_hidden_states": text, "encoder_attention_mask": mask}
        return Stream(h, arguments, emb, self.grid(hidden_states))

    def arguments(self, x: Tensor, z: Tensor) -> dict[str, Any]:
        made: dict[str, Any] = {"encoder_hidden_states": x.to(self.dtype), "encoder_attention_mask": (x != 0).any(-1)}
        if self.sizes:
            height, width = (VAE_SCALE * side for side in z.shape[-2:])
            sizes = torch.tensor([height, width, height / width], device=z.device).expand(len(z), -1)
            made["added_cond_kwargs"] = {"resolution": sizes[:, :2], "aspect_ratio": sizes[:, 2:]}
        return made

    def check(self, x: Tensor) -> None:
        check_text(x, self.width)


class PixArtHead(Head):
    parts = ("norm_out", "scale_shift_table", "proj_out")

    def tokens(self, h: Tensor, emb: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + emb.unsqueeze(1)).chunk(2, 1)
        patches: Tensor = self.proj_out(self.norm_out(h) * (1 + scale) + shift)
        return patches


class SD3Stem(Stem):
    """A text's pooled embedding, filled up with zeros, and its tokens' embeddings: (B, 1 + N, C)."""

    parts = ("pos_embed", "time_text_embed", "context_embedder")

    def __init__(self, network: Any):
        super().__init__(network)
        self.width, self.pooled = network.config.joint_attention_dim, network.config.pooled_projection_dim

    def start(
        self, hidden_states: Tensor, *, timestep: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor
    ) -> Stream:
        emb = self.time_text_embed(timestep, pooled_projections)
        arguments = {"temb": emb, "encoder_hidden_states": self.context_embedder(encoder_hidden_states)}
        return Stream(self.pos_embed(hidden_states).contiguous(), arguments, emb, self.grid(hidden_states))

    def arguments(self, x: Tensor, z: Tensor) -> dict[str, Any]:
        x = x.to(self.dtype)
        return {"encoder_hidden_states": x[:, 1:], "pooled_projections": x[:, 0, : self.pooled]}

    def check(self, x: Tensor) -> None:
        check_text(x, self.width, least=2)


class SD3Head(Head):
    parts = ("norm_out", "proj_out")

    def tokens(self, h: Tensor, emb: Tensor) -> Tensor:
        patches: Tensor = self.proj_out(self.norm_out(h, emb))
        return patches


def check_text(x: Tensor, width: int, least: int = 1) -> None:
    """Raise ValueError unless `x` is a batch of texts' embeddings of that width."""
    if x.dim() != 3 or x.shape[1] < least or x.shape[2] != width or len(x) == 0 or not x.is_floating_point():
        what = "embeddings of texts" if least == 1 else "the pooled embedding of texts and those of their tokens"
        raise ValueError(f"x must be {what}, floating (B, N, {width}), got {tuple(x.shape)} {x.dtype}")
