"""A 3-D TransUNet that takes one ConfigDict.

Shapes: N volumes, C channels, D x H x W voxels, P tokens on a grid, E = `hidden_size` numbers per token.
"""

import difflib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Triple = tuple[int, int, int]
BASE_WIDTH = 16  # channels at the first level for a width_factor of 1
LEVELS = 4  # of the backbone: the root and three stages, each at half the size where the patch is large enough

REQUIRED = {
    "": ("in_channels", "n_classes", "hidden_size", "img_size", "patches", "resnet", "transformer", "decoder_channels"),
    "resnet": ("num_layers",),
    "transformer": ("mlp_dim", "num_heads", "num_layers"),
}
OPTIONAL = {
    "": (
        *("name", "classifier", "patch_size", "n_skip", "skip_channels", "activation", "final_activation"),
        *("representation_size", "pretrained_path", "resnet_pretrained_path", "parallel"),
    ),
    "patches": ("grid", "size"),
    "resnet": ("width_factor",),
    "transformer": ("attention_dropout_rate", "dropout_rate"),
}
# Keys of the published models that have one possible value here, and what to do instead of another.
FIXED = {
    "representation_size": "there is no such layer; leave it out or null",
    "pretrained_path": "name the file under trainer.pre_trained",
    "resnet_pretrained_path": "name a file for the whole model under trainer.pre_trained",
    "parallel": "ranks are torchrun's; leave it out or false",
}
ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "elu": nn.ELU, "gelu": nn.GELU}
PROBABILITIES = ("softmax", "sigmoid")  # what the published configs mean by `activation`


