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

from torch import Tensor, nn

from ..arguments import check_whole
from ..blocks import DiffusionBlocks
from ..denoiser import StemHead
from ..noise.density import LogNormal, NoiseDensity, Tabulated
from ..targets.scheduled import ScheduledTarget
from .checks import check_latent_network
from .dit import DiTHead, DiTLayer, DiTStem, PixArtHead, PixArtStem
from .latents import Head, Layer, Stem
from .layers import layer_counts, partition_for
from .likeness import cast, dtypes
from .mmdit import FluxHead, FluxStem, MMDiTHead, SD3Stem
from .registry import Converter, Places
from .wan import WanHead, WanStem

BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
DDPM = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}


@dataclass(frozen=True)
class LatentFamily:
    """The parts of a class of diffusers' networks.

    Attributes:
        stem, layer, head: Classes of what stands in their places.
        scheduler: Values of the scheduler's config that the published networks were trained with.
        layers: Lists of layers, in order; each with the name of its length in the config.
        timesteps: The network's own run from 0 to this; None: to the scheduler's.
        square: Latents must be as high as wide.
    """

    stem: type[Stem]
    head: type[Head]
    scheduler: Mapping[str, Any]
    layer: type[Layer] = Layer
    layers: tuple[tuple[str, str], ...] = (("transformer_blocks", "num_layers"),)
    timesteps: int | None = None
    square: bool = False


_FLUX = (("transformer_blocks", "num_layers"), ("single_transformer_blocks", "num_single_layers"))

