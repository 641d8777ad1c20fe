"""Models a config can name."""

from dtrain.components.models.pidnet import PIDNet, PIDNetWrapper
from dtrain.components.models.relation_attention import RelationAttention
from dtrain.components.models.transunet import TransUNet3D
from dtrain.components.models.unet import ResidualUNet2D, ResidualUNet3D, ResidualUNetSE3D, UNet2D, UNet3D
from dtrain.components.models.vit import ViT

__all__ = [
    "PIDNet",
    "PIDNetWrapper",
    "RelationAttention",
    "ResidualUNet2D",
    "ResidualUNet3D",
    "ResidualUNetSE3D",
    "TransUNet3D",
    "UNet2D",
    "UNet3D",
    "ViT",
]
