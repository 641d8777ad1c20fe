"""Objects that are told by their neighbours: attention with the geometry of boxes.

Shapes: N images, K objects in each (padded), D box axes (2 or 3), H heads.
"""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NEAREST, FARTHEST = 1e-3, 1e6  # of a box's side: offsets below and above are not told apart
LEAST_GEOMETRY = 1e-6  # the least weight that geometry gives
BLOCKED = -1e4  # the score of padding: no attention in any precision, and finite where all is padding


class RelationAttention(nn.Module):
    """A classifier of objects by their features and their relations to the image's other objects.

    Hu, Gu, Zhang, Dai & Wei, "Relation Networks for Object Detection", CVPR 2018, arXiv:1711.11575. For each of `depth`
    layers: a linear layer with ReLU, then relations are added,

        f(n) + concat over H heads of sum_m w(m, n) W_V f(m),
        w(m, n) = softmax over m of log max(W_G E(m, n), 1e-6) + (W_K f(m)) (W_Q f(n)) / sqrt(key_dim),

    and a linear layer classifies. E embeds log(|offset| / side of m) and log(side of n / side of m) along each axis in
    sines and cosines. So the result does not change when all boxes are moved or scaled together, and follows the
    objects when they are put in another order.

    Args:
        feature_dim: Numbers per object that come in.
        num_classes: Length of the logits of each object.
        box_dim: 4 for boxes in an image (x1, y1, x2, y2), 6 in a volume (x1, y1, z1, x2, y2, z2).
        geometry_dim: Length of E; a multiple of twice box_dim.
        heads: H; each attends with weights of its own.
        key_dim: Length of a query and a key in each head.
        depth: Number of layers.
        hidden_dim: Width of the layers, a multiple of `heads`; null: feature_dim.
        wave_length: The longest wave of the embedding is so many times the shortest.
        relations: False leaves the relations out, and so shows what an object's own features tell.

    Raises:
        ValueError: A number that is out of range or does not divide another.
    """

    def __init__(
        self,
        feature_dim: int,
        num_classes: int,
        box_dim: int = 4,
        geometry_dim: int = 64,
        heads: int = 16,
        key_dim: int = 64,
        depth: int = 2,
        hidden_dim: int | None = None,
        wave_length: float = 1000.0,
        relations: bool = True,
    ) -> None:
        super().__init__()
        hidden_dim = feature_dim if hidden_dim is None else hidden_dim
        _check(box_dim, geometry_dim, heads, hidden_dim, wave_length)
        self.box_dim = box_dim
        widths = [feature_dim, *[hidden_dim] * depth]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))
        self.relations = nn.ModuleList(
            _Relation(hidden_dim, geometry_dim, heads, key_dim) for _ in range(depth if relations else 0)
        )
        self.classifier = nn.Linear(widths[-1], num_classes)
        waves = geometry_dim // (2 * box_dim)
        frequencies = 100.0 / wave_length ** (torch.arange(waves) / waves)
        self.register_buffer("frequencies", frequencies, persistent=False)

    frequencies: Tensor

    def forward(self, features: Tensor, boxes: Tensor, mask: Tensor | None = None) -> Tensor:
        """Classify the objects of each image.

        Args:
            features: (N, K, feature_dim).
            boxes: (N, K, box_dim), each box's smallest coordinates and then its largest, in any unit.
            mask: (N, K), true for an object, false for padding, whose features and boxes may be anything; without it
                all are objects.

        Returns:
            Logits (N, num_classes, K), as cross entropy takes them.

        Raises:
            ValueError: Shapes that do not fit.
        """
        mask = self._checked(features, boxes, mask)
        objects = mask.unsqueeze(-1)
        x = features.masked_fill(~objects, 0.0)
        geometry = self._geometry(boxes, objects) if self.relations else None
        for number, layer in enumerate(self.layers):
            x = F.relu(layer(x))
            if geometry is not None:
                x = x + self.relations[number](x, geometry, mask)
        return self.classifier(x).transpose(1, 2)

    def _geometry(self, boxes: Tensor, objects: Tensor) -> Tensor:
        """E of each pair, (N, K as n, K as m, geometry_dim), in float32 at least."""
        boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
        low, high = boxes.chunk(2, dim=-1)  # (N, K, D)
        low, high = low.masked_fill(~objects, 0.0), high.masked_fill(~objects, 1.0)
        centre, side = (low + high) / 2, (high - low).clamp(min=torch.finfo(boxes.dtype).tiny)
        offset = (centre.unsqueeze(2) - centre.unsqueeze(1)).abs() / side.unsqueeze(1)
        ratio = side.log().unsqueeze(2) - side.log().unsqueeze(1)
        terms = torch.cat((offset.clamp(NEAREST, FARTHEST).log(), ratio), dim=-1)  # (N, K, K, 2 D)
        waves = (terms.unsqueeze(-1) * self.frequencies).flatten(-2)
        return torch.cat((waves.sin(), waves.cos()), dim=-1)

    def _checked(self, features: Tensor, boxes: Tensor, mask: Tensor | None) -> Tensor:
        if boxes.shape != (*features.shape[:2], self.box_dim):
            raise ValueError(
                f"RelationAttention: boxes of shape {tuple(boxes.shape)} for features of {tuple(features.shape)}; "
                f"expected (N, K, {self.box_dim})"
            )
        if mask is None:
            return torch.ones_like(boxes[..., 0], dtype=torch.bool)
        if mask.shape != features.shape[:2]:
            raise ValueError(
                f"RelationAttention: a mask of shape {tuple(mask.shape)} for features of {tuple(features.shape)}; "
                "expected (N, K)"
            )
        return mask.bool()


