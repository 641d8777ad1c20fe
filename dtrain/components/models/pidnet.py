"""PIDNet, real-time segmentation with a branch for edges.

Shapes: N images, H x W pixels, K classes, C = `planes`. The three branches: P keeps details at 1/8 of the resolution,
I sees the context down to 1/64, D (1/8) finds boundaries and decides where P and where I is trusted.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STRIDE = 8  # the outputs' step in pixels

# (m, n, planes, ppm_planes, head_planes) of the published models.
VARIANTS = {"s": (2, 3, 32, 96, 128), "m": (2, 3, 64, 96, 128), "l": (3, 4, 64, 112, 256)}


class PIDNet(nn.Module):
    """The network with the published arguments, parameter names and sizes.

    Xu, Xiong & Bhattacharyya, "PIDNet: A Real-time Semantic Segmentation Network Inspired by PID Controllers", CVPR
    2023, arXiv:2206.02066. Weights of the authors' models fit; those trained on Cityscapes carry `model.` before each
    name. All three outputs are the published ones: the heads of P and D read rectified features, since in the authors'
    code a ReLU works in place after the features were put aside. The main output comes first, not second as there,
    since everything here takes the first as the main.

    Args:
        m: Blocks of the early stages. 2 also chooses the lighter parts of PIDNet-S and -M, another number those of -L.
        n: Blocks of the two stages of the I branch at 1/16 and 1/32.
        num_classes: K.
        planes: C, the width at 1/4 of the resolution.
        ppm_planes: Width of each scale of the pyramid pooling.
        head_planes: Width within the heads for the classes.
        augment: Also build the heads of the P and the D branch, which are used in training only.
        in_channels: Channels of the image.

    Raises:
        ValueError: A number is not positive.
    """

    def __init__(
        self,
        m: int = 2,
        n: int = 3,
        num_classes: int = 19,
        planes: int = 64,
        ppm_planes: int = 96,
        head_planes: int = 128,
        augment: bool = True,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        sizes = dict(m=m, n=n, num_classes=num_classes, planes=planes, ppm_planes=ppm_planes, head_planes=head_planes)
        for key, size in (sizes | {"in_channels": in_channels}).items():
            if size < 1:
                raise ValueError(f"PIDNet: {key} is {size}; possible: 1 and more")
        self.augment = augment
        self.relu = nn.ReLU(inplace=True)
        self._add_context_branch(in_channels, planes, m, n)
        self._add_detail_branch(planes, m)
        self._add_boundary_branch(planes, light=m == 2)
        self.spp = (PAPPM if m == 2 else DAPPM)(16 * planes, ppm_planes, 4 * planes)
        self.dfm = (LightBag if m == 2 else Bag)(4 * planes, 4 * planes)
        if augment:
            self.seghead_p = SegmentHead(2 * planes, head_planes, num_classes)
            self.seghead_d = SegmentHead(2 * planes, planes, 1)
        self.final_layer = SegmentHead(4 * planes, head_planes, num_classes)
        self._initialize()

    def _add_context_branch(self, in_channels: int, planes: int, m: int, n: int) -> None:
        """The I branch, of which the first 1/8 serves all three."""
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_channels, planes, 3, stride=2, padding=1),
            nn.BatchNorm2d(planes),
            nn.ReLU(inplace=True),
            nn.Conv2d(planes, planes, 3, stride=2, padding=1),
            nn.BatchNorm2d(planes),
            nn.ReLU(inplace=True),
        )
        self.layer1 = _basic_blocks(planes, planes, m)
        self.layer2 = _basic_blocks(planes, 2 * planes, m, stride=2)
        self.layer3 = _basic_blocks(2 * planes, 4 * planes, n, stride=2)
        self.layer4 = _basic_blocks(4 * planes, 8 * planes, n, stride=2)
        self.layer5 = nn.Sequential(Bottleneck(8 * planes, 8 * planes, stride=2), Bottleneck(16 * planes, 8 * planes))

    def _add_detail_branch(self, planes: int, m: int) -> None:
        """The P branch, and what it takes from I."""
        self.compression3 = _conv_norm(4 * planes, 2 * planes)
        self.compression4 = _conv_norm(8 * planes, 2 * planes)
        self.pag3 = PagFM(2 * planes, planes)
        self.pag4 = PagFM(2 * planes, planes)
        self.layer3_ = _basic_blocks(2 * planes, 2 * planes, m)
        self.layer4_ = _basic_blocks(2 * planes, 2 * planes, m)
        self.layer5_ = nn.Sequential(Bottleneck(2 * planes, 2 * planes))

    def _add_boundary_branch(self, planes: int, light: bool) -> None:
        """The D branch, and what it takes from I; half as wide at first in the light models."""
        width = planes if light else 2 * planes
        self.layer3_d = BasicBlock(2 * planes, width, last_relu=False)
        self.layer4_d: nn.Module = (
            nn.Sequential(Bottleneck(width, width)) if light else BasicBlock(width, width, last_relu=False)
        )
        self.diff3 = _conv_norm(4 * planes, width, kernel=3)
        self.diff4 = _conv_norm(8 * planes, 2 * planes, kernel=3)
        self.layer5_d = nn.Sequential(Bottleneck(2 * planes, 2 * planes))

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Segment images.

        Args:
            image: (N, in_channels, H, W), H and W multiples of 8; in training at least two images.

        Returns:
            Logits (N, K, H/8, W/8). In training with `augment`: a list of these, the P branch's logits
            (N, K, H/8, W/8) and the boundaries' logits (N, 1, H/8, W/8).

        Raises:
            ValueError: A side is not a multiple of 8, or a training batch holds one image.
        """
        self._check(image)
        x = self.layer1(self.conv1(image))  # (N, C, H/4, W/4)
        x = self.relu(self.layer2(self.relu(x)))  # (N, 2C, H/8, W/8)
        size = x.shape[-2:]

        detail, boundary = self.layer3_(x), self.layer3_d(x)
        x = self.relu(self.layer3(x))  # (N, 4C, H/16, W/16)
        detail = self.pag3(detail, self.compression3(x))
        boundary = boundary + _resize(self.diff3(x), size)
        # The heads of P and D read what the next stage reads, rectified: the authors' ReLU works in place.
        early_detail = F.relu(detail)

        detail, boundary = self.layer4_(early_detail), self.layer4_d(F.relu(boundary))
        x = self.relu(self.layer4(x))  # (N, 8C, H/32, W/32)
        detail = self.pag4(detail, self.compression4(x))
        boundary = boundary + _resize(self.diff4(x), size)
        early_boundary = F.relu(boundary)

        detail, boundary = self.layer5_(F.relu(detail)), self.layer5_d(early_boundary)  # (N, 4C, H/8, W/8)
        context = _resize(self.spp(self.layer5(x)), size)
        logits = self.final_layer(self.dfm(detail, context, boundary))
        if not (self.augment and self.training):
            return logits
        return [logits, self.seghead_p(early_detail), self.seghead_d(early_boundary)]

    def _check(self, image: Tensor) -> None:
        height, width = image.shape[-2:]
        if height % STRIDE or width % STRIDE:
            raise ValueError(
                f"PIDNet: an image of {height} x {width} pixels; both sides must be multiples of {STRIDE} "
                "(PIDNetWrapper takes any size)"
            )
        # Normalising what the whole image was pooled to, one number per channel, takes a second image.
        alone = self.training and len(image) == 1
        if alone and any(isinstance(module, nn.BatchNorm2d) for module in self.spp.modules()):
            raise ValueError(
                "PIDNet: a training batch of one image cannot be normalised; give each rank 2 or more (batch_size), "
                "and leave out a short last batch (drop_last: true under loaders.train)"
            )