class TransUNet3D(nn.Module):
    """Segmentation of volumes: convolutions, then a transformer over their coarsest features, then a U-Net's decoder.

    After Chen et al., "TransUNet: Transformers Make Strong Encoders for Medical Image Segmentation", 2021,
    arXiv:2102.04306, whose config keys it takes. What 3-D changes: residual blocks of two convolutions with GroupNorm,
    a quarter of the width, trilinear resampling. Volumes need not be of `img_size`: the learned positions are
    resampled to the tokens there are, and each decoder level to the size of its skip connection.

    Args:
        config: One `ml_collections.ConfigDict` (or what reads like one); it is read only. Sizes are a number or one
            per axis.

            - `in_channels`, `n_classes`, `hidden_size` (E).
            - `img_size`: voxels per axis for which the positions are learned.
            - `patches`: {`grid`: tokens per axis, `size`: voxels per token and axis}; one of them gives the other.
            - `resnet`: {`num_layers`: blocks of the three stages, `width_factor`: of the channels 16, 32, 64, 128
              (1)}. A level halves an axis as long as the patch's size can be halved.
            - `transformer`: {`mlp_dim`, `num_heads`, `num_layers`, `attention_dropout_rate` (0),
              `dropout_rate` (0)}.
            - `decoder_channels`: of the four levels, from coarse to fine.
            - `skip_channels`: to which the skip connections of these levels are reduced, 0 for none; the last is the
              full size, which has none. `n_skip`: how many of the first are used, 0 to 3 (3).
            - `activation`: of the convolutions: relu, leaky_relu, elu or gelu (relu). Or, as in the published configs,
              softmax or sigmoid: what makes probabilities of the logits, which is left to metrics and predictors and
              is the attribute `postprocess` ("softmax" unless said).
            - `patch_size`: `patches.size` again; `classifier`: seg; `name`: not read; `final_activation`,
              `representation_size`, `pretrained_path`, `resnet_pretrained_path`, `parallel`: null.

    Raises:
        TypeError: The config is not a ConfigDict.
        ValueError: A key is missing, unknown, or has a value that is not possible.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        settings = _read(config)
        channels = settings.backbone_channels
        self.backbone = _Backbone(settings)
        self.embed = nn.Conv3d(channels[-1], settings.hidden_size, settings.rest, stride=settings.rest)
        self.rest, self.grid, self.postprocess = settings.rest, settings.grid, settings.postprocess
        self.positions = nn.Parameter(torch.zeros(1, settings.hidden_size, *settings.grid))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.dropout = nn.Dropout(settings.dropout)
        self.layers = nn.ModuleList(_Layer(settings) for _ in range(settings.layers))
        self.norm = nn.LayerNorm(settings.hidden_size)
        self.decoder = _Decoder(settings)
        self.head = nn.Conv3d(settings.decoder_channels[-1], settings.n_classes, 3, padding=1)

    def forward(self, volume: Tensor) -> Tensor:
        """Segment volumes.

        Args:
            volume: (N, in_channels, D, H, W), any size.

        Returns:
            Logits (N, n_classes, D, H, W).
        """
        levels = self.backbone(volume)
        coarse = levels.pop()
        missing = [-side % rest for side, rest in zip(coarse.shape[2:], self.rest, strict=True)]
        if any(missing):
            coarse = F.pad(coarse, [pad for side in reversed(missing) for pad in (0, side)])
        tokens = self.embed(coarse)  # (N, E, d, h, w)
        grid = tokens.shape[2:]
        positions = self.positions if tuple(grid) == self.grid else _resize(self.positions, grid)
        tokens = self.dropout((tokens + positions).flatten(2).transpose(1, 2))  # (N, P, E)
        for layer in self.layers:
            tokens = layer(tokens)
        context = self.norm(tokens).transpose(1, 2).unflatten(2, grid)
        return self.head(self.decoder(context, levels[::-1], volume.shape[2:]))


@dataclass(frozen=True)
class _Settings:
    """The config as plain values."""

    in_channels: int
    n_classes: int
    hidden_size: int
    grid: Triple
    size: Triple
    blocks: Triple
    width_factor: float
    mlp_dim: int
    heads: int
    layers: int
    attention_dropout: float
    dropout: float
    decoder_channels: tuple[int, ...]
    skip_channels: tuple[int, ...]
    activation: type[nn.Module]
    postprocess: str

    @property
    def strides(self) -> list[Triple]:
        """Of the levels: 2 where the patch can still be halved."""
        return [_triple(2 if side % 2**level == 0 else 1 for side in self.size) for level in range(1, LEVELS + 1)]

    @property
    def rest(self) -> Triple:
        """What the levels leave of the patch, for the embedding."""
        return _triple(side // math.gcd(side, 2**LEVELS) for side in self.size)

    @property
    def backbone_channels(self) -> list[int]:
        return [max(1, round(BASE_WIDTH * self.width_factor * 2**level)) for level in range(LEVELS)]


class _Backbone(nn.Module):
    """A residual network whose levels are skip connections, (N, C, D, H, W) -> LEVELS tensors, from fine to coarse."""

    def __init__(self, settings: _Settings) -> None:
        super().__init__()
        channels, strides, activation = settings.backbone_channels, settings.strides, settings.activation
        self.root = _conv_norm(settings.in_channels, channels[0], strides[0], activation)
        self.stages = nn.ModuleList()
        for number, blocks in enumerate(settings.blocks, 1):
            first = _Residual(channels[number - 1], channels[number], strides[number], activation)
            others = (_Residual(channels[number], channels[number], (1, 1, 1), activation) for _ in range(blocks - 1))
            self.stages.append(nn.Sequential(first, *others))

    def forward(self, volume: Tensor) -> list[Tensor]:
        levels = [self.root(volume)]
        for stage in self.stages:
            levels.append(stage(levels[-1]))
        return levels


class _Residual(nn.Module):
    """Two convolutions and a shortcut, (N, inputs, D, H, W) -> (N, outputs, D/s, H/s, W/s), sides rounded up."""

    def __init__(self, inputs: int, outputs: int, stride: Triple, activation: type[nn.Module]) -> None:
        super().__init__()
        self.first = _conv_norm(inputs, outputs, stride, activation)
        self.second = _conv_norm(outputs, outputs, (1, 1, 1), None)
        self.stride = stride
        self.project = nn.Conv3d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        depth, height, width = self.stride
        shortcut = self.project(x[:, :, ::depth, ::height, ::width])
        return self.activation(self.second(self.first(x)) + shortcut)


class _Layer(nn.Module):
    """Attention, then feed-forward, each on what is normalised and added to what came in, (N, P, E) -> (N, P, E)."""

    def __init__(self, settings: _Settings) -> None:
        super().__init__()
        dim, mlp_dim = settings.hidden_size, settings.mlp_dim
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, settings.heads, settings.attention_dropout, batch_first=True)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, mlp_dim),
            nn.GELU(),
            nn.Dropout(settings.dropout),
            nn.Linear(mlp_dim, dim),
            nn.Dropout(settings.dropout),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.attention_norm(tokens)
        tokens = tokens + self.attention(x, x, x, need_weights=False)[0]
        return tokens + self.feed_forward(tokens)


class _Decoder(nn.Module):
    """From tokens to the full size, level by level, each with its skip connection."""

    def __init__(self, settings: _Settings) -> None:
        super().__init__()
        channels, activation = settings.decoder_channels, settings.activation
        self.start = _conv_norm(settings.hidden_size, 2 * channels[0], (1, 1, 1), activation)
        self.skips, self.blocks = nn.ModuleList(), nn.ModuleList()
        before = 2 * channels[0]
        levels = [*settings.backbone_channels[-2::-1], 0]  # of the skip connections, from coarse to fine
        for of_level, skip, width in zip(levels, settings.skip_channels, channels, strict=True):
            self.skips.append(nn.Conv3d(of_level, skip, 1) if skip else nn.Identity())
            first = _conv_norm(before + skip, width, (1, 1, 1), activation)
            self.blocks.append(nn.Sequential(first, _conv_norm(width, width, (1, 1, 1), activation)))
            before = width
        self.used = [skip > 0 for skip in settings.skip_channels]

    def forward(self, context: Tensor, levels: list[Tensor], size: torch.Size) -> Tensor:
        """Tokens (N, E, d, h, w), the levels from coarse to fine, the full size -> (N, C, *size)."""
        x = self.start(context)
        for number, block in enumerate(self.blocks):
            level = levels[number] if number < len(levels) else None
            x = _resize(x, size if level is None else level.shape[2:])
            if level is not None and self.used[number]:
                x = torch.cat((x, self.skips[number](level)), dim=1)
            x = block(x)
        return x


def _conv_norm(inputs: int, outputs: int, stride: Triple, activation: type[nn.Module] | None) -> nn.Sequential:
    conv = nn.Conv3d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    groups = math.gcd(8, outputs, max(1, outputs // 4))  # of 4 channels or more, so that a single voxel is not constant
    norm = nn.GroupNorm(groups, outputs)
    return nn.Sequential(conv, norm, *([activation()] if activation else []))


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size=list(size), mode="trilinear", align_corners=False)


# ------------------------------------------------------------------------------------------------------- the config


def _read(config: Any) -> _Settings:
    """The settings, checked; the caller's config stays as it is."""
    if isinstance(config, dict) or not hasattr(config, "get"):
        raise TypeError(f"TransUNet3D takes one ml_collections.ConfigDict, found a {type(config).__name__}")
    for section in ("", "patches", "resnet", "transformer"):
        _check_keys(config, section)
    _check_fixed(config)
    grid, size = _patches(config)
    hidden_size, heads = config.hidden_size, config.transformer["num_heads"]
    if hidden_size % heads:
        fits = [str(number) for number in range(1, hidden_size + 1) if hidden_size % number == 0]
        raise ValueError(
            f"TransUNet3D: hidden_size {hidden_size} cannot be divided over {heads} heads (transformer.num_heads); "
            f"possible: {', '.join(fits)}"
        )
    activation = getattr(config, "activation", "relu")
    if activation not in (*ACTIVATIONS, *PROBABILITIES):
        possible = ", ".join((*ACTIVATIONS, *PROBABILITIES))
        raise ValueError(f"TransUNet3D: activation is {activation!r}; possible: {possible}")
    blocks = _numbers("resnet.num_layers", config.resnet.num_layers, 3)
    return _Settings(
        in_channels=config["in_channels"],
        n_classes=config["n_classes"],
        hidden_size=hidden_size,
        grid=grid,
        size=size,
        blocks=_triple(blocks),
        width_factor=config.resnet.get("width_factor", 1),
        mlp_dim=config.transformer.mlp_dim,
        heads=heads,
        layers=config.transformer.num_layers,
        attention_dropout=config.transformer.get("attention_dropout_rate", 0.0),
        dropout=config.transformer.get("dropout_rate", 0.0),
        decoder_channels=_numbers("decoder_channels", config.decoder_channels, LEVELS),
        skip_channels=_skip_channels(config),
        activation=ACTIVATIONS.get(activation, nn.ReLU),
        postprocess=activation if activation in PROBABILITIES else "softmax",
    )


