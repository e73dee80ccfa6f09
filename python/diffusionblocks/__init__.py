"""DiffusionBlocks: train a transformer one block at a time, each block a denoiser for its own range of noise."""

from .adapters.huggingface_vit import huggingface_vit
from .adapters.vit import vit_blocks
from .blocks import BlockLoss, DiffusionBlocks
from .denoiser import Block, Ends
from .density import LogNormal, LogUniform, NoiseDensity, Tabulated, Uniform
from .exporting import load_alphabet, load_model
from .optim import PartOptimizer
from .partition import Partition, make_partition, step_levels
from .recipes import CORRECTED, PUBLISHED, Recipe
from .residency import Residency
from .sampling import dpmpp_2m, euler, heun
from .targets import ClassTarget, ContinuousTarget, Target, spread_codebook

__version__ = "0.1.0"
__all__ = [
    "CORRECTED",
    "PUBLISHED",
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
    "Recipe",
    "Residency",
    "Tabulated",
    "Target",
    "Uniform",
    "dpmpp_2m",
    "euler",
    "heun",
    "huggingface_vit",
    "load_alphabet",
    "load_model",
    "make_partition",
    "spread_codebook",
    "step_levels",
    "vit_blocks",
]
