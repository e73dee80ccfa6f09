"""diffusers' transformers as diffusion blocks, each with the noise levels of the network's own timesteps."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import DiffusionBlocks
from ..denoiser import StemHead
from ..noise.density import LogNormal, NoiseDensity, Tabulated
from ..noise.partition import spread_layers
from ..targets.scheduled import ScheduledTarget
from .checks import check_latent_network
from .latents import (
    DiTHead, DiTLayer, DiTStem, Head, Layer, PixArtHead, PixArtStem, SD3Head, SD3Stem, Stem,
)  # fmt: skip
from .layers import partition_for
from .registry import Converter

BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
DDPM = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}


@dataclass(frozen=True)
class LatentFamily:
    """The parts of a class of diffusers' networks.

    Attributes:
        stem, layer, head: Classes of what stands in their places.
        layers: Name of the list of layers.
        scheduler: Config of the scheduler that the published networks were trained with.
        square: Latents must be as high as wide.
    """

    stem: type[Stem]
    head: type[Head]
    layer: type[Layer] = Layer
    layers: str = "transformer_blocks"
    scheduler: Mapping[str, Any] | None = None
    square: bool = False


FAMILIES = {
    f"diffusers.models.transformers.{module}.{name}": family
    for module, name, family in (
        ("dit_transformer_2d", "DiTTransformer2DModel", LatentFamily(DiTStem, DiTHead, DiTLayer, scheduler=DDPM, square=True)),
        ("pixart_transformer_2d", "PixArtTransformer2DModel", LatentFamily(PixArtStem, PixArtHead, scheduler=DDPM)),
        (
            "transformer_sd3", "SD3Transformer2DModel",
            LatentFamily(SD3Stem, SD3Head, scheduler={"shift": 3.0}),
        ),
    )
}  # fmt: skip


def convert_diffusers(
    network: nn.Module,
    blocks: int | Sequence[int],
    *,
    family: LatentFamily,
    shared: str = "shared",
    overlap: float = 0.05,
    scheduler: Mapping[str, Any] | None = None,
) -> DiffusionBlocks:
    """Return one of diffusers' transformers as denoising blocks; its modules are used in place.

    Nothing is added: the network knows its noise level. One block computes what the network does.

    Args:
        network: Pretrained or not.
        blocks: How many, or the layers of each.
        family: Its parts.
        shared: "shared", "per_block" or "frozen", as for DiffusionBlocks.
        overlap: Share of its width in ln sigma by which each block's range of noise is widened in training.
        scheduler: Config of the scheduler that the network was trained with, pipe.scheduler.config; by default that of
            the published networks of its class.

    Raises: ValueError on a network, a scheduler or an option that doesn't fit.
    """
    check_latent_network(network)
    layers = network.get_submodule(family.layers)
    counts = spread_layers(len(layers), blocks) if isinstance(blocks, int) else tuple(blocks)
    target, density = _noise(network, family, scheduler or family.scheduler)
    around = StemHead(family.stem(network), family.head(network))
    model = DiffusionBlocks(
        [copy.deepcopy(around) for _ in counts] if shared == "per_block" else around,
        [family.layer(layer) for layer in layers],
        target,
        partition_for(target, counts, density=density, overlap=overlap),
        shared=shared,
    )
    return model.train(network.training)


class LatentTarget(ScheduledTarget):
    """ScheduledTarget of latents that a network takes: (B, C, H, W), sides multiples of a patch."""

    def __init__(self, config: Any, *, square: bool, **options: Any):
        super().__init__(**options)
        self.channels, self.patch, self.square = config.in_channels, config.patch_size, square

    def check(self, y: Tensor) -> None:
        super().check(y)
        if y.dim() != 4 or y.shape[1] != self.channels or any(side % self.patch for side in y.shape[2:]):
            raise ValueError(
                f"latents must be (B, {self.channels}, H, W) with sides that are multiples of {self.patch}, "
                f"got {tuple(y.shape)}"
            )
        if self.square and y.shape[2] != y.shape[3]:
            raise ValueError(f"this network takes square latents, got {y.shape[2]}x{y.shape[3]}: cut or pad them")


def _noise(network: Any, family: LatentFamily, config: Any) -> tuple[LatentTarget, NoiseDensity]:
    """Return the target, and the density by which its levels are drawn in training."""
    steps, prediction = config.get("num_train_timesteps", 1000), config.get("prediction_type", "epsilon")
    made = functools.partial(LatentTarget, network.config, square=family.square, timesteps=steps)
    if prediction == "flow_prediction" or "shift" in config:
        # sigma = t / (1 - t): the logit-normal t of arXiv 2403.03206, eq. 19, moved by `shift`, is log-normal in sigma
        shift = config.get("shift") or config.get("flow_shift") or 1.0
        ends = (1 / (steps - 1), float(steps - 1))
        return made(prediction="flow", schedule=None), LogNormal(math.log(shift), 1.0, *ends)
    if "beta_schedule" not in config:
        raise ValueError(
            "scheduler must be the config of one of diffusers' schedulers with betas or for flow matching, "
            f"pipe.scheduler.config; got one of {', '.join(config)}"
        )
    sigmas = _variance_preserving(config)
    schedule = Tabulated(tuple(sigmas.log().tolist()), (1.0,) * (len(sigmas) - 1))
    return made(prediction=prediction, schedule=schedule), schedule


def _variance_preserving(config: Mapping[str, Any]) -> Tensor:
    """Return sigma at each timestep, rising, float64."""
    scheduler: Any = importlib.import_module("diffusers").DDPMScheduler
    made = scheduler(**{name: config[name] for name in BETAS if name in config})
    abar = made.alphas_cumprod.double()
    if abar[-1] == 0:  # noise alone, of infinite sigma
        abar[-1] = abar[-2] / 4
    return ((1 - abar) / abar).sqrt()


def describe(network: Any) -> dict[str, Any]:
    """Return JSON values that `build` makes a network like this one from."""
    config = json.loads(network.to_json_string())
    return {
        "config": {name: value for name, value in config.items() if not name.startswith("_")},
        "dtype": str(next(network.parameters()).dtype).removeprefix("torch."),
    }


def build(described: dict[str, Any], *, kind: str) -> nn.Module:
    """Return an untrained network of class `kind`, as described."""
    made: Any = getattr(importlib.import_module("diffusers"), kind)
    # diffusers' own `to` warns of modules that it would keep in float32, of which these classes have none
    return nn.Module.to(made.from_config(described["config"]), getattr(torch, described["dtype"]))


CONVERTERS = {
    name: Converter(
        functools.partial(convert_diffusers, family=family),
        describe,
        functools.partial(build, kind=name.rpartition(".")[2]),
    )
    for name, family in FAMILIES.items()
}
