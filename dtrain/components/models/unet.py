"""U-Nets in 2-D and 3-D with pytorch-3dunet's arguments and weights.

Shapes: N images, C channels in, K channels out, spatial (D, H, W) or (H, W). The arguments of all five networks are
described once, at `_UNet`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from dtrain.components.models.unet_blocks import (
    BLOCKS,
    LAYERS,
    SE_MODULES,
    Deconvolution,
    Interpolation,
    Style,
    mark_doubled,
)

LARGE = 2**16  # voxels of a volume that is worth being cut on a CPU; see Conv3d


class _UNet(nn.Module):
    """What all U-Nets here share; their docstrings say what differs.

    Blocks of convolutions on the way down, each but the first after a pooling; on the way up the result is enlarged to
    the size of the block of the same level, joined with what that block made, and goes through a block again; a 1 x 1
    convolution makes the logits. Any size works that is not pooled away: at least pool_kernel_size ** (levels - 1).

    Arguments, defaults, parameter names and the order of random numbers are those of pytorch-3dunet 1.9 (Wolny et al.
    2020, eLife 9:e57613), so that its configs and checkpoints go both ways. What differs:

    * Logits are returned always. `final_sigmoid` and `is_segmentation` say what makes probabilities of them, and that
      is left to metrics and predictors: the attribute `postprocess` is "sigmoid", "softmax" or "none".
    * From `conv_kernel_size` on, the arguments act here, which in pytorch-3dunet cannot be reached from a config.

    Args:
        in_channels: C.
        out_channels: K, classes or targets.
        final_sigmoid: The logits are of K independent yes-or-no questions (sigmoid); False: of K classes (softmax).
        f_maps: Channels of each level from top to bottom; one number stands for f, 2f, 4f, ... over `num_levels`.
        layer_order: The layers of a convolution, a letter for each: c convolution, g GroupNorm, b BatchNorm, r ReLU,
            l LeakyReLU, e ELU, d dropout of values, D dropout of channels.
        num_groups: Groups of each GroupNorm; -1: as many as channels, which is an instance norm. One group where there
            are fewer channels than groups.
        num_levels: Number of levels. Default: as many as f_maps has, or the class's own number.
        is_segmentation: False: the logits are the result itself, as in regression.
        conv_padding: Only what keeps sizes, half the kernel, is possible; it is the default.
        conv_upscale: 2: both convolutions of a DoubleConv on the way down add channels; 1: the first alone does.
        upsample: How a level is enlarged on the way up: nearest | bilinear (2-D) | trilinear (3-D) | area | deconv, a
            transposed convolution; all joined by concatenation. default: nearest for DoubleConv; for ResNetBlocks
            deconv, joined by a sum.
        dropout_prob: Probability of dropping, for d and D in `layer_order`.
        conv_kernel_size: Voxels per side of a convolution, odd; one number, or one per dimension.
        pool_kernel_size: By how much a level is smaller than the one above; one number, or one per dimension such as
            [1, 2, 2] for thick slices.
        pool_type: max | avg.
        basic_module: DoubleConv | ResNetBlock | ResNetBlockSE. Default: the class's own.
        se_module: What a ResNetBlockSE excites: scse (both, the default), cse (channels), sse (voxels).
        deep_supervision: In train mode, also return logits of the lower levels on the way up, each by a 1 x 1
            convolution of its own, for the loss DeepSupervision (Lee et al. 2015, arXiv:1409.5185; Isensee et al. 2021,
            nnU-Net). In eval mode nothing changes, and all other parameters keep their names.

    Raises:
        ValueError: An argument has no meaning, or contradicts another one.
    """

    dims: ClassVar[int] = 3
    levels: ClassVar[int] = 4
    block: ClassVar[str] = "DoubleConv"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        final_sigmoid: bool = True,
        f_maps: int | Sequence[int] = 64,
        layer_order: str = "gcr",
        num_groups: int = 8,
        num_levels: int | None = None,
        is_segmentation: bool = True,
        conv_padding: int | Sequence[int] | None = None,
        conv_upscale: Literal[1, 2] = 2,
        upsample: str = "default",
        dropout_prob: float = 0.1,
        conv_kernel_size: int | Sequence[int] = 3,
        pool_kernel_size: int | Sequence[int] = 2,
        pool_type: Literal["max", "avg"] = "max",
        basic_module: Literal["DoubleConv", "ResNetBlock", "ResNetBlockSE"] | None = None,
        se_module: Literal["scse", "cse", "sse"] | None = None,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        block = basic_module or self.block
        layers = LAYERS[self.dims]
        _one_of("basic_module", block, BLOCKS)
        _one_of("pool_type", pool_type, layers.pools)
        _one_of("conv_upscale", conv_upscale, (1, 2))
        _one_of("upsample", upsample, ("default", *layers.interpolations, "deconv"))
        kernel = _kernel(conv_kernel_size, conv_padding, self.dims)
        excited = _excited(block, se_module)
        style = Style(self.dims, kernel, layer_order, num_groups, dropout_prob, conv_upscale, excited)
        self.in_channels = in_channels
        self.pool = _sides("pool_kernel_size", pool_kernel_size, self.dims)
        channels = _channels(f_maps, num_levels, self.levels)
        styles = [replace(style, cut_from=LARGE // math.prod(self.pool) ** level) for level in range(len(channels))]
        self.postprocess = "none" if not is_segmentation else "sigmoid" if final_sigmoid else "softmax"
        self.encoders = nn.ModuleList(
            _Encoder(above, here, block, styles[level], layers.pools[pool_type](self.pool) if level else None)
            for level, (above, here) in enumerate(pairwise((in_channels, *channels)))
        )
        self.decoders = nn.ModuleList(
            _Decoder(channels[level + 1], channels[level], block, styles[level], upsample, self.pool)
            for level in reversed(range(len(channels) - 1))
        )
        self.final_conv = layers.conv(channels[0], out_channels, 1)
        lower = channels[1:-1] if deep_supervision else ()
        self.deep_heads = nn.ModuleList(layers.conv(width, out_channels, 1) for width in lower)  # from top to bottom
        self.deep_supervision = deep_supervision

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Make the logits of images.

        Args:
            x: (N, C, D, H, W); of a 2-D network (N, C, H, W), or (N, C, 1, H, W), which is how pytorch-3dunet's files
                hold images.

        Returns:
            Logits of the same size: (N, K, D, H, W) or (N, K, H, W), or (N, K, 1, H, W). With `deep_supervision`, in
            train mode, a list: these, then those of each lower level on the way up, in that level's size.

        Raises:
            ValueError: The dimensions or channels are wrong, or the image is too small for the number of levels.
        """
        if self.dims == 2 and x.dim() == 5 and x.shape[2] == 1:
            made = self(x.squeeze(2))
            return [item.unsqueeze(2) for item in made] if isinstance(made, list) else made.unsqueeze(2)
        self._check_size(x)
        skips = []
        for encoder in self.encoders:
            x = encoder(x)
            skips.append(x)
        skips.pop()
        levels = []
        for decoder in self.decoders:
            x = decoder(skips.pop(), x)
            levels.append(x)
        main = self.final_conv(x)
        if not (self.deep_supervision and self.training):
            return main
        return [main, *(head(level) for head, level in zip(self.deep_heads, levels[-2::-1], strict=True))]

    def _check_size(self, x: Tensor) -> None:
        name, axes = type(self).__name__, "DHW"[-self.dims :]
        if x.dim() != self.dims + 2 or x.shape[1] != self.in_channels:
            wanted = f"(N, {self.in_channels}, {', '.join(axes)})"
            raise ValueError(f"{name}: expected {wanted}, found a tensor of shape {tuple(x.shape)}")
        least = [side ** (len(self.encoders) - 1) for side in self.pool]
        if any(size < side for size, side in zip(x.shape[2:], least, strict=True)):
            sizes = " x ".join(map(str, x.shape[2:]))
            raise ValueError(
                f"{name}: {len(self.encoders)} levels need an image of at least {' x '.join(map(str, least))} voxels "
                f"({' x '.join(axes)}), found {sizes}; use larger patches or fewer levels"
            )


