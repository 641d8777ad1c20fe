"""How losses read outputs and targets: which of several, as labels or as channels, what is ignored.

Shapes: N samples, C channels or classes, any spatial dimensions *, such as (H, W), (D, H, W) or none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAIN_KEYS = ("out", "logits", "target", "label")


def main_of(value: Any, index: int | str = 0) -> Tensor:
    """The main one of several outputs or targets: a tensor itself, else the element `index`, else its first.

    Args:
        value: A tensor; a sequence; or a mapping, of which an index that is a text names the entry, and a number means
            the first of MAIN_KEYS that is there.
        index: Which element of a sequence or mapping.

    Raises:
        ValueError: There is no such element.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        key = next((key for key in ([index] if isinstance(index, str) else MAIN_KEYS) if key in value), None)
        if key is None:
            wanted = repr(index) if isinstance(index, str) else " or ".join(map(repr, MAIN_KEYS))
            raise ValueError(f"no {wanted} among the entries {', '.join(map(repr, value))}; name one with `index`")
        return main_of(value[key])
    if isinstance(value, list | tuple) and isinstance(index, int) and -len(value) <= index < len(value):
        return main_of(value[index])
    what = f"{len(value)} elements" if isinstance(value, list | tuple) else f"a {type(value).__name__}"
    raise ValueError(f"found {what} where index {index!r} was looked for; expected a tensor, a sequence or a mapping")


def precise(output: Tensor) -> Tensor:
    """The same in float32 at least: sums over the voxels of a volume overflow float16 and are coarse in bfloat16."""
    return output.float() if output.dtype in (torch.float16, torch.bfloat16) else output


def as_label(target: Tensor, output: Tensor) -> Tensor:
    """A target as torch's cross entropy wants it.

    Args:
        target: Labels (N, *) or (N, 1, *) of any type; or of the output's shape, either floating point, the probability
            of each class, or whole numbers, one-hot (to see whether they are, a GPU has to be waited for).
        output: Logits (N, C, *).

    Returns:
        Labels (N, *), int64, or probabilities (N, C, *) of the output's type.

    Raises:
        ValueError: The output has one channel only, the shapes do not fit, or whole numbers are not one-hot.
    """
    if output.shape[1] == 1:
        raise ValueError("cross entropy of one channel is always 0; use BCEWithLogitsLoss, or one channel per class")
    if target.shape == output.shape:
        if target.is_floating_point():
            return target.to(output.dtype)
        if bool(((target == 0) | (target == 1)).all() & (target.sum(dim=1) == 1).all()):
            return target.long().argmax(dim=1)
        raise ValueError(
            f"whole numbers in the output's shape {_text(output)} must be one-hot, and these are not; "
            f"expected labels {_text(output[:, 0])}, or probabilities as floating point"
        )
    labels = _labels(target, output)
    if labels is None:
        wanted = f"labels {_text(output[:, 0])} or {_text(output[:, :1])}, or probabilities {_text(output)}"
        raise ValueError(f"found a target of shape {_text(target)}; expected {wanted}")
    return labels.long()


def _labels(target: Tensor, output: Tensor) -> Tensor | None:
    """Targets (N, *) or (N, 1, *) as (N, *); never by squeeze(), which would drop a batch of one."""
    if target.shape == output.shape[:1] + output.shape[2:]:
        return target
    return target[:, 0] if target.shape == output[:, :1].shape else None


