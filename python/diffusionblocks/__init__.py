"""DiffusionBlocks: train a transformer one block at a time, each block a denoiser for its own range of noise."""

from .blocks import BlockLoss, DiffusionBlocks
from .convert.transformers import huggingface_vit
from .denoiser import Block, Ends
from .noise.density import LogNormal, LogUniform, NoiseDensity, Tabulated, Uniform
from .noise.partition import Partition, make_partition, step_levels
from .sampling.samplers import dpmpp_2m, euler, heun
from .targets.base import Target
from .targets.continuous import ContinuousTarget
from .targets.labels import ClassTarget, spread_codebook
from .training.offload import Residency
from .training.optimizer import PartOptimizer

__version__ = "0.1.0"
__all__ = [
    "Block",
    "BlockLoss",
    "ClassTarget",
    "ContinuousTarget",
    "DiffusionBlocks",
    "Ends",
    "LogNormal",
    "LogUniform",
    "NoiseDensity",
    "PartOptimizer",
    "Partition",
    "Residency",
    "Tabulated",
    "Target",
    "Uniform",
    "dpmpp_2m",
    "euler",
    "heun",
    "huggingface_vit",
    "make_partition",
    "spread_codebook",
    "step_levels",
]