class UNet3D(_UNet):
    """3D U-Net, (N, C, D, H, W) -> (N, K, D, H, W): DoubleConv blocks, 4 levels, joined by concatenation.

    Çiçek et al. 2016, "3D U-Net: Learning Dense Volumetric Segmentation from Sparse Annotation", arXiv:1606.06650.
    """


class ResidualUNet3D(_UNet):
    """Residual symmetric U-Net, (N, C, D, H, W) -> (N, K, D, H, W): ResNetBlocks, 5 levels, joined by a sum.

    Lee et al. 2017, "Superhuman Accuracy on the SNEMI3D Connectomics Challenge", arXiv:1706.00120.
    """

    levels = 5
    block = "ResNetBlock"


class ResidualUNetSE3D(_UNet):
    """ResidualUNet3D with concurrent squeeze and excitation after each block, (N, C, D, H, W) -> (N, K, D, H, W).

    Roy et al. 2018, "Recalibrating Fully Convolutional Networks with Spatial and Channel 'Squeeze & Excitation'
    Blocks", arXiv:1808.08127.
    """

    levels = 5
    block = "ResNetBlockSE"


class UNet2D(_UNet):
    """U-Net, (N, C, H, W) -> (N, K, H, W): DoubleConv blocks, 4 levels, joined by concatenation.

    Ronneberger et al. 2015, "U-Net: Convolutional Networks for Biomedical Image Segmentation", arXiv:1505.04597; here
    convolutions keep the size.
    """

    dims = 2