class PIDNetWrapper(PIDNet):
    """A published PIDNet for images of any size, with logits as large as the image: for plain losses and metrics.

    Parameter names are PIDNet's own, so weights go both ways. A size that is not a multiple of 8 is filled up with the
    pixels of the right and lower border; logits are enlarged bilinearly with aligned corners, as the authors do.

    Args:
        variant: "s", "m" or "l".
        num_classes: K.
        in_channels: Channels of the image.
        deep_supervision: In training also return the logits of P and D, for PIDNetLoss. With a loss that reads the
            main output only, set it to false: heads without a gradient stop DistributedDataParallel.

    Raises:
        ValueError: An unknown variant, or a number that is not positive.
    """

    def __init__(
        self, variant: str = "s", num_classes: int = 19, in_channels: int = 3, deep_supervision: bool = True
    ) -> None:
        if str(variant).lower() not in VARIANTS:
            raise ValueError(f"PIDNetWrapper: variant is {variant!r}; possible: {', '.join(VARIANTS)}")
        m, n, planes, ppm_planes, head_planes = VARIANTS[variant.lower()]
        super().__init__(m, n, num_classes, planes, ppm_planes, head_planes, deep_supervision, in_channels)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Segment images.

        Args:
            image: (N, in_channels, H, W); in training at least two images.

        Returns:
            Logits (N, K, H, W). In training with `deep_supervision`: a list of these, the P branch's logits
            (N, K, H, W) and the boundaries' logits (N, 1, H, W).

        Raises:
            ValueError: A training batch holds one image.
        """
        height, width = image.shape[-2:]
        if height % STRIDE or width % STRIDE:
            image = F.pad(image, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")
        outputs = super().forward(image)
        if isinstance(outputs, Tensor):
            return _enlarge(outputs, image, height, width)
        return [_enlarge(output, image, height, width) for output in outputs]


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, (N, inplanes, H, W) -> (N, planes, H/stride, W/stride)."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1, last_relu: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = _shortcut(inplanes, planes, stride)
        self.last_relu = last_relu

    def forward(self, x: Tensor) -> Tensor:
        """Shapes as above."""
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out = out + (x if self.downsample is None else self.downsample(x))
        return self.relu(out) if self.last_relu else out


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1 and a shortcut without a final ReLU, (N, inplanes, H, W) -> (N, 2 planes, H/s, W/s)."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 2 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(2 * planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inplanes, 2 * planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes as above."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.bn3(self.conv3(out)) + (x if self.downsample is None else self.downsample(x))


class SegmentHead(nn.Module):
    """What turns a branch into logits, (N, inplanes, h, w) -> (N, outplanes, h, w)."""

    def __init__(self, inplanes: int, interplanes: int, outplanes: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inplanes)
        self.conv1 = nn.Conv2d(inplanes, interplanes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(interplanes)
        self.conv2 = nn.Conv2d(interplanes, outplanes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes as above."""
        return self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


