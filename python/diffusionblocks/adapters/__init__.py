"""One file an architecture: its run's config, and what is x, y, the walk, the loss."""

from ..config import TrainConfig
from .base import Adapter
from .recurrent import RecurrentAdapter
from .vit import ViTAdapter

ADAPTERS: dict[str, type[Adapter]] = {
    "recurrent": RecurrentAdapter,
    "vit": ViTAdapter,
}


def adapter_of(config: TrainConfig) -> Adapter:
    """The config's architecture."""
    return ADAPTERS[config.architecture](config)
