"""The small reference models that the presets train."""

from .vit import ViT, ViTConfig

__all__ = ["ViT", "ViTConfig"]