FAMILIES = {
    f"diffusers.models.transformers.{name}": family
    for name, family in (
        ("dit_transformer_2d.DiTTransformer2DModel", LatentFamily(DiTStem, DiTHead, DDPM, DiTLayer, square=True)),
        ("pixart_transformer_2d.PixArtTransformer2DModel", LatentFamily(PixArtStem, PixArtHead, DDPM)),
        ("transformer_sd3.SD3Transformer2DModel", LatentFamily(SD3Stem, MMDiTHead, {"shift": 3.0})),
        (
            "transformer_flux.FluxTransformer2DModel",
            LatentFamily(FluxStem, FluxHead, {"shift": 1.0}, layers=_FLUX, timesteps=1),
        ),
        (
            "transformer_wan.WanTransformer3DModel",
            LatentFamily(WanStem, WanHead, {"shift": 3.0}, layers=(("blocks", "num_layers"),)),
        ),
    )
}


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

    Raises: ValueError on a network, a scheduler or an option that doesn't fit; TypeError for blocks that are no
        numbers, or a scheduler that is no config.
    """
    check_latent_network(network)
    layers = [layer for name, _ in family.layers for layer in network.get_submodule(name)]
    counts = layer_counts(len(layers), blocks)
    stem = family.stem(network)
    target, density = _noise(stem, family, family.scheduler if scheduler is None else scheduler)
    around = StemHead(stem, family.head(network, stem.patch))
    model = DiffusionBlocks(
        [copy.deepcopy(around) for _ in counts] if shared == "per_block" else around,
        [family.layer(layer) for layer in layers],
        target,
        partition_for(target, counts, density=density, overlap=overlap),
        shared=shared,
    )
    return model.train(network.training)


class LatentTarget(ScheduledTarget):
    """ScheduledTarget of the latents that a network takes."""

    def __init__(self, stem: Stem, *, square: bool, **options: Any):
        super().__init__(**options)
        self.channels, self.patch, self.square = stem.channels, stem.patch, square

    def check(self, y: Tensor) -> None:
        super().check(y)
        axes = "F, H, W" if len(self.patch) == 3 else "H, W"
        if y.dim() != 2 + len(self.patch) or y.shape[1] != self.channels:
            raise ValueError(f"latents must be (B, {self.channels}, {axes}), got {tuple(y.shape)}")
        if any(side % patch for side, patch in zip(y.shape[2:], self.patch, strict=True)):
            raise ValueError(f"latents' {axes} must be multiples of {self.patch}, got {tuple(y.shape[2:])}")
        if self.square and y.shape[2] != y.shape[3]:
            raise ValueError(f"this network takes square latents, got {y.shape[2]}x{y.shape[3]}: cut or pad them")


def _noise(stem: Stem, family: LatentFamily, config: Mapping[str, Any]) -> tuple[LatentTarget, NoiseDensity]:
    """Return the target, and the density by which its levels are drawn in training."""
    if not isinstance(config, Mapping):
        raise TypeError(f"scheduler must be a config, pipe.scheduler.config, got a {type(config).__name__}")
    steps, prediction = config.get("num_train_timesteps", 1000), config.get("prediction_type", "epsilon")
    check_whole("the scheduler's num_train_timesteps", steps, 2)
    made = functools.partial(LatentTarget, stem, square=family.square)
    if prediction == "flow_prediction" or "shift" in config:
        # sigma = t / (1 - t): the logit-normal t of arXiv 2403.03206, eq. 19, moved by `shift`, is log-normal in sigma
        shift = next((config[name] for name in ("shift", "flow_shift") if config.get(name) is not None), 1.0)
        if not shift > 0:
            raise ValueError(f"the scheduler's shift must be positive, got {shift}")
        ends = (1 / (steps - 1), float(steps - 1))
        return made(prediction="flow", timesteps=family.timesteps or steps), LogNormal(math.log(shift), 1.0, *ends)
    if "beta_schedule" not in config:
        raise ValueError(
            "scheduler must be the config of one of diffusers' schedulers with betas or for flow matching, "
            f"pipe.scheduler.config; got one of {', '.join(config)}"
        )
    log_sigmas = _variance_preserving(config, prediction)
    uniform = Tabulated(tuple(log_sigmas.tolist()), (1.0,) * (len(log_sigmas) - 1))
    return made(prediction=prediction, log_sigmas=log_sigmas), uniform


def _variance_preserving(config: Mapping[str, Any], prediction: str) -> Tensor:
    """Return ln sigma at each timestep, rising, float64."""
    scheduler: Any = importlib.import_module("diffusers").DDPMScheduler
    try:
        made = scheduler(**{name: config[name] for name in BETAS if name in config})
    except NotImplementedError as error:
        raise ValueError(f"the scheduler's beta_schedule: {error}") from error
    abar = made.alphas_cumprod.double()
    if not (abar[0] < 1 and abar[-1] >= 0 and (abar.diff() < 0).all()):
        raise ValueError("the scheduler's betas must leave less of the image at each timestep than at the one before")
    if abar[-1] == 0:  # noise alone, of infinite sigma
        if prediction == "epsilon":
            raise ValueError(
                "the scheduler has noise alone at its last timestep (rescale_betas_zero_snr=True), of which "
                "prediction_type='epsilon' tells no image: set the one that the network was trained with, "
                "'v_prediction' or 'sample', or rescale_betas_zero_snr=False"
            )
        abar[-1] = abar[-2] / 4
    return ((1 - abar) / abar).log() / 2


def describe(network: Any) -> dict[str, Any]:
    """Return JSON values that `build` makes a network like this one from."""
    config = json.loads(network.to_json_string())
    return {
        "config": {name: value for name, value in config.items() if not name.startswith("_")},
        **dtypes(network),
    }


def build(described: dict[str, Any], *, kind: str) -> nn.Module:
    """Return an untrained network of class `kind`, as described."""
    made: Any = getattr(importlib.import_module("diffusers"), kind)
    network: nn.Module = made.from_config(described["config"])
    cast(network, described["dtype"], described.get("buffers", {}))
    return network


def cut(described: dict[str, Any], layers: range, *, family: LatentFamily) -> dict[str, Any]:
    """Return the description of a network of these layers alone."""
    config = dict(described["config"])
    config |= {count: len(own) for (_, count), own in zip(family.layers, _lists(config, layers, family), strict=True)}
    if "dual_attention_layers" in config:
        config["dual_attention_layers"] = [i - layers.start for i in config["dual_attention_layers"] if i in layers]
    return {**described, "config": config}


def places(network: nn.Module, described: dict[str, Any], layers: range, *, family: LatentFamily) -> Places:
    """Return where a network has what blocks were made of."""
    lists = zip(family.layers, _lists(described["config"], layers, family), strict=True)
    return Places({"stem.": "", "head.": ""}, [f"{path}.{i}." for (path, _), own in lists for i in range(len(own))])


def _lists(config: Mapping[str, Any], layers: range, family: LatentFamily) -> list[range]:
    """Return which layers of each of a network's lists are among `layers`, counted through all lists."""
    found, start = [], 0
    for _, count in family.layers:
        found.append(range(max(layers.start, start), min(layers.stop, start + config[count])))
        start += config[count]
    return found


CONVERTERS = {
    name: Converter(
        functools.partial(convert_diffusers, family=family),
        describe,
        functools.partial(build, kind=name.rpartition(".")[2]),
        functools.partial(cut, family=family),
        functools.partial(places, family=family),
    )
    for name, family in FAMILIES.items()
}
