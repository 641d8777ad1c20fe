"""How losses read outputs and targets: which of several, as labels or as channels, what is ignored.

Shapes: N samples, C channels or classes, any spatial dimensions *, such as (H, W), (D, H, W) or none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

MAIN_KEYS = ("out", "logits", "target", "label")
Kind = Literal["values", "shares", "classes"]


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


class OutsideClassesError(ValueError):
    """A target holds a value that is none of its classes.

    Attributes:
        sample_in_batch: The number of the sample in its batch.
    """

    def __init__(self, message: str, sample_in_batch: int) -> None:
        super().__init__(message)
        self.sample_in_batch = sample_in_batch


def refuse_other_values(target: Tensor, most: int, ignore_index: int | None, *, whole: bool, wait: bool) -> None:
    """Whether a target lies within 0 to `most`.

    A training must not wait for its GPU in each step, so what lies there is looked at only where `wait` says so. The
    engine hands `check_target` of a loss the target as it came from the loader, before it is moved.

    Args:
        target: (N, *), any type.
        most: The largest value that is possible.
        ignore_index: One more value that is possible.
        whole: Fractions are not possible.
        wait: Look also at what lies on a device.

    Raises:
        OutsideClassesError: Another value is there, or NaN.
    """
    if not target.numel() or not (wait or target.device.type == "cpu"):
        return
    target = target.byte() if target.dtype == torch.bool else target
    must_be_whole = whole and target.is_floating_point()
    if not must_be_whole and _is_within(target, most):
        return
    target = target if target.is_floating_point() else target.long()  # a small type would wrap what it is compared with
    if ignore_index is not None and not must_be_whole and _is_within(target.where(target != ignore_index, 0), most):
        return
    wrong = ~((target >= 0) & (target <= most))
    if must_be_whole:
        wrong |= target != target.round()
    if ignore_index is not None:
        wrong &= target != ignore_index
    if bool(wrong.any()):
        kind = "value" if target.is_floating_point() and not whole else "label"
        raise outside(target, wrong, kind, _expected(target[wrong][0].item(), most, ignore_index))


def other_than(target: Tensor, value: int) -> Tensor:
    """Where a target has another value; a type that cannot hold the value has it nowhere (torch would wrap it)."""
    kind = target.dtype
    if not kind.is_floating_point and kind != torch.bool:
        limits = torch.iinfo(kind)
        if not limits.min <= value <= limits.max:
            return torch.ones_like(target, dtype=torch.bool)
    return target != value


def _is_within(target: Tensor, most: int) -> bool:
    low, high = target.aminmax()
    return low.item() >= 0 and high.item() <= most


def outside(target: Tensor, wrong: Tensor, kind: str, expected: str) -> OutsideClassesError:
    """The error for the first of the wrong values: where it is, what it is, and what was expected."""
    sample, *voxel = wrong.nonzero()[0].tolist()
    where = f"sample {sample} of the batch" + (f" at {tuple(voxel)}" if voxel else "")
    text = f"{where}: the target has the {kind} {target[(sample, *voxel)].item():g}; expected {expected}"
    return OutsideClassesError(text, sample)


def _expected(value: float, most: int, ignore_index: int | None) -> str:
    if ignore_index is not None:
        return f"0 to {most}, or {ignore_index}, which is ignored"
    cure = " (a mask of 0 and 255 needs mask_values: [0, 255] or a division by 255; a void label, ignore_index: 255)"
    return f"0 to {most}" + cure * (value == 255 and most < 255)


def as_label(target: Tensor, output: Tensor, ignore_index: int | None = None, *, wait: bool = False) -> Tensor:
    """A target as torch's cross entropy wants it.

    Args:
        target: Labels (N, *) or (N, 1, *) of any type; or of the output's shape, either floating point, the probability
            of each class, or whole numbers, one-hot.
        output: Logits (N, C, *).
        ignore_index: A label that is possible beside 0 to C - 1.
        wait: Look at the values also where they lie on a device; see `refuse_other_values`.

    Returns:
        Labels (N, *), int64, or probabilities (N, C, *) of the output's type.

    Raises:
        ValueError: The output has one channel only, the shapes do not fit, whole numbers are not one-hot, or a value is
            none of the classes.
    """
    classes = output.shape[1]
    if classes == 1:
        raise ValueError("cross entropy of one channel is always 0; use BCEWithLogitsLoss, or one channel per class")
    if target.shape == output.shape:
        if target.is_floating_point():
            refuse_other_values(target, 1, None, whole=False, wait=wait)
            return target.to(output.dtype)
        if wait or target.device.type == "cpu":
            _refuse_what_is_not_one_hot(target, output)
        return target.long().argmax(dim=1)
    labels = _labels(target, output)
    if labels is None:
        wanted = f"labels {_text(output[:, 0])} or {_text(output[:, :1])}, or probabilities {_text(output)}"
        raise ValueError(f"found a target of shape {_text(target)}; expected {wanted}")
    refuse_other_values(labels, classes - 1, ignore_index, whole=True, wait=wait)
    return labels.long()


def _refuse_what_is_not_one_hot(target: Tensor, output: Tensor) -> None:
    if not bool(((target == 0) | (target == 1)).all() & (target.sum(dim=1) == 1).all()):
        raise ValueError(
            f"whole numbers in the output's shape {_text(output)} must be one-hot, and these are not; "
            f"expected labels {_text(output[:, 0])}, or probabilities as floating point"
        )


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

    def read(self, output: Any, target: Any, kind: Kind, *, wait: bool = False) -> Read:
        """An output and its target in the same shape.

        Args:
            output: (N, C, *), or several, of which the main one counts; see `main_of`.
            target: (N, C, *); (N, *) if C is 1; of classes also labels (N, *) or (N, 1, *), which become one-hot.
            kind: values: any numbers. shares: 0 to 1. classes: 0 to 1 in channels, or labels that name them.
            wait: Look at the values also where they lie on a device; see `refuse_other_values`.

        Raises:
            ValueError: The shapes do not fit, or a value is none of the classes.
        """
        output, target = precise(main_of(output)), self.cut(main_of(target))
        target, is_label = self._fitting(output, target, kind)
        self._look_at(output, target, is_label, kind, wait)
        if is_label:
            return self._one_hot(output, target.long().unsqueeze(1))
        valid = None if self.ignore_index is None else other_than(target, self.ignore_index)
        target = target.to(output.dtype)
        return Read(output, target, None) if valid is None else _without(output, target, valid)

    def check(self, output: Any, target: Any, kind: Kind) -> None:
        """What `read` would refuse of a target that is still where the loader left it; the output may lie elsewhere.

        Raises:
            ValueError: See `read`.
        """
        output = main_of(output)
        self._look_at(output, *self._fitting(output, self.cut(main_of(target)), kind), kind, wait=False)

    def _fitting(self, output: Tensor, target: Tensor, kind: Kind) -> tuple[Tensor, bool]:
        """The target in the output's shape, or labels (N, *), and whether they are labels."""
        one_of_each = _labels(target, output)
        if target.shape != output.shape and one_of_each is not None and output.shape[1] == 1:
            target = one_of_each.unsqueeze(1)
        if target.shape == output.shape:
            return target, False
        if kind != "classes" or one_of_each is None:
            possible = f"; expected {_text(output)}" + (f" or labels {_text(output[:, 0])}" * (kind == "classes"))
            raise ValueError(f"a target of shape {_text(target)} for an output of {_text(output)}{possible}")
        return one_of_each, True

    def _look_at(self, output: Tensor, target: Tensor, is_label: bool, kind: Kind, wait: bool) -> None:
        if kind != "values":
            most = output.shape[1] - 1 if is_label else 1
            refuse_other_values(target, most, self.ignore_index, whole=is_label, wait=wait)

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
