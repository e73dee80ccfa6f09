"""DiffusionBlocks: train a transformer one block at a time, each block a denoiser for its own range of noise."""

from .blocks import DiffusionBlocks
from .convert.layers import from_layers
from .convert.original import to_original
from .convert.pretrained import load
from .convert.registry import convert, register
from .denoiser import Block, BlockLoss, StemHead
from .noise.density import LogNormal, LogUniform, NoiseDensity, Tabulated, Uniform
from .noise.partition import Partition, make_partition, step_levels
from .offload.offloader import Offloader
from .sampling.generate import generate
from .sampling.sample import sample
from .sampling.sampler import Sampler
from .sampling.samplers import dpmpp_2m, euler, heun
from .targets.base import Target
from .targets.codebook import spread_codebook
from .targets.continuous import ContinuousTarget
from .targets.labels import LabelTarget
from .targets.masked import MaskedTarget
from .targets.tokens import TokenTarget
from .training.config import TrainerConfig
from .training.finite import NonFiniteLoss
from .training.merge import merge
from .training.optimizer import BlockAdamW
from .training.plan import Plan, plan
from .training.trainer import StepOutput, Trainer

__version__ = "0.1.0"
__all__ = [
    "Block",
    "BlockAdamW",
    "BlockLoss",
    "ContinuousTarget",
    "DiffusionBlocks",
    "LabelTarget",
    "LogNormal",
    "LogUniform",
    "MaskedTarget",
    "NoiseDensity",
    "NonFiniteLoss",
    "Offloader",
    "Partition",
    "Plan",
    "Sampler",
    "StemHead",
    "StepOutput",
    "Tabulated",
    "Target",
    "TokenTarget",
    "Trainer",
    "TrainerConfig",
    "Uniform",
    "convert",
    "dpmpp_2m",
    "euler",
    "from_layers",
    "generate",
    "heun",
    "load",
    "make_partition",
    "merge",
    "plan",
    "register",
    "sample",
    "spread_codebook",
    "step_levels",
    "to_original",
]
