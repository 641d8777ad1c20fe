"""The blocks that U-Nets are made of, in 2-D and 3-D.

Shapes: N images, C channels, spatial (D, H, W) or (H, W), written (N, C, *) here. Parameter names are those of
pytorch-3dunet, so that its checkpoints load.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Layers(NamedTuple):
    """torch's layers for one number of spatial dimensions."""

    conv: Callable[..., nn.Module]
    conv_transposed: Callable[..., nn.Module]
    batchnorm: Callable[..., nn.Module]
    channel_dropout: Callable[..., nn.Module]
    pools: dict[str, Callable[..., nn.Module]]
    interpolations: tuple[str, ...]


class Conv3d(nn.Conv3d):
    """torch's convolution that keeps sizes, and on a CPU cuts a single large volume into two halves.

    For a batch of one, torch leaves a convolution with up to 20,480 channels x depth x height to a kernel of its own
    instead of oneDNN's (torch 2.13, `use_mkldnn` in ATen/native/Convolution.cpp), which takes up to ten times as long.
    So the halves, which overlap by the kernel, go as a batch of two; where no gradient is wanted, oneDNN's is called by
    its name, whose backward would be the slow one. The result is the same to rounding.

    Where the last channels came from nearest neighbours and are twice as large as before along each axis, eight voxels
    are equal, and a kernel of 3 x 3 x 3 multiplies each of them up to eight times by another weight. So
    these channels go, small as they were, through a transposed convolution with the sums of these weights: 8 instead of
    27 products for each voxel made.

    Args:
        cut_from: Voxels from which on a volume is large; 0: none is.
        arguments: torch's.

    Attributes:
        doubled: How many of the last channels are of that kind, where the sides are even.
    """

    def __init__(self, *arguments: Any, cut_from: int, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.cut_from, self.doubled = cut_from, 0

    def forward(self, x: Tensor) -> Tensor:
        """From (N, in, D, H, W) to (N, out, D, H, W)."""
        if torch.compiler.is_exporting() or x.device.type != "cpu":
            return super().forward(x)
        is_even = not any(side % 2 for side in x.shape[2:])
        if self.doubled and is_even and not torch.is_autocast_enabled("cpu"):
            return self._of_doubled(x)
        return self._plain(x, self.weight, self.bias)

    def _of_doubled(self, x: Tensor) -> Tensor:
        counts = x.shape[1] - self.doubled, self.doubled
        own, doubled = x.split(counts, 1)
        own_weight, weight = self.weight.split(counts, 1)
        for axis in (2, 3, 4):  # what each voxel adds to the four around it, along one axis after the other
            first, middle, last = weight.unbind(axis)
            weight = torch.stack((last, middle + last, first + middle, first), axis)
        below = doubled[..., ::2, ::2, ::2]
        made = F.conv_transpose3d(below, weight.transpose(0, 1), self.bias, stride=2, padding=1)
        return made + self._plain(own, own_weight, None)

    def _plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        faster = vars(self).get("_conv_forward")  # what a prediction calls instead for as long
        return faster(x, weight, bias) if faster else self._cut(x, weight, bias)

    def _cut(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        large = self.cut_from and x[0, 0].numel() >= self.cut_from
        if not large or x.shape[0] > 1 or x[0, ..., 0].numel() > 20_480:
            return F.conv3d(x, weight, bias, padding=self.padding)
        if not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")) and x.dtype == torch.float32:
            shape: tuple[Any, ...] = self.padding, self.stride, self.dilation, self.groups
            return torch.mkldnn_convolution(x, weight, bias, *shape)
        depth, border = x.shape[2], self.kernel_size[0] // 2
        half = -(-depth // 2)
        padded = F.pad(x, (0, 0, 0, 0, border, border))
        halves = torch.cat((padded[:, :, : half + 2 * border], padded[:, :, depth - half :]))
        upper, lower = F.conv3d(halves, weight, bias, padding=(0, *(side // 2 for side in self.kernel_size[1:]))).split(
            1
        )
        return torch.cat((upper, lower[:, :, 2 * half - depth :]), dim=2)


LAYERS = {
    2: Layers(
        nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.Dropout2d,
        {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}, ("nearest", "bilinear", "area"),
    ),
    3: Layers(
        nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d, nn.Dropout3d,
        {"max": nn.MaxPool3d, "avg": nn.AvgPool3d}, ("nearest", "trilinear", "area"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Style:
    """What all blocks of one network have in common.

    Args:
        dims: Spatial dimensions, 2 or 3.
        kernel_size: Voxels per side of a convolution, odd.
        order: The layers of a SingleConv, a letter for each; see SingleConv.
        num_groups: Groups of a GroupNorm; -1: as many as channels. One where there are fewer channels than that.
        dropout_prob: Probability of dropping a value (d) or a channel (D), 0 to 1.
        upscale: In which convolution a DoubleConv of the encoder widens: 2 in both, 1 in the first alone.
        se_module: Which squeeze and excitation a ResNetBlockSE has: scse, cse or sse.
        cut_from: See Conv3d.

    Raises:
        ValueError: The order or the number of groups makes no sense.
    """

    dims: int
    kernel_size: tuple[int, ...]
    order: str = "gcr"
    num_groups: int = 8
    dropout_prob: float = 0.1
    upscale: int = 2
    se_module: str = "scse"
    cut_from: int = 0

    def __post_init__(self) -> None:
        letters = set(self.order)
        if letters - set("cgbrledD") or "c" not in letters or len(letters) < len(self.order):
            raise ValueError(
                f"layer_order is {self.order!r}; possible: each letter at most once, c (convolution, needed), "
                "g (GroupNorm), b (BatchNorm), r (ReLU), l (LeakyReLU), e (ELU), d (dropout of values), "
                "D (dropout of channels)"
            )
        if self.order[0] in "rle":
            raise ValueError(f"layer_order is {self.order!r}; a non-linearity cannot come first")
        if self.num_groups < 1 and self.num_groups != -1:
            raise ValueError(f"num_groups is {self.num_groups}; possible: 1 or more, or -1 (as many as channels)")

    @property
    def layers(self) -> Layers:
        """The layers for this number of spatial dimensions."""
        return LAYERS[self.dims]

    @property
    def padding(self) -> tuple[int, ...]:
        """What keeps the size of an image in a convolution."""
        return tuple(size // 2 for size in self.kernel_size)

    def conv(self, in_channels: int, out_channels: int, bias: bool) -> nn.Module:
        """A convolution that keeps the size of an image."""
        conv = partial(Conv3d, cut_from=self.cut_from) if self.dims == 3 else self.layers.conv
        return conv(in_channels, out_channels, self.kernel_size, padding=self.padding, bias=bias)

    def groupnorm(self, channels: int) -> nn.GroupNorm:
        """A GroupNorm (Wu and He 2018, arXiv:1803.08494) over these channels."""
        groups = channels if self.num_groups == -1 else self.num_groups if channels >= self.num_groups else 1
        if channels % groups:
            fits = ", ".join(str(divisor) for divisor in range(1, channels + 1) if channels % divisor == 0)
            raise ValueError(
                f"num_groups is {groups}, which does not divide the {channels} channels of a GroupNorm; "
                f"possible: {fits}, or f_maps that are multiples of num_groups"
            )
        return nn.GroupNorm(groups, channels)


class SingleConv(nn.Sequential):
    """A convolution with its normalisation, non-linearity and dropout, (N, in, *) -> (N, out, *).

    The order's letters are layers from first to last: c convolution, g GroupNorm, b BatchNorm, r ReLU, l LeakyReLU
    (slope 0.01), e ELU, d dropout, D dropout of whole channels. A normalisation before the convolution is over the
    incoming channels. The convolution has a bias only where nothing is normalised.
    """

    def __init__(self, in_channels: int, out_channels: int, style: Style, order: str | None = None) -> None:
        super().__init__()
        order = style.order if order is None else order
        for position, letter in enumerate(order):
            channels = in_channels if position < order.index("c") else out_channels
            if letter == "c":
                bias = not {"g", "b"} & set(order)
                self.add_module("conv", style.conv(in_channels, out_channels, bias))
            elif letter == "g":
                self.add_module("groupnorm", style.groupnorm(channels))
            elif letter == "b":
                self.add_module("batchnorm", style.layers.batchnorm(channels))
            elif letter == "d":
                self.add_module("dropout", nn.Dropout(style.dropout_prob))
            elif letter == "D":
                self.add_module("dropout2d", style.layers.channel_dropout(style.dropout_prob))
            else:
                self.add_module(*_non_linearity(letter, slope=0.01))


def _non_linearity(letters: str, slope: float) -> tuple[str, nn.Module]:
    """The name and the layer of the non-linearity among an order's letters; ReLU where there is none."""
    if "l" in letters:
        return "LeakyReLU", nn.LeakyReLU(slope, inplace=True)
    return ("ELU", nn.ELU(inplace=True)) if "e" in letters else ("ReLU", nn.ReLU(inplace=True))


class DoubleConv(nn.Sequential):
    """Two convolutions, (N, in, *) -> (N, out, *): the block of U-Net (Ronneberger et al. 2015, arXiv:1505.04597).

    On the way down the first one makes out / 2 channels, but no fewer than come in (3D U-Net, arXiv:1606.06650), or
    `out` if `upscale` is 1; on the way up both make `out`.
    """

    def __init__(self, in_channels: int, out_channels: int, style: Style, *, encoder: bool) -> None:
        super().__init__()
        between = out_channels if style.upscale == 1 else max(out_channels // 2, in_channels)
        between = between if encoder else out_channels
        self.add_module("SingleConv1", SingleConv(in_channels, between, style))
        self.add_module("SingleConv2", SingleConv(between, out_channels, style))


def mark_doubled(block: nn.Module, channels: int, style: Style, factors: tuple[int, ...]) -> None:
    """Tell a DoubleConv that its last channels were enlarged so many times by nearest neighbours; see Conv3d."""
    before = style.order.partition("c")[0]
    if {*factors} == {2} and {*style.kernel_size} == {3} and "d" not in before:  # which leaves equal voxels equal
        conv: Any = block.get_submodule("SingleConv1.conv")
        conv.doubled = channels


class ResNetBlock(nn.Module):
    """Two convolutions around which the input is led and added, (N, in, *) -> (N, out, *).

    y = f(conv3(conv2(x')) + x') with x' = conv1(x), a 1 x 1 convolution, where in != out, else x' = x. conv3 has no
    non-linearity; f is the order's: LeakyReLU (slope 0.1), ELU or ReLU. Lee et al. 2017, "Superhuman Accuracy on the
    SNEMI3D Connectomics Challenge", arXiv:1706.00120.
    """

    def __init__(self, in_channels: int, out_channels: int, style: Style, *, encoder: bool) -> None:
        super().__init__()
        same = in_channels == out_channels
        self.conv1 = nn.Identity() if same else style.layers.conv(in_channels, out_channels, 1)
        self.conv2 = SingleConv(out_channels, out_channels, style)
        linear = "".join(letter for letter in style.order if letter not in "rle")
        self.conv3 = SingleConv(out_channels, out_channels, style, linear)
        self.non_linearity = _non_linearity(style.order, slope=0.1)[1]

    def forward(self, x: Tensor) -> Tensor:
        """From (N, in, *) to (N, out, *)."""
        residual = self.conv1(x)
        return self.non_linearity(self.conv3(self.conv2(residual)) + residual)


class ResNetBlockSE(ResNetBlock):
    """A ResNetBlock whose result goes through squeeze and excitation, (N, in, *) -> (N, out, *)."""

    def __init__(self, in_channels: int, out_channels: int, style: Style, *, encoder: bool) -> None:
        super().__init__(in_channels, out_channels, style, encoder=encoder)
        self.se_module = SE_MODULES[style.se_module](out_channels, style)

    def forward(self, x: Tensor) -> Tensor:
        """From (N, in, *) to (N, out, *)."""
        return self.se_module(super().forward(x))


class _ChannelSE(nn.Module):
    """cSE: each channel times a number in (0, 1) that depends on the means of all channels, (N, C, *) -> (N, C, *).

    x * sigmoid(W2 relu(W1 mean(x))), W1 and W2 being C x C here. Hu et al. 2018, arXiv:1709.01507.
    """

    def __init__(self, channels: int, style: Style) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels)
        self.fc2 = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.sigmoid(self.fc2(F.relu(self.fc1(x.flatten(2).mean(dim=2)))))  # (N, C)
        return x * weight.reshape(*weight.shape, *[1] * (x.dim() - 2))


class _SpatialSE(nn.Module):
    """sSE: each voxel times a number in (0, 1) that depends on its channels, (N, C, *) -> (N, C, *).

    x * sigmoid(w . x + b). Roy et al. 2018, arXiv:1803.02579.
    """

    def __init__(self, channels: int, style: Style) -> None:
        super().__init__()
        self.conv = style.layers.conv(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.conv(x))


class _ChannelSpatialSE(nn.Module):
    """scSE: the larger of cSE and sSE, value by value, (N, C, *) -> (N, C, *). Roy et al. 2018, arXiv:1808.08127."""

    def __init__(self, channels: int, style: Style) -> None:
        super().__init__()
        self.cSE = _ChannelSE(channels, style)
        self.sSE = _SpatialSE(channels, style)

    def forward(self, x: Tensor) -> Tensor:
        return torch.max(self.cSE(x), self.sSE(x))


SE_MODULES: dict[str, Callable[[int, Style], nn.Module]] = {
    "scse": _ChannelSpatialSE,
    "cse": _ChannelSE,
    "sse": _SpatialSE,
}
BLOCKS: dict[str, type[DoubleConv] | type[ResNetBlock]] = {
    "DoubleConv": DoubleConv,
    "ResNetBlock": ResNetBlock,
    "ResNetBlockSE": ResNetBlockSE,
}


class Interpolation(nn.Module):
    """Resizes to a given size, (N, C, *) -> (N, C, *size); no parameters."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        """From (N, C, *) to (N, C, *size)."""
        return F.interpolate(x, size=size, mode=self.mode)


class Deconvolution(nn.Module):
    """A transposed convolution, resized by nearest neighbours to a given size, (N, in, *) -> (N, out, *size)."""

    def __init__(self, in_channels: int, out_channels: int, stride: tuple[int, ...], style: Style) -> None:
        super().__init__()
        conv = style.layers.conv_transposed(
            in_channels, out_channels, style.kernel_size, stride=stride, padding=style.padding, bias=False
        )
        self.upsample = nn.ModuleDict({"conv_transposed": conv})

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        """From (N, in, *) to (N, out, *size)."""
        return F.interpolate(self.upsample["conv_transposed"](x), size=size)
