"""What makes a model's layers faster on a CPU while nothing is trained: their layout, and which kernel is called."""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the dimensions of a convolution's weights
CONTIGUOUS = dict.fromkeys(CHANNELS_LAST, torch.contiguous_format)
LEFT_TO_TORCH = 20_480  # channels x depth x height of a single volume, up to which torch calls its own kernel
BLOCK = 1 << 18  # values that are summed up in float32 before the sums are added in float64; they fit into a cache
LANES = {"AVX512": 16, "AVX2": 8}  # output channels that oneDNN's kernels compute at a time, whether there are so many


@contextlib.contextmanager
def laid_out(module: nn.Module) -> Iterator[None]:
    """Lay the weights of a model's convolutions out channels last: that is up to 45 % faster.

    For one volume at a time, torch leaves small 3-D convolutions to a kernel of its own, which takes up to ten times as
    long as oneDNN's; these call oneDNN's by its name. The result is the same to rounding. Those with few output
    channels compute several voxels at once, see `_side_by_side`.

    GroupNorm sums up a whole channel in float32 in that layout, one value after another (torch 2.13), which puts its
    result off by 1e-4 to 1e-1 in a volume of 64 x 96 x 96; so its layers are called with sums as exact as in the usual
    layout for as long.

    A model in which a kernel reaches no farther than its padding, along any axis, is left as it is: oneDNN 3.12 crashes
    of some of these.
    """
    if any(isinstance(layer, nn.Conv2d | nn.Conv3d) and _pads_too_far(layer) for layer in module.modules()):
        yield
        return
    norms = [layer for layer in module.modules() if type(layer) is nn.GroupNorm and "forward" not in vars(layer)]
    convolutions = [layer for layer in module.modules() if isinstance(layer, nn.Conv3d) and _is_plain(layer)]
    lay_out(module, CHANNELS_LAST)
    for norm in norms:
        norm.forward = functools.partial(_normalised, norm)  # type: ignore[method-assign]
    for convolution in convolutions:
        convolution._conv_forward = functools.partial(_convolved, convolution)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward
        for convolution in convolutions:
            del convolution._conv_forward
        lay_out(module, CONTIGUOUS)


def lay_out(module: nn.Module, layouts: Mapping[int, torch.memory_format]) -> None:
    """Change the layout of a model's weights, in place."""
    for parameter in module.parameters():
        if parameter.dim() in layouts:
            parameter.data = parameter.data.contiguous(memory_format=layouts[parameter.dim()])


def _pads_too_far(layer: nn.Conv2d | nn.Conv3d) -> bool:
    sides = () if isinstance(layer.padding, str) else zip(layer.padding, layer.kernel_size, layer.dilation, strict=True)
    return any(padding > (side - 1) * dilation for padding, side, dilation in sides)