class _Relation(nn.Module):
    """What the other objects add to each, (N, K, dim) -> (N, K, dim)."""

    def __init__(self, dim: int, geometry_dim: int, heads: int, key_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, heads * key_dim)
        self.key = nn.Linear(dim, heads * key_dim)
        self.value = nn.Linear(dim, dim)
        self.geometry = nn.Linear(geometry_dim, heads)

    def forward(self, x: Tensor, geometry: Tensor, mask: Tensor) -> Tensor:
        """Objects (N, K, dim), pairs (N, K, K, geometry_dim), mask (N, K) -> (N, K, dim)."""
        query, key, value = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )  # each (N, H, K, key_dim or dim / H)
        weight = self.geometry(geometry.to(self.geometry.weight.dtype)).permute(0, 3, 1, 2)  # (N, H, K, K)
        bias = weight.clamp(min=LEAST_GEOMETRY).log().masked_fill(~mask[:, None, None, :], BLOCKED)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        return mixed.transpose(1, 2).flatten(2)


def _check(box_dim: int, geometry_dim: int, heads: int, hidden_dim: int, wave_length: float) -> None:
    if box_dim not in (4, 6):
        raise ValueError(f"RelationAttention: box_dim is {box_dim}; possible: 4 (in an image), 6 (in a volume)")
    if geometry_dim < 1 or geometry_dim % (2 * box_dim):
        near = max(1, round(geometry_dim / (2 * box_dim))) * 2 * box_dim
        raise ValueError(
            f"RelationAttention: geometry_dim {geometry_dim} is not a multiple of {2 * box_dim} (twice box_dim: "
            f"a sine and a cosine for each offset and each ratio); the nearest is {near}"
        )
    if heads < 1 or hidden_dim % heads:
        raise ValueError(
            f"RelationAttention: a hidden_dim of {hidden_dim} (feature_dim unless given) cannot be divided over "
            f"{heads} heads"
        )
    if wave_length < 1:
        raise ValueError(f"RelationAttention: wave_length is {wave_length}; possible: 1 and more")
