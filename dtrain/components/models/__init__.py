"""Models a config can name. Knows no data, no loss and nothing of the engine."""

from dtrain.components.models.unet import ResidualUNet2D, ResidualUNet3D, ResidualUNetSE3D, UNet2D, UNet3D
from dtrain.components.models.vit import ViT

__all__ = ["ResidualUNet2D", "ResidualUNet3D", "ResidualUNetSE3D", "UNet2D", "UNet3D", "ViT"]
