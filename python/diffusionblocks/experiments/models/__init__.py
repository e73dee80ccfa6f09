"""The small reference models that the recipes train."""

from .vit import ViT, ViTConfig

__all__ = ["ViT", "ViTConfig"]