def _is_plain(layer: nn.Conv3d) -> bool:
    """Whether nothing but its weights says what it computes."""
    is_own = type(layer)._conv_forward is nn.Conv3d._conv_forward and "_conv_forward" not in vars(layer)
    return is_own and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _convolved(layer: nn.Conv3d, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the layer gives for (N, C, D, H, W); see `use_mkldnn` in torch's ATen/native/Convolution.cpp."""
    is_float = images.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    is_known = is_float and images.dim() == 5 and images.device.type == "cpu" and not torch.is_grad_enabled()
    padding: Any = layer.padding  # no text, see `_is_plain`
    if is_known and (count := _beside(layer, images, weight)) > 1:
        return _side_by_side(images, weight, bias, padding, layer.stride, count)
    if is_known and len(images) == 1 and _is_left_to_torch(images, weight):
        return torch.mkldnn_convolution(images, weight, bias, padding, layer.stride, layer.dilation, layer.groups)
    return type(layer)._conv_forward(layer, images, weight, bias)


def _is_left_to_torch(images: Tensor, weight: Tensor) -> bool:
    """Whether torch would call its own kernel, and that would be slower.

    Of one voxel it is a plain product, but of images that are copied into the usual layout first.
    """
    is_small = images[0, ..., 0].numel() <= LEFT_TO_TORCH
    return is_small and (weight[0, 0].numel() > 1 or not images.is_contiguous())


def _beside(layer: nn.Conv3d, images: Tensor, weight: Tensor) -> int:
    """How many voxels of a row are to be computed at once."""
    steps = {layer.stride[-1], layer.groups, *layer.dilation}
    lanes = LANES.get(torch.backends.cpu.get_cpu_capability(), 0)
    width = images.shape[-1] + 2 * int(layer.padding[-1]) - weight.shape[-1] + 1
    if steps != {1} or weight.shape[-1] == 1 or width < 1:
        return 1
    count = 1
    # A row that would be one step is left: of one channel, oneDNN takes memory for it that is not the image's.
    while 2 * count * len(weight) <= lanes and width % (2 * count) == 0 and width > 2 * count:
        count *= 2
    return count


def _side_by_side(
    images: Tensor, weight: Tensor, bias: Tensor | None, padding: Any, stride: Sequence[int], count: int
) -> Tensor:
    """A convolution of few output channels, of which `count` voxels of a row are computed as channels of one.

    oneDNN computes 16 output channels (AVX-512) whether there are so many or not. With 4 of them, four voxels fit: a
    kernel as wide as these four reach, 6 instead of 3, goes from every fourth voxel to the next, and its weights are
    the layer's, shifted by a voxel for each of the four, else 0. These are half of the products, and what is made lies
    in memory as the layer's result does, channels last. The sums are the same, but for the zeros in them.

    Args:
        images: (N, C, D, H, W).
        weight: (K, C, d, h, w) of a kernel that goes from voxel to voxel along W.
        bias: (K,) or None.
        padding: Along D, H, W.
        stride: Along D, H, W; the last one is 1.
        count: Voxels at once, which divides the result's width.

    Returns:
        (N, K, D', H', W').
    """
    channels, width = len(weight), weight.shape[-1]
    wide = weight.new_zeros(count, *weight.shape[:-1], width + count - 1)
    for place in range(count):
        wide[place, ..., place : place + width] = weight
    layout = CHANNELS_LAST[5]
    if images.shape[1] == 1:  # both layouts are one; the strides say which is meant
        images = images.contiguous()
        images = images.as_strided(images.shape, (images.stride(0), 1, *images.stride()[2:]))
    kernel = wide.flatten(0, 1).contiguous(memory_format=layout)
    biases = None if bias is None else bias.repeat(count)
    made = torch.mkldnn_convolution(
        images.contiguous(memory_format=layout), kernel, biases, padding, (*stride[:-1], count), (1, 1, 1), 1
    )
    return made.movedim(1, -1).unflatten(-1, (count, channels)).flatten(-3, -2).movedim(-1, 1)


def _normalised(norm: nn.GroupNorm, images: Tensor) -> Tensor:
    """What the layer gives for (N, C, *spatial)."""
    layout = CHANNELS_LAST.get(images.dim()) if images.dtype == torch.float32 else None
    if layout is None or images.is_contiguous() or not images.is_contiguous(memory_format=layout):
        return F.group_norm(images, norm.num_groups, norm.weight, norm.bias, norm.eps)
    made = []
    for image in images.split(1):
        mean, variance = _moments(image.movedim(1, -1).reshape(-1, norm.num_channels), norm.num_groups)
        made.append(F.batch_norm(image, mean, variance, norm.weight, norm.bias, eps=norm.eps))
    return made[0] if len(made) == 1 else torch.cat(made)


def _moments(voxels: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each group of channels, as one value per channel (C), of voxels (n, C).

    Those of blocks are put together: Chan, Golub and LeVeque 1979, Updating formulae and a pairwise algorithm for
    computing sample variances.
    """
    means, squares, lengths = [], [], []
    for block in voxels.split(max(1, BLOCK // voxels.shape[1])):
        means.append(block.mean(0))
        squares.append((block - means[-1]).square_().sum(0))
        lengths.append(len(block))
    of_blocks = torch.stack(means).double().unflatten(1, (groups, -1))  # (blocks, groups, C of a group)
    weights = torch.tensor(lengths, dtype=torch.float64)[:, None, None].expand_as(of_blocks)
    values = weights.sum((0, 2))
    mean = (weights * of_blocks).sum((0, 2)) / values
    between = (weights * (of_blocks - mean[:, None]).square()).sum((0, 2))
    variance = (torch.stack(squares).double().unflatten(1, (groups, -1)).sum((0, 2)) + between) / values
    size = of_blocks.shape[2]
    return mean.float().repeat_interleave(size), variance.float().repeat_interleave(size)