class ResidualUNet2D(_UNet):
    """Residual U-Net, (N, C, H, W) -> (N, K, H, W): ResNetBlocks, 5 levels, joined by a sum; see ResidualUNet3D."""

    dims = 2
    levels = 5
    block = "ResNetBlock"


class _Encoder(nn.Module):
    """One level on the way down: pooling, except on the first level, and a block, (N, in, *) -> (N, out, * / pool)."""

    def __init__(
        self, in_channels: int, out_channels: int, block: str, style: Style, pooling: nn.Module | None
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.basic_module = BLOCKS[block](in_channels, out_channels, style, encoder=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.basic_module(x if self.pooling is None else self.pooling(x))


class _Decoder(nn.Module):
    """One level on the way up: enlarge what came from below, join it with what this level made before, and a block.

    (N, out, *) of this level and (N, in, * / pool) from below -> (N, out, *).
    """

    def __init__(
        self, in_channels: int, out_channels: int, block: str, style: Style, upsample: str, pool: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.adds = upsample == "default" and block != "DoubleConv"
        if upsample == "default":
            upsample = "deconv" if self.adds else "nearest"
        self.upsampling: nn.Module = Interpolation(upsample)
        if upsample == "deconv":
            self.upsampling = Deconvolution(in_channels, out_channels, pool, style)
            in_channels = out_channels
        joined = in_channels if self.adds else in_channels + out_channels
        self.basic_module = BLOCKS[block](joined, out_channels, style, encoder=False)
        if block == "DoubleConv" and upsample == "nearest" and style.dims == 3:
            mark_doubled(self.basic_module, in_channels, style, pool)

    def forward(self, skip: Tensor, below: Tensor) -> Tensor:
        above = self.upsampling(below, skip.shape[2:])
        return self.basic_module(skip + above if self.adds else torch.cat((skip, above), dim=1))


def _one_of(key: str, value: object, possible: Iterable[object]) -> None:
    if value not in possible:
        raise ValueError(f"{key} is {value!r}; possible: {', '.join(map(str, possible))}")


def _sides(key: str, size: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """One number, or one per spatial dimension, as the latter."""
    sides = tuple(size) if isinstance(size, Sequence) else (size,) * dims
    if len(sides) != dims or any(not isinstance(side, int) or side < 1 for side in sides):
        raise ValueError(f"{key} is {size!r}; possible: one positive whole number, or {dims} of them")
    return sides


def _kernel(
    conv_kernel_size: int | Sequence[int], conv_padding: int | Sequence[int] | None, dims: int
) -> tuple[int, ...]:
    """The convolutions' kernel, which with its padding must keep sizes."""
    kernel = _sides("conv_kernel_size", conv_kernel_size, dims)
    if any(side % 2 == 0 for side in kernel):
        raise ValueError(f"conv_kernel_size is {conv_kernel_size!r}; only odd sizes can keep the size of an image")
    half = tuple(side // 2 for side in kernel)
    given = half if conv_padding is None else conv_padding
    if (tuple(given) if isinstance(given, Sequence) else (given,) * dims) != half:
        raise ValueError(
            f"conv_padding is {conv_padding!r}, which changes the size of an image, and what cannot be joined results; "
            f"a kernel of {conv_kernel_size!r} needs {half[0] if len(set(half)) == 1 else list(half)}, or leave it out"
        )
    return kernel


def _excited(block: str, se_module: str | None) -> str:
    """What a ResNetBlockSE excites."""
    if se_module is not None and block != "ResNetBlockSE":
        raise ValueError(f"se_module is {se_module!r}, but a {block} has none; it needs basic_module: ResNetBlockSE")
    _one_of("se_module", se_module or "scse", SE_MODULES)
    return se_module or "scse"


def _channels(f_maps: int | Sequence[int], num_levels: int | None, default_levels: int) -> tuple[int, ...]:
    """The channels of each level, from top to bottom."""
    if isinstance(f_maps, Sequence):
        channels = tuple(f_maps)
        if num_levels not in (None, len(channels)):
            raise ValueError(f"f_maps names {len(channels)} levels, num_levels says {num_levels}; leave num_levels out")
    else:
        levels = default_levels if num_levels is None else num_levels
        channels = tuple(f_maps * 2**level for level in range(levels))
    if len(channels) < 2 or any(not isinstance(number, int) or number < 1 for number in channels):
        raise ValueError(f"f_maps {f_maps!r} makes the levels {list(channels)}; a U-Net has at least two")
    return channels
