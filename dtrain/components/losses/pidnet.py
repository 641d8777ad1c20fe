"""PIDNet's loss: classes of three heads, hard pixels first, and boundaries.

Shapes: N images, H x W pixels of the label, K classes; logits may be smaller and are enlarged to the label.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dtrain.components.losses.targets import main_of, other_than, precise, refuse_other_values

OHEM = {"threshold": 0.9, "min_kept": 131072}  # as for 1024 x 2048 pixels of Cityscapes
TERMS = ("detail", "main", "boundary", "aware")


class PIDNetLoss(nn.Module):
    """Detail, main, boundary and boundary-aware loss, weighted and summed.

    Xu et al., "PIDNet", CVPR 2023, arXiv:2206.02066, section 3.4, with the numbers of the authors' code:

        L = w0 CE(P) + w1 OHEM(main) + w2 BCE(D) + w3 OHEM(main, label only where sigmoid(D) > boundary_threshold)

    CE is the mean over the valid pixels. OHEM and BCE are described at `ohem_cross_entropy` and `boundary_loss`. A
    term without a single valid pixel is 0. None of the terms is a mean over samples, so the loss of a batch that is
    divided over ranks is the mean of the ranks' losses, and not exactly that of the whole batch.

    Args:
        weights: w0 to w3.
        ohem: `threshold`: the probability of the true class below which a pixel counts as hard. `min_kept`: so many
            pixels are kept at least; a whole number, or a fraction of the batch's pixels, above 0 and below 1. A whole
            number means little for crops of another size: 131072 is 1 % of 12 crops of 1024 x 1024.
        boundary_threshold: The probability of a boundary above which the last term looks at a pixel, 0 to 1.
        ignore_index: The label of pixels that no class term looks at.
        class_weights: K numbers that multiply the pixels' losses by their true class.
        terms: Return the weighted terms by name (detail, main, boundary, aware) instead of their sum, so that each is
            logged.

    Raises:
        ValueError: Not four weights, an unknown key under `ohem`, or a number out of range.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        weights: Sequence[float] = (0.4, 1.0, 20.0, 1.0),
        ohem: Mapping[str, float] | None = None,
        boundary_threshold: float = 0.8,
        ignore_index: int = 255,
        class_weights: Sequence[float] | None = None,
        terms: bool = False,
    ) -> None:
        super().__init__()
        if len(weights) != len(TERMS):
            raise ValueError(f"PIDNetLoss: {len(weights)} weights; expected {len(TERMS)}: {', '.join(TERMS)}")
        if not 0 <= boundary_threshold <= 1:
            raise ValueError(f"PIDNetLoss: boundary_threshold is {boundary_threshold}; possible: 0 to 1")
        self.weights = tuple(weights)
        self.threshold, self.min_kept = _ohem_settings(ohem)
        self.boundary_threshold, self.ignore_index, self.terms = boundary_threshold, ignore_index, terms
        self.register_buffer(
            "class_weights", None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        )

    def forward(self, output: Any, target: Any) -> Tensor | dict[str, Tensor]:
        """The loss of one batch.

        Args:
            output: In training what PIDNet returns: main (N, K, h, w), P (N, K, h, w), D (N, 1, h, w). One tensor,
                as PIDNet returns it in evaluation, is the main output, and the loss is the main term alone.
            target: The label (N, H, W) or (N, 1, H, W), classes as integers, and the boundary (N, H, W) or
                (N, 1, H, W): 1 on a boundary, 0 elsewhere. For one tensor as output the label is enough.

        Returns:
            The sum of the weighted terms, a scalar; with `terms` the weighted terms by name.

        Raises:
            ValueError: Neither one nor three outputs, no boundary, shapes that do not fit, or a value outside the
                classes.
        """
        label, boundary = _target(target)
        if label.device.type == "cpu":
            self.check_target(output, target)
        if isinstance(output, Tensor):
            terms = {"main": self._hard(_as_large(output, label), label)}
        else:
            terms = self._terms(output, label, boundary)
        weighted = {name: self.weights[TERMS.index(name)] * term for name, term in terms.items()}
        return weighted if self.terms else torch.stack(list(weighted.values())).sum()

    def check_target(self, output: Any, target: Any) -> None:
        """What `forward` would refuse of a target that has not been moved to the output's device yet.

        A boundary is 0 or 1, and may be `ignore_index` where the label is.
        """
        label, boundary = _target(target)
        refuse_other_values(label, main_of(output).shape[1] - 1, self.ignore_index, whole=True, wait=False)
        if boundary is not None and not isinstance(output, Tensor):
            edges = boundary[:, 0] if boundary.dim() == 4 else boundary
            if edges.shape == label.shape:
                edges = edges.where((label != self.ignore_index) | other_than(edges, self.ignore_index), 0)
            refuse_other_values(edges, 1, None, whole=True, wait=False)

    def _terms(self, output: Any, label: Tensor, boundary: Tensor | None) -> dict[str, Tensor]:
        if not isinstance(output, list | tuple) or len(output) != 3:
            found = f"{len(output)} outputs" if isinstance(output, list | tuple) else f"a {type(output).__name__}"
            raise ValueError(f"PIDNetLoss: {found}; expected main, P and D, or main alone")
        if boundary is None:
            raise ValueError(
                "PIDNetLoss: the target has no boundary; expected (label, boundary), as PIDNetDatasetWrapper gives it"
            )
        main, detail, edges = (_as_large(item, label) for item in output)
        near = (edges.detach().squeeze(1).sigmoid() > self.boundary_threshold) & (label != self.ignore_index)
        return {
            "detail": self._mean(detail, label),
            "main": self._hard(main, label),
            "boundary": boundary_loss(edges, boundary),
            "aware": self._hard(main, torch.where(near, label, self.ignore_index)),
        }

    def _mean(self, logits: Tensor, label: Tensor) -> Tensor:
        """Cross entropy over the valid pixels, 0 without any; with class weights the weighted mean, as torch's."""
        weights = None if self.class_weights is None else self.class_weights.to(logits.dtype)
        total = F.cross_entropy(logits, label, weights, ignore_index=self.ignore_index, reduction="sum")
        valid = label != self.ignore_index
        if weights is None:
            return total / valid.sum().clamp(min=1)
        of_pixels = weights[torch.where(valid, label, 0)] * valid
        return total / of_pixels.sum().clamp(min=torch.finfo(torch.float32).tiny)

    def _hard(self, logits: Tensor, label: Tensor) -> Tensor:
        return ohem_cross_entropy(
            logits, label, self.threshold, self.min_kept, self.ignore_index, class_weights=self.class_weights
        )