class PagFM(nn.Module):
    """P takes from I where both agree (pixel-attention-guided fusion), section 4.1 of the paper."""

    def __init__(self, inplanes: int, midplanes: int) -> None:
        super().__init__()
        self.f_x = _conv_norm(inplanes, midplanes)
        self.f_y = _conv_norm(inplanes, midplanes)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """P's x (N, 2C, h, w) and I's y (N, 2C, h', w') -> (N, 2C, h, w)."""
        size = x.shape[-2:]
        agreement = (self.f_x(x) * _resize(self.f_y(y), size)).sum(dim=1, keepdim=True).sigmoid()
        return (1 - agreement) * x + agreement * _resize(y, size)


class LightBag(nn.Module):
    """Boundaries choose between detail and context (Light-Bag), section 4.3 of the paper."""

    def __init__(self, inplanes: int, outplanes: int) -> None:
        super().__init__()
        self.conv_p = _conv_norm(inplanes, outplanes)
        self.conv_i = _conv_norm(inplanes, outplanes)

    def forward(self, detail: Tensor, context: Tensor, boundary: Tensor) -> Tensor:
        """Three times (N, 4C, h, w) -> (N, 4C, h, w)."""
        edge = boundary.sigmoid()
        return self.conv_p((1 - edge) * context + detail) + self.conv_i(context + edge * detail)


