"""Wan between stem, layers and head: videos."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .latents import Head, Stem, Stream, check_text


class WanStem(Stem):
    """A text's embeddings (B, N, C). Latents are (B, C, F, H, W)."""

    parts = ("rope", "patch_embedding", "condition_embedder")

    def __init__(self, network: Any):
        super().__init__(network)
        self.width = network.config.text_dim

    def start(self, hidden_states: Tensor, *, timestep: Tensor, encoder_hidden_states: Tensor) -> Stream:
        rotary = self.rope(hidden_states)
        h = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()
        emb, modulation, text, _ = self.condition_embedder(timestep, encoder_hidden_states)
        arguments = {"encoder_hidden_states": text, "temb": modulation.unflatten(1, (6, -1)), "rotary_emb": rotary}
        return Stream(h, arguments, emb, self.grid(hidden_states))

    def arguments(self, x: Tensor, z: Tensor) -> dict[str, Any]:
        return {"encoder_hidden_states": x.to(self.dtype)}

    def check(self, x: Tensor) -> None:
        check_text(x, self.width)


class WanHead(Head):
    parts = ("norm_out", "scale_shift_table", "proj_out")

    def tokens(self, h: Tensor, emb: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + emb.unsqueeze(1)).chunk(2, 1)
        patches: Tensor = self.proj_out((self.norm_out(h.float()) * (1 + scale) + shift).type_as(h))
        return patches