def ohem_cross_entropy(
    logits: Tensor,
    label: Tensor,
    threshold: float = 0.9,
    min_kept: float = 131072,
    ignore_index: int = 255,
    class_weights: Tensor | None = None,
) -> Tensor:
    """The mean cross entropy of the hard pixels (online hard example mining).

    Shrivastava et al., "Training Region-based Object Detectors with Online Hard Example Mining", CVPR 2016,
    arXiv:1604.03540, on pixels: hard are those whose true class has a probability below `threshold`; where these are
    fewer than `min_kept`, the threshold rises to the probability of the pixel with that rank (the n-th of n at most).

    Args:
        logits: (N, K, H, W).
        label: (N, H, W), int64.
        threshold: A probability, 0 to 1.
        min_kept: A number of pixels, or a fraction of N H W, above 0 and below 1.
        ignore_index: The label of pixels that do not count.
        class_weights: (K,), multiply the pixels' losses; the mean is over the number of pixels.

    Returns:
        A scalar; 0 (with gradient 0) where no pixel is valid or hard. Nothing here waits for the device.
    """
    logits = precise(logits)
    class_weights = None if class_weights is None else class_weights.to(logits.dtype)
    losses = F.cross_entropy(logits, label, class_weights, ignore_index=ignore_index, reduction="none").flatten()
    valid = (label != ignore_index).flatten()
    with torch.no_grad():
        classes = torch.where(label == ignore_index, 0, label).unsqueeze(1)
        probability = logits.softmax(dim=1).gather(1, classes).flatten()
        # Invalid pixels rank behind all others; the last valid pixel is the highest rank there is.
        ranked = torch.where(valid, probability, 2.0)
        rank = int(min_kept if min_kept >= 1 else min_kept * valid.numel())
        smallest = ranked.topk(min(rank + 1, valid.numel()), largest=False).values.max()
        highest = torch.where(valid, probability, -1.0).max()
        hard = valid & (probability < torch.minimum(smallest, highest).clamp(min=threshold))
    return torch.where(hard, losses, 0).sum() / hard.sum().clamp(min=1)