class Bag(nn.Module):
    """The same choice with a 3 x 3 convolution after it (Bag), for PIDNet-L."""

    def __init__(self, inplanes: int, outplanes: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(*_norm_conv(inplanes, outplanes, kernel=3))

    def forward(self, detail: Tensor, context: Tensor, boundary: Tensor) -> Tensor:
        """Three times (N, 4C, h, w) -> (N, 4C, h, w)."""
        edge = boundary.sigmoid()
        return self.conv(edge * detail + (1 - edge) * context)


class PAPPM(nn.Module):
    """Context of five sizes at once, (N, inplanes, h, w) -> (N, outplanes, h, w); section 4.2 of the paper."""

    def __init__(self, inplanes: int, branch_planes: int, outplanes: int) -> None:
        super().__init__()
        self.scale0, self.scale1, self.scale2, self.scale3, self.scale4 = _scales(inplanes, branch_planes)
        self.compression = nn.Sequential(*_norm_conv(5 * branch_planes, outplanes))
        self.shortcut = nn.Sequential(*_norm_conv(inplanes, outplanes))
        self.scale_process = nn.Sequential(*_norm_conv(4 * branch_planes, 4 * branch_planes, kernel=3, groups=4))

    def forward(self, x: Tensor) -> Tensor:
        """Shapes as above."""
        size = x.shape[-2:]
        finest = self.scale0(x)
        coarser = [_resize(scale(x), size) + finest for scale in (self.scale1, self.scale2, self.scale3, self.scale4)]
        processed = self.scale_process(torch.cat(coarser, dim=1))
        return self.compression(torch.cat((finest, processed), dim=1)) + self.shortcut(x)


class DAPPM(nn.Module):
    """The same scales one after the other, each refined by the next coarser one, for PIDNet-L.

    Hong et al., "Deep Dual-Resolution Networks for Real-time and Accurate Semantic Segmentation", arXiv:2101.06085.
    """

    def __init__(self, inplanes: int, branch_planes: int, outplanes: int) -> None:
        super().__init__()
        self.scale0, self.scale1, self.scale2, self.scale3, self.scale4 = _scales(inplanes, branch_planes)
        self.compression = nn.Sequential(*_norm_conv(5 * branch_planes, outplanes))
        self.shortcut = nn.Sequential(*_norm_conv(inplanes, outplanes))
        self.process1 = nn.Sequential(*_norm_conv(branch_planes, branch_planes, kernel=3))
        self.process2 = nn.Sequential(*_norm_conv(branch_planes, branch_planes, kernel=3))
        self.process3 = nn.Sequential(*_norm_conv(branch_planes, branch_planes, kernel=3))
        self.process4 = nn.Sequential(*_norm_conv(branch_planes, branch_planes, kernel=3))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inplanes, h, w) -> (N, outplanes, h, w)."""
        size = x.shape[-2:]
        found: list[Tensor] = [self.scale0(x)]
        scales = (self.scale1, self.scale2, self.scale3, self.scale4)
        processes = (self.process1, self.process2, self.process3, self.process4)
        for scale, process in zip(scales, processes, strict=True):
            found.append(process(_resize(scale(x), size) + found[-1]))
        return self.compression(torch.cat(found, dim=1)) + self.shortcut(x)


def _scales(inplanes: int, branch_planes: int) -> Iterator[nn.Sequential]:
    """The five scales that PAPPM and DAPPM share: as it is, pooled by 2, 4 and 8, and the whole image."""
    yield nn.Sequential(*_norm_conv(inplanes, branch_planes))
    for stride in (2, 4, 8):
        yield nn.Sequential(nn.AvgPool2d(2 * stride + 1, stride, stride), *_norm_conv(inplanes, branch_planes))
    yield nn.Sequential(nn.AdaptiveAvgPool2d(1), *_norm_conv(inplanes, branch_planes))


def _norm_conv(inplanes: int, outplanes: int, kernel: int = 1, groups: int = 1) -> Iterator[nn.Module]:
    yield nn.BatchNorm2d(inplanes)
    yield nn.ReLU(inplace=False)  # what is normalised here is used elsewhere too
    yield nn.Conv2d(inplanes, outplanes, kernel, padding=kernel // 2, groups=groups, bias=False)


def _conv_norm(inplanes: int, outplanes: int, kernel: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inplanes, outplanes, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outplanes))


def _basic_blocks(inplanes: int, planes: int, blocks: int, stride: int = 1) -> nn.Sequential:
    """Blocks of which only the last has no final ReLU; one alone has it."""
    first = BasicBlock(inplanes, planes, stride)
    others = (BasicBlock(planes, planes, last_relu=number < blocks - 1) for number in range(1, blocks))
    return nn.Sequential(first, *others)


def _shortcut(inplanes: int, planes: int, stride: int) -> nn.Module | None:
    if stride == 1 and inplanes == planes:
        return None
    conv = nn.Conv2d(inplanes, planes, 1, stride=stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(planes))


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=list(size), mode="bilinear", align_corners=False)


def _enlarge(logits: Tensor, padded: Tensor, height: int, width: int) -> Tensor:
    """Logits (N, K, h, w) at the padded image's size, (N, K, height, width) of them."""
    logits = F.interpolate(logits, size=list(padded.shape[-2:]), mode="bilinear", align_corners=True)
    return logits[..., :height, :width]