def _check_keys(config: Any, section: str) -> None:
    """Whether all keys are known and the needed ones are there."""
    values = config[section] if section else config
    prefix = f"{section}." if section else ""
    if not hasattr(values, "get"):
        raise ValueError(f"TransUNet3D: {section} is {values!r}; expected a mapping")
    needed = REQUIRED.get(section, ())
    known = (*needed, *OPTIONAL[section])
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; possible: {', '.join(known)}"
            raise ValueError(f"TransUNet3D: unknown key {prefix}{key}{hint}")
    if missing := [f"{prefix}{key}" for key in needed if key not in values]:
        raise ValueError(f"TransUNet3D: missing in the config: {', '.join(missing)}")


def _check_fixed(config: Any) -> None:
    """Keys of the published models that have one possible value here."""
    for key, cure in FIXED.items():
        if config.get(key):
            raise ValueError(f"TransUNet3D: {key} is {config[key]!r}; {cure}")
    if config.get("classifier", "seg") != "seg":
        raise ValueError(f"TransUNet3D: classifier is {config.classifier!r}; possible: seg")
    if getattr(config, "final_activation", None) not in (None, "none", "identity"):
        raise ValueError(
            f"TransUNet3D: final_activation is {config.final_activation!r}, but models here return logits; leave it "
            "out, the loss, the metric or the prediction applies it"
        )


def _patches(config: Any) -> tuple[Triple, Triple]:
    """Tokens per axis, and voxels per token and axis; each gives the other, and all that is given must agree."""
    image = _triple(_numbers("img_size", config.img_size, 3))
    grid, size = config.patches.get("grid"), config.patches.get("size", config.get("patch_size"))
    if grid is None and size is None:
        raise ValueError("TransUNet3D: patches needs grid (tokens per axis) or size (voxels per token and axis)")
    if size is not None:
        size = _triple(_numbers("patches.size", size, 3))
        fits = _triple(voxels // side for voxels, side in zip(image, size, strict=True))
        grid = fits if grid is None else _triple(_numbers("patches.grid", grid, 3))
    else:
        grid = _triple(_numbers("patches.grid", grid, 3))
        size = _triple(voxels // tokens for voxels, tokens in zip(image, grid, strict=True))
    if _triple(tokens * side for tokens, side in zip(grid, size, strict=True)) != image:
        raise ValueError(
            f"TransUNet3D: a grid of {list(grid)} tokens of {list(size)} voxels is not img_size {list(image)}"
        )
    if "patch_size" in config and _triple(_numbers("patch_size", config.patch_size, 3)) != size:
        raise ValueError(f"TransUNet3D: patch_size is {config.patch_size}, but a token has {list(size)} voxels")
    return grid, size


def _skip_channels(config: Any) -> tuple[int, ...]:
    """Channels of the four levels' skip connections, 0 where there is none."""
    used = config.get("n_skip", LEVELS - 1)
    if not 0 <= used < LEVELS:
        raise ValueError(f"TransUNet3D: n_skip is {used}; possible: 0 to {LEVELS - 1}")
    if "skip_channels" not in config:
        if used:
            raise ValueError("TransUNet3D: missing in the config: skip_channels (or n_skip: 0)")
        return (0,) * LEVELS
    channels = list(_numbers("skip_channels", config.skip_channels, LEVELS, least=0))
    for level in range(used, LEVELS):
        channels[level] = 0
    return tuple(channels)


def _numbers(name: str, value: Any, count: int, least: int = 1) -> tuple[int, ...]:
    """A number for all axes or levels, or one for each."""
    numbers = tuple(value) if isinstance(value, list | tuple) else (value,) * count
    if len(numbers) != count or any(type(number) is not int or number < least for number in numbers):
        raise ValueError(f"TransUNet3D: {name} is {value!r}; expected one or {count} whole numbers of at least {least}")
    return numbers


def _triple(numbers: Any) -> Triple:
    first, second, third = numbers
    return first, second, third
