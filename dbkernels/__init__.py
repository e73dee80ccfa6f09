"""Kernels of DiffusionBlocks, as drop-in autograd functions. Works without CUDA, Triton or a compiler."""

import dbkernels.cross_entropy_rows
import dbkernels.inject_noise_table  # noqa: F401  (both register their op)
from dbkernels._library import backend, compiled, kernels, load_compiled
from dbkernels.ada_norm import ada_layer_norm, ada_rms_norm
from dbkernels.adamw_ema import adamw_ema_step, adamw_ema_step_reference
from dbkernels.attention import attention, attention_choice
from dbkernels.denoising_cross_entropy import denoising_cross_entropy
from dbkernels.edm_loss import edm_loss, edm_loss_reference
from dbkernels.gated_residual_norm import gated_residual_norm, gated_residual_norm_reference
from dbkernels.inject_noise import inject_noise, inject_noise_reference, inject_noise_table_reference, philox_normal
from dbkernels.masked_cross_entropy import mask_tokens, masked_cross_entropy
from dbkernels.philox import philox_uniform
from dbkernels.replace import Replacement, replace
from dbkernels.softmax_embedding import softmax_embedding
from dbkernels.total_norm import total_norm, total_norm_reference
from dbkernels.two_stream_attention import TwoStreams, two_stream_attention, two_stream_attention_reference
from dbkernels.two_stream_choice import TwoStreamChoice, two_stream_choice
from dbkernels.two_stream_decode import two_stream_decode, two_stream_decode_reference

load_compiled()

__version__ = "0.1.0"
__all__ = [
    "Replacement",
    "TwoStreamChoice",
    "TwoStreams",
    "ada_layer_norm",
    "ada_rms_norm",
    "adamw_ema_step",
    "adamw_ema_step_reference",
    "attention",
    "attention_choice",
    "backend",
    "compiled",
    "denoising_cross_entropy",
    "edm_loss",
    "edm_loss_reference",
    "gated_residual_norm",
    "gated_residual_norm_reference",
    "inject_noise",
    "inject_noise_reference",
    "inject_noise_table_reference",
    "kernels",
    "mask_tokens",
    "masked_cross_entropy",
    "philox_normal",
    "philox_uniform",
    "replace",
    "softmax_embedding",
    "total_norm",
    "total_norm_reference",
    "two_stream_attention",
    "two_stream_attention_reference",
    "two_stream_choice",
    "two_stream_decode",
    "two_stream_decode_reference",
]
