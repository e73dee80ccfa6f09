"""Tiny random networks of diffusers' classes, what they are called with, and a pipeline for each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

LATENTS, VIDEOS, TEXT = (4, 8, 8), (4, 2, 4, 4), 12
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
    "FluxTransformer2DModel": dict(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, num_single_layers=2, in_channels=16, patch_size=1,
        joint_attention_dim=TEXT, pooled_projection_dim=10, axes_dims_rope=(4, 4, 4),
    ),
    "WanTransformer3DModel": dict(
        num_attention_heads=2, attention_head_dim=12, num_layers=4, in_channels=4, out_channels=4, text_dim=TEXT,
        freq_dim=16, ffn_dim=32, rope_max_seq_len=8,
    ),
}  # fmt: skip
CLASSES = list(NETWORKS)
DIT, PIXART, SD3, FLUX, WAN = CLASSES


def network(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """Return an untrained network of a class, in evaluation mode as from_pretrained gives it."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    return getattr(diffusers, name)(**{**NETWORKS[name], **changes}).eval()


def batch(name: str, size: int = 4) -> tuple[Tensor, Tensor]:
    """Return x and latents."""
    generator = torch.Generator().manual_seed(1)
    y = 0.5 * torch.randn(size, *(VIDEOS if name == WAN else LATENTS), generator=generator)
    if name == DIT:
        return torch.arange(size), y
    x = torch.randn(size, 6, TEXT, generator=generator)
    if name == PIXART:
        x[::2, 4:] = 0  # padding
    return x, y


def call(net: Any, name: str, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """Return what the network itself, or what stands in its place, computes of latents z at timesteps t."""
    if name == DIT:
        return net(z, timestep=t, class_labels=x).sample
    if name == WAN:
        return net(z, timestep=t, encoder_hidden_states=x).sample
    if name == PIXART:
        height, width = (8.0 * side for side in z.shape[2:])
        sizes = {
            "resolution": torch.tensor([[height, width]] * len(x)),
            "aspect_ratio": torch.tensor([[height / width]] * len(x)),
        }
        mask = (x != 0).any(-1)
        return net(z, timestep=t, encoder_hidden_states=x, encoder_attention_mask=mask, added_cond_kwargs=sizes).sample
    texts = {"encoder_hidden_states": x[:, 1:], "pooled_projections": x[:, 0, :10]}
    if name == SD3:
        return net(z, timestep=t, **texts).sample
    flux = pytest.importorskip("diffusers").FluxPipeline
    height, width = z.shape[2:]
    ids = flux._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32)
    guidance = torch.ones(len(x)) if net.config.guidance_embeds else None
    packed = net(
        flux._pack_latents(z, len(z), 4, height, width), timestep=t / 1000, img_ids=ids, txt_ids=torch.zeros(5, 3),
        guidance=guidance, **texts,
    ).sample  # fmt: skip
    return flux._unpack_latents(packed, 8 * height, 8 * width, 8)


def pipeline(name: str, transformer: Any) -> tuple[Any, dict[str, Any]]:
    """Return a pipeline with an untrained VAE, and what to call it with for two images."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(2)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=8, shift_factor=0.0
    ).eval()
    parts = dict(transformer=transformer, vae=vae)
    called = dict(num_inference_steps=4, output_type="pt", generator=torch.Generator().manual_seed(3))
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
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    if name == WAN:
        pipe = diffusers.WanPipeline(None, None, None, flow, transformer)
        return quiet(pipe), called | texts | dict(height=32, width=32, num_frames=5, output_type="latent")
    pooled = dict(pooled_prompt_embeds=torch.randn(2, 10), height=8, width=8)
    if name == FLUX:
        pipe = diffusers.FluxPipeline(flow, vae, None, None, None, None, transformer)
        return quiet(pipe), called | pooled | dict(prompt_embeds=prompt)
    none = {f"{part}{n}": None for part in ("tokenizer", "text_encoder") for n in ("", "_2", "_3")}
    pipe = diffusers.StableDiffusion3Pipeline(scheduler=flow, **none, **parts)
    return quiet(pipe), called | texts | pooled | dict(negative_pooled_prompt_embeds=torch.randn(2, 10))


def quiet(pipe: Any) -> Any:
    """Return a pipeline without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe
