"""A Vision Transformer with vit-pytorch's arguments and weights.

Shapes: N images, C channels, H x W pixels, P tokens, D = `dim` values per token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Size = int | Sequence[int]


class ViT(nn.Module):
    """An image classifier: patches become tokens, transformer layers let them talk, one token is classified.

    Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, arXiv:2010.11929. Arguments, parameter names, shapes
    and the order of random numbers are those of `vit_pytorch.vit.ViT` (vit-pytorch 1.26), so that configs and weights
    go both ways; einops is not needed, and sizes may also be lists, as YAML writes them.

    Args:
        image_size: Pixels per side of the largest image, or (height, width).
        patch_size: Pixels per side of a patch, or (height, width); must divide image_size.
        num_classes: Length of the logits; 0 returns the tokens instead.
        dim: Length of a token.
        depth: Number of transformer layers.
        heads: Attention heads per layer.
        mlp_dim: Hidden units of each layer's feed-forward part.
        pool: What is classified: "cls", an additional learned token, or "mean", the mean of the patches.
        channels: Channels of the image.
        dim_head: Length of a query in each head; independent of dim.
        dropout: Probability of dropping an attention weight or an activation, 0 to 1.
        emb_dropout: Probability of dropping a value of the embedded patches, 0 to 1.

    Raises:
        ValueError: The patch does not divide the image, a size is not one or two positive numbers, or pool is unknown.
    """

    def __init__(
        self,
        *,
        image_size: Size,
        patch_size: Size,
        num_classes: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        pool: str = "cls",
        channels: int = 3,
        dim_head: int = 64,
        dropout: float = 0.0,
        emb_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if pool not in ("cls", "mean"):
            raise ValueError(f"ViT: pool is {pool!r}; possible: 'cls' (a learned token), 'mean' (of all patches)")
        rows, columns = _grid(image_size, patch_size)
        patch_height, patch_width = self.patch_size = _pair("patch_size", patch_size)
        patch_dim = channels * patch_height * patch_width
        num_cls_tokens = 1 if pool == "cls" else 0
        self.pool = pool
        self.to_patch_embedding = nn.Sequential(
            _Patches(patch_height, patch_width),
            nn.LayerNorm(patch_dim),
            nn.Linear(patch_dim, dim),
            nn.LayerNorm(dim),
        )
        self.cls_token = nn.Parameter(torch.randn(num_cls_tokens, dim))
        self.pos_embedding = nn.Parameter(torch.randn(num_cls_tokens + rows * columns, dim))
        self.dropout = nn.Dropout(emb_dropout)
        self.transformer = _Transformer(dim, depth, heads, dim_head, mlp_dim, dropout)
        self.mlp_head = nn.Linear(dim, num_classes) if num_classes > 0 else None

    def forward(self, image: Tensor) -> Tensor:
        """Classify images.

        Args:
            image: (N, C, H, W), H and W multiples of the patch and together no more patches than `image_size` has.

        Returns:
            Logits (N, num_classes); the tokens (N, P, D) if `num_classes` is 0.

        Raises:
            ValueError: The image cannot be cut into patches, or has more of them than `image_size` allows.
        """
        patches = self.to_patch_embedding(image)  # (N, P, D)
        tokens = torch.cat((self.cls_token.expand(image.shape[0], -1, -1), patches), dim=1)
        if tokens.shape[1] > len(self.pos_embedding):
            raise ValueError(f"ViT: an image of {tuple(image.shape)} has more patches than the model's image_size")
        tokens = self.transformer(self.dropout(tokens + self.pos_embedding[: tokens.shape[1]]))
        if self.mlp_head is None:
            return tokens
        return self.mlp_head(tokens.mean(dim=1) if self.pool == "mean" else tokens[:, 0])


class _Patches(nn.Module):
    """(N, C, H, W) -> (N, P, patch height * patch width * C), patches row by row, channels last."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height, self.width = height, width

    def forward(self, image: Tensor) -> Tensor:
        _, channels, image_height, image_width = image.shape
        if image_height % self.height or image_width % self.width:
            _grid((image_height, image_width), (self.height, self.width))  # raises with the sizes that fit
        rows, columns = image_height // self.height, image_width // self.width
        cut = image.reshape(-1, channels, rows, self.height, columns, self.width)
        return cut.permute(0, 2, 4, 3, 5, 1).reshape(-1, rows * columns, self.height * self.width * channels)


class _Attention(nn.Module):
    """Multi-head self-attention, (N, P, D) -> (N, P, D), normalised on the way in."""

    def __init__(self, dim: int, heads: int, dim_head: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.attention_dropout = heads, dropout
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        # One head as wide as the token needs no mixing of heads; vit-pytorch has no weights there either.
        mixes = heads != 1 or dim_head != dim
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim), nn.Dropout(dropout)) if mixes else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(tokens)).unflatten(-1, (3, self.heads, -1))  # (N, P, 3, heads, dim_head)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, P, dim_head)
        dropout = self.attention_dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.to_out(mixed.transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    """Two linear layers on each token, (N, P, D) -> (N, P, D), normalised on the way in."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, hidden_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, dim),
            nn.Dropout(dropout),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)


class _Layer(nn.ModuleList):
    """Attention, then feed-forward, each added to what comes in, (N, P, D) -> (N, P, D)."""

    def forward(self, tokens: Tensor) -> Tensor:
        for part in self:
            tokens = part(tokens) + tokens
        return tokens


class _Transformer(nn.Module):
    """One layer after another, normalised on the way out, (N, P, D) -> (N, P, D)."""

    def __init__(self, dim: int, depth: int, heads: int, dim_head: int, mlp_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(
            _Layer([_Attention(dim, heads, dim_head, dropout), _FeedForward(dim, mlp_dim, dropout)])
            for _ in range(depth)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        for layer in self.layers:
            tokens = layer(tokens)
        return self.norm(tokens)


def _pair(key: str, size: Size) -> tuple[int, int]:
    """One number or two, as (height, width)."""
    pair = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(pair) != 2 or any(not isinstance(side, int) or side < 1 for side in pair):
        raise ValueError(f"ViT: {key} is {size!r}; possible: one positive whole number, or two: [height, width]")
    return pair


def _grid(image_size: Size, patch_size: Size) -> tuple[int, int]:
    """How many patches an image has in height and in width."""
    image, patch = _pair("image_size", image_size), _pair("patch_size", patch_size)
    for side, pixels, patch_pixels in zip(("height", "width"), image, patch, strict=True):
        if pixels % patch_pixels:
            fits = ", ".join(str(divisor) for divisor in range(1, pixels + 1) if pixels % divisor == 0)
            raise ValueError(
                f"ViT: a {side} of {pixels} pixels cannot be cut into patches of {patch_pixels} "
                f"({pixels % patch_pixels} left over); patches that fit: {fits}"
            )
    return image[0] // patch[0], image[1] // patch[1]