def boundary_loss(logits: Tensor, boundary: Tensor) -> Tensor:
    """Binary cross entropy in which the boundary's few pixels weigh as much as all others.

    Weights are counted over this batch: neg / (pos + neg) for pixels of a boundary (1), pos / (pos + neg) for the
    others (0); a pixel with any other value has no weight. The mean is over all pixels, as in PIDNet's code.

    Args:
        logits: (N, 1, H, W).
        boundary: (N, H, W) or (N, 1, H, W).

    Returns:
        A scalar.

    Raises:
        ValueError: The shapes do not fit.
    """
    edges = boundary.unsqueeze(1) if boundary.dim() == 3 else boundary
    if edges.shape != logits.shape:
        raise ValueError(
            f"PIDNetLoss: a boundary of shape {tuple(boundary.shape)} for logits of shape {tuple(logits.shape)}"
        )
    positive, negative = edges == 1, edges == 0
    pos, neg = positive.sum(), negative.sum()
    logits = precise(logits)
    weight = (positive * neg + negative * pos).to(logits.dtype) / (pos + neg).clamp(min=1)
    return F.binary_cross_entropy_with_logits(logits, positive.to(logits.dtype), weight)


def _ohem_settings(ohem: Mapping[str, float] | None) -> tuple[float, float]:
    """Threshold and min_kept, checked."""
    given = {key: ohem[key] for key in ohem} if ohem is not None else {}
    if unknown := [key for key in given if key not in OHEM]:
        raise ValueError(f"PIDNetLoss: unknown under ohem: {', '.join(unknown)}; possible: {', '.join(OHEM)}")
    threshold, min_kept = (OHEM | given).values()
    if not 0 <= threshold <= 1:
        raise ValueError(f"PIDNetLoss: ohem.threshold is {threshold}; possible: a probability, 0 to 1")
    if min_kept < 0 or (min_kept >= 1 and min_kept != int(min_kept)):
        raise ValueError(
            f"PIDNetLoss: ohem.min_kept is {min_kept}; possible: a number of pixels, or a fraction of them below 1"
        )
    return threshold, min_kept


def _target(target: Any) -> tuple[Tensor, Tensor | None]:
    """The label (N, H, W) as int64, and the boundary if there is one."""
    parts = [target] if isinstance(target, Tensor) else list(target)
    label: Tensor = parts[0]
    if label.dim() == 4 and label.shape[1] == 1:
        label = label[:, 0]
    if label.dim() != 3 or label.is_floating_point():
        raise ValueError(
            f"PIDNetLoss: a label of shape {tuple(label.shape)} and type {label.dtype}; "
            "expected (N, H, W), the classes as integers"
        )
    return label.long(), parts[1] if len(parts) > 1 else None


def _as_large(logits: Tensor, label: Tensor) -> Tensor:
    """Logits (N, K, h, w), float32 at least, at the label's size: bilinear, corners aligned as in PIDNet's code."""
    logits = precise(logits)
    if logits.shape[-2:] == label.shape[-2:]:
        return logits
    return F.interpolate(logits, size=list(label.shape[-2:]), mode="bilinear", align_corners=True)
