"""Tiny random networks of diffusers' classes, what they are called with, and a pipeline for each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

LATENTS, TEXT = (4, 8, 8), 12
SHARED = dict(num_attention_heads=2, num_layers=4, sample_size=8, in_channels=4, patch_size=2)
NETWORKS: dict[str, dict[str, Any]] = {
    # its pipeline asks for the class 1000 where there is no label
    "DiTTransformer2DModel": dict(SHARED, attention_head_dim=8, out_channels=8, num_embeds_ada_norm=1000),
    "PixArtTransformer2DModel": dict(
        SHARED, attention_head_dim=12, out_channels=8, cross_attention_dim=24, caption_channels=TEXT
    ),
    "SD3Transformer2DModel": dict(
        SHARED, attention_head_dim=8, out_channels=4, joint_attention_dim=TEXT, caption_projection_dim=16,
        pooled_projection_dim=10, pos_embed_max_size=8, dual_attention_layers=(0, 3), qk_norm="rms_norm",
    ),
}  # fmt: skip
CLASSES = list(NETWORKS)
DIT, PIXART, SD3 = CLASSES


def network(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """Return an untrained network of a class, in evaluation mode as from_pretrained gives it."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    return getattr(diffusers, name)(**{**NETWORKS[name], **changes}).eval()


def batch(name: str, size: int = 4) -> tuple[Tensor, Tensor]:
    """Return x and latents."""
    generator = torch.Generator().manual_seed(1)
    y = 0.5 * torch.randn(size, *LATENTS, generator=generator)
    if name == DIT:
        return torch.arange(size), y
    x = torch.randn(size, 6, TEXT, generator=generator)
    if name == PIXART:
        x[::2, 4:] = 0  # padding
    return x, y


def arguments(name: str, x: Tensor) -> dict[str, Tensor]:
    """Return x as the network itself takes it."""
    if name == DIT:
        return {"class_labels": x}
    if name == SD3:
        return {"encoder_hidden_states": x[:, 1:], "pooled_projections": x[:, 0, :10]}
    sizes = {"resolution": torch.full((len(x), 2), 64.0), "aspect_ratio": torch.ones(len(x), 1)}
    return {
        "encoder_hidden_states": x,
        "encoder_attention_mask": (x != 0).any(-1),
        "added_cond_kwargs": sizes,
    }


def pipeline(name: str, transformer: Any) -> tuple[Any, dict[str, Any]]:
    """Return a pipeline with an untrained VAE, and what to call it with for two images."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(2)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=8, shift_factor=0.0
    ).eval()
    parts = dict(transformer=transformer, vae=vae)
    called = dict(num_inference_steps=4, output_type="pt", generator=torch.manual_seed(3))
    if name == DIT:
        pipe = diffusers.DiTPipeline(scheduler=diffusers.DDIMScheduler(), **parts)
        return quiet(pipe), dict(called, class_labels=[1, 2], guidance_scale=2.0)
    prompt, negative = torch.randn(2, 5, TEXT), torch.randn(2, 5, TEXT)
    texts = dict(prompt_embeds=prompt, negative_prompt_embeds=negative, guidance_scale=2.0)
    if name == PIXART:
        none = dict(tokenizer=None, text_encoder=None)
        pipe = diffusers.PixArtAlphaPipeline(scheduler=diffusers.DPMSolverMultistepScheduler(), **none, **parts)
        masks = dict(prompt_attention_mask=torch.ones(2, 5), negative_prompt_attention_mask=torch.ones(2, 5))
        fixed = dict(negative_prompt=None, use_resolution_binning=False, height=8, width=8)
        return quiet(pipe), called | texts | masks | fixed
    none = {f"{part}{n}": None for part in ("tokenizer", "text_encoder") for n in ("", "_2", "_3")}
    pipe = diffusers.StableDiffusion3Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), **none, **parts
    )
    pooled = dict(pooled_prompt_embeds=torch.randn(2, 10), negative_pooled_prompt_embeds=torch.randn(2, 10))
    return quiet(pipe), called | texts | pooled | dict(height=8, width=8)


def quiet(pipe: Any) -> Any:
    """Return a pipeline without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe
