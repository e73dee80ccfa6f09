"""SD3 and Flux between stem, layers and head: a stream of text beside the one of patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .latents import Head, Stem, Stream, check_text

GUIDANCE = 1.0  # in training, of networks that were distilled from guided ones: data aren't guided
PACK = 2  # side of the squares of latents that are Flux's tokens


class PooledStem(Stem):
    """A text's pooled embedding, filled up with zeros, and its tokens' embeddings: (B, 1 + N, C)."""

    def __init__(self, network: Any):
        super().__init__(network)
        self.width, self.pooled = network.config.joint_attention_dim, network.config.pooled_projection_dim

    def arguments(self, x: Tensor, z: Tensor) -> dict[str, Any]:
        x = x.to(self.dtype)
        return {"encoder_hidden_states": x[:, 1:], "pooled_projections": x[:, 0, : self.pooled]}

    def check(self, x: Tensor) -> None:
        check_text(x, self.width, pooled=True)


class SD3Stem(PooledStem):
    parts = ("pos_embed", "time_text_embed", "context_embedder")

    def start(
        self, hidden_states: Tensor, *, timestep: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor
    ) -> Stream:
        emb = self.time_text_embed(timestep, pooled_projections)
        arguments = {"temb": emb, "encoder_hidden_states": self.context_embedder(encoder_hidden_states)}
        return Stream(self.pos_embed(hidden_states).contiguous(), arguments, emb, self.grid(hidden_states))


class MMDiTHead(Head):
    parts = ("norm_out", "proj_out")

    def tokens(self, h: Tensor, emb: Tensor) -> Tensor:
        patches: Tensor = self.proj_out(self.norm_out(h, emb))
        return patches


class FluxStem(PooledStem):
    """Latents (B, C, H, W) are packed here; pipelines bring them packed, with their positions."""

    parts = ("pos_embed", "time_text_embed", "context_embedder", "x_embedder")

    def __init__(self, network: Any):
        super().__init__(network)
        self.patch, self.channels = (PACK, PACK), self.channels // PACK**2
        self.guided: bool = network.config.guidance_embeds

    def start(
        self,
        hidden_states: Tensor,
        *,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
    ) -> Stream:
        """Return the first layer's input, given packed latents (B, N, 4 C) and timesteps from 0 to 1."""
        h = self.x_embedder(hidden_states)
        levels = [1000 * level.to(h.dtype) for level in (timestep, guidance) if level is not None]
        emb = self.time_text_embed(*levels, pooled_projections)
        arguments = {
            "temb": emb,
            "encoder_hidden_states": self.context_embedder(encoder_hidden_states),
            "image_rotary_emb": self.pos_embed(torch.cat([txt_ids, img_ids])),
        }
        return Stream(h, arguments, emb, None)

    def forward(self, x: Tensor, z: Tensor, c_noise: Tensor) -> tuple[Stream, None]:
        packed = z.unflatten(3, (-1, PACK)).unflatten(2, (-1, PACK)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        stream = self.start(packed.to(self.dtype), timestep=c_noise, **self.arguments(x, z))
        return stream._replace(grid=self.grid(z)), None

    def arguments(self, x: Tensor, z: Tensor) -> dict[str, Any]:
        rows, columns = self.grid(z)
        places = torch.cartesian_prod(*(torch.arange(n, device=z.device) for n in (1, rows, columns)))
        texts = torch.zeros(x.shape[1] - 1, 3, device=z.device)
        given = {"img_ids": places.to(texts.dtype), "txt_ids": texts, **super().arguments(x, z)}
        if self.guided:
            given["guidance"] = torch.full((len(z),), GUIDANCE, device=z.device)
        return given


class FluxHead(MMDiTHead):
    channels_first = True
