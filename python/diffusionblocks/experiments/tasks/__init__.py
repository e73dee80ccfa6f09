"""One file an architecture: its run's config, and what is x, y, the walk, the loss."""

from ..config import TrainConfig
from .base import Adapter, Metric
from .causal_lm import CausalLMAdapter
from .dit import DiTAdapter
from .masked_lm import MaskedLMAdapter
from .recurrent import RecurrentAdapter
from .vit import ViTAdapter

__all__ = ["ADAPTERS", "Adapter", "Metric", "adapter_of"]

ADAPTERS: dict[str, type[Adapter]] = {
    "causal_lm": CausalLMAdapter,
    "masked_lm": MaskedLMAdapter,
    "recurrent": RecurrentAdapter,
    "dit": DiTAdapter,
    "vit": ViTAdapter,
}


def adapter_of(config: TrainConfig) -> Adapter:
    """The config's architecture."""
    return ADAPTERS[config.architecture](config)