def _text(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


class Read(NamedTuple):
    """An output and its target, ready for a formula."""

    output: Tensor  # (N, C, *), float32 or float64
    target: Tensor  # (N, C, *), the same type; 0 where ignored
    valid: Tensor | None  # (N, C, *) or (N, 1, *), the same type: 1, or 0 where ignored; None: nothing is


@dataclass(frozen=True)
class TargetReader:
    """What the losses with one value per channel have in common: how their targets are to be read.

    Args:
        ignore_index: Where the target has this value, the voxel, or this channel of it, does not count: neither in a
            sum nor in the number by which it is divided. None: everything counts.
        skip_last_target: Leave out the target's last channel, such as instance numbers kept for a metric.
        squeeze_channel: (N, 1, *) becomes (N, *), after that.
    """

    ignore_index: int | None = None
    skip_last_target: bool = False
    squeeze_channel: bool = False

    def cut(self, target: Tensor) -> Tensor:
        """The target without what is to be skipped.

        Raises:
            ValueError: Nothing would be left, or there is more than one channel to squeeze.
        """
        if self.skip_last_target:
            if target.dim() < 2 or target.shape[1] < 2:
                raise ValueError(f"skip_last_target would leave nothing of a target of shape {_text(target)}")
            target = target[:, :-1]
        if self.squeeze_channel:
            if target.dim() < 2 or target.shape[1] != 1:
                raise ValueError(f"squeeze_channel needs one channel, found a target of shape {_text(target)}")
            target = target[:, 0]
        return target

    def read(self, output: Any, target: Any, *, labels: bool) -> Read:
        """An output and its target in the same shape.

        Args:
            output: (N, C, *), or several, of which the main one counts; see `main_of`.
            target: (N, C, *); (N, *) if C is 1; with `labels` also labels (N, *) or (N, 1, *), which become one-hot.
            labels: Whether the channels are classes that labels could name.

        Raises:
            ValueError: The shapes do not fit.
        """
        output, target = precise(main_of(output)), self.cut(main_of(target))
        one_of_each = _labels(target, output)
        if target.shape != output.shape and one_of_each is not None and output.shape[1] == 1:
            target = one_of_each.unsqueeze(1)
        if target.shape == output.shape:
            valid = None if self.ignore_index is None else target != self.ignore_index
            target = target.to(output.dtype)
            return Read(output, target, None) if valid is None else _without(output, target, valid)
        if not labels or one_of_each is None:
            possible = f"; expected {_text(output)}" + (f" or labels {_text(output[:, 0])}" if labels else "")
            raise ValueError(f"a target of shape {_text(target)} for an output of {_text(output)}{possible}")
        return self._one_hot(output, one_of_each.long().unsqueeze(1))

    def _one_hot(self, output: Tensor, label: Tensor) -> Read:
        """Labels (N, 1, *) as channels."""
        valid = None if self.ignore_index is None else label != self.ignore_index
        label = label if valid is None else label.where(valid, 0)
        target = torch.zeros_like(output).scatter_(1, label, 1.0)
        return Read(output, target, None) if valid is None else _without(output, target, valid)


def _without(output: Tensor, target: Tensor, valid: Tensor) -> Read:
    return Read(output, target.where(valid, 0.0), valid.to(output.dtype))


def mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """The mean of what counts; 0, with gradients of 0, if nothing does.

    Args:
        values: (N, C, *).
        valid: Of the same shape or (N, 1, *), 1 for what counts, else 0; None: everything does.
    """
    if valid is None:
        return values.mean()
    return (values * valid).sum() / valid.expand_as(values).sum().clamp(min=1)


def class_weights(weight: Any) -> Tensor | None:
    """Weights of classes or channels as float32.

    Raises:
        ValueError: They are not a list of finite numbers, none negative, not all 0.
    """
    if weight is None:
        return None
    values = torch.as_tensor(weight, dtype=torch.float32)
    if values.dim() != 1 or not values.isfinite().all() or (values < 0).any() or not values.sum() > 0:
        raise ValueError(f"weight is {values.tolist()}; expected a number for each class, none negative, not all 0")
    return values


def weights_for(output: Tensor, weight: Tensor | None) -> Tensor | None:
    """The weights in the output's type.

    Raises:
        ValueError: There is not one for each of the output's channels.
    """
    if weight is None:
        return None
    if len(weight) != output.shape[1]:
        raise ValueError(f"weight has {len(weight)} numbers for the {output.shape[1]} channels of {_text(output)}")
    return weight.to(output.dtype)
