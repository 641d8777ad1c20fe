"""Models a config can name. Knows no data, no loss and nothing of the engine."""

from dtrain.components.models.vit import ViT

__all__ = ["ViT"]
