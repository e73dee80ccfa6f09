"""DiT and PixArt between stem, layers and head: one stream of patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..targets.devices import check_labels
from .latents import Head, Layer, Stem, Stream, check_text

VAE_SCALE = 8  # pixels per latent, of every VAE that PixArt was trained with
MASKED = -10000.0  # what diffusers adds to the scores of padding


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
