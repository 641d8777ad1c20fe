"""How metrics read outputs and targets: probabilities, classes, what is ignored, voxel counts.

Shapes: N samples, C channels or classes, any spatial dimensions *, such as (H, W), (D, H, W) or none.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args
from weakref import ref

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from dtrain.components.losses.targets import Read, TargetReader, as_label, main_of, other_than, precise

_COUNTS = WeakIdKeyDictionary()  # of each output that still lives: what a reader has counted in it, for the next metric
Activation = Literal["auto", "softmax", "sigmoid", "none"]


def known(value: str, key: str, kind: Any) -> str:
    """The value itself, if it is one of a Literal's.

    Raises:
        ValueError: It is not.
    """
    possible = get_args(kind)
    if value not in possible:
        raise ValueError(f"{key} is {value!r}; possible: {', '.join(possible)}")
    return value


def probability(threshold: float) -> float:
    """The threshold itself.

    Raises:
        ValueError: It does not lie between 0 and 1.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"a threshold is {threshold}; expected a probability between 0 and 1")
    return threshold


def wide(values: Tensor) -> Tensor:
    """In float64, so that sums over a whole data set stay exact; in float32 on a device that has no float64."""
    return values.float() if values.device.type == "mps" else values.double()


def main_logits(output: Any) -> Tensor:
    """The main one of several outputs, in float32 at least.

    Raises:
        ValueError: It has no channel dimension.
    """
    output = precise(main_of(output))
    if output.dim() < 2:
        raise ValueError(f"found an output of shape {tuple(output.shape)}; expected (N, C, *)")
    return output


def probabilities(output: Tensor, activation: str) -> Tensor:
    """What an activation makes of an output (N, C, *); 'auto' is sigmoid for one channel, softmax for several.

    Raises:
        ValueError: The softmax of one channel is asked for.
    """
    if activation == "auto":
        activation = "sigmoid" if output.shape[1] == 1 else "softmax"
    if activation == "softmax" and output.shape[1] == 1:
        raise ValueError("the softmax of one channel is always 1; use activation: sigmoid")
    if activation == "none":
        return output
    return output.sigmoid() if activation == "sigmoid" else output.softmax(dim=1)


@dataclass(frozen=True)
class ClassReader:
    """What the metrics of classes have in common: how outputs become classes, and what does not count.

    Args:
        num_classes: The number of channels, to have it checked; 2 for one channel makes the background a class, too.
            None: the output's channels, of which a single one is the foreground.
        activation: What makes probabilities of the output. With 'sigmoid', several channels are independent of one
            another (a voxel may have several); else the largest channel is the voxel's class.
        threshold: Above this probability a channel that stands for itself is there.
        ignore_index: Where the target has this value, the voxel, or this channel of it, does not count.

    Raises:
        ValueError: The activation or the threshold is impossible.
    """

    num_classes: int | None = None
    activation: str = "auto"
    threshold: float = 0.5
    ignore_index: int | None = None

    def __post_init__(self) -> None:
        known(self.activation, "activation", Activation)
        probability(self.threshold)

    def counts(self, output: Any, target: Any) -> Tensor:
        """Voxels of each sample and class: those in both, in the prediction, in the target; (N, C, 3), int64.

        Args:
            output: (N, C, *), or several, of which the main one counts.
            target: Labels (N, *) or (N, 1, *), or channels (N, C, *): one-hot, probabilities, or, with 'sigmoid',
                independent of one another.

        Raises:
            ValueError: The shapes do not fit, or a label is not a class.
        """
        output, target = main_logits(output), main_of(target)
        self._check_channels(output)
        known_counts = _COUNTS.setdefault(output, {})
        seen, versions, counts = known_counts.get(self, (None, (), None))
        now = _versions(output, target)
        if seen is None or seen() is not target or versions != now or not now:
            independent = output.shape[1] > 1 and self.activation == "sigmoid"
            counts = (self.channel_counts if independent else self.label_counts)(output, target)
            known_counts[self] = ref(target), now, counts
        return counts

    def channel_counts(self, output: Tensor, target: Tensor) -> Tensor:
        """The same with each channel by itself, there above the threshold."""
        read = self._channels(output, target)
        found, there = read.output > self.threshold, read.target > 0.5
        if read.valid is not None:
            found = found & (read.valid > 0)
        return _sums(found & there, found, there)

    def label_counts(self, output: Tensor, target: Tensor) -> Tensor:
        """The same with one class for each voxel: the largest channel, or of a single one what the threshold says."""
        if output.shape[1] > 1:
            return self._label_counts(output.max(dim=1).indices, *self._labels(output, target), output.shape[1])
        read = TargetReader(self.ignore_index).read(output, target, "shares", wait=True)
        label, valid = read.target[:, 0].round().long(), None if read.valid is None else read.valid[:, 0] > 0
        found = probabilities(output, self.activation)[:, 0] > self.threshold
        counts = self._label_counts(found.long(), label, valid, 2)
        return counts if self.num_classes == 2 else counts[:, 1:]

    def soft_sums(self, output: Any, target: Any) -> Tensor:
        """The sums of p t, p^2 and t^2 of each sample and channel, p = probabilities, t = target; (N, C, 3).

        Raises:
            ValueError: As in `counts`.
        """
        output, target = main_logits(output), main_of(target)
        self._check_channels(output)
        p, t, valid = self._channels(output, target)
        p = p if valid is None else p * valid
        return wide(_sums(p * t, p * p, t * t))

    def _check_channels(self, output: Tensor) -> None:
        channels = output.shape[1]
        if self.num_classes not in (None, channels) and (channels, self.num_classes) != (1, 2):
            raise ValueError(f"num_classes is {self.num_classes}, but the output has {channels} channel(s)")

    def _channels(self, output: Tensor, target: Tensor) -> Read:
        """Probabilities and target, both (N, C, *), and what counts of them."""
        p = probabilities(output, self.activation)
        return TargetReader(self.ignore_index).read(p, target, "classes", wait=True)

    def _labels(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """The class of each voxel (N, *), and which voxels count."""
        if self.ignore_index is None:
            label = as_label(target, output, wait=True)
            return (label if label.dim() < output.dim() else label.argmax(dim=1)), None
        if target.shape == output.shape:
            void = ~other_than(target, self.ignore_index).any(dim=1)
            first = torch.zeros_like(target[:1])
            first[:, 0] = 1
            label = as_label(torch.where(void.unsqueeze(1), first, target), output, wait=True)
            label = label if label.dim() < output.dim() else label.argmax(dim=1)
            return label, ~void & (label != self.ignore_index)
        label = as_label(target, output, self.ignore_index, wait=True)
        return label, label != self.ignore_index

    def _label_counts(self, found: Tensor, label: Tensor, valid: Tensor | None, classes: int) -> Tensor:
        samples = len(label)
        first = torch.arange(samples, device=label.device).view(-1, 1) * classes
        found, label = first + found.reshape(samples, -1), first + label.reshape(samples, -1)
        if valid is not None:
            chosen = valid.reshape(samples, -1)
            found, label = found[chosen], label[chosen]
        parts = (label[found == label], found.flatten(), label.flatten())
        return torch.stack([torch.bincount(part, minlength=samples * classes) for part in parts], -1).view(
            -1, classes, 3
        )


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    """How often each was changed in place; () where torch does not count it."""
    return () if any(tensor.is_inference() for tensor in tensors) else tuple(tensor._version for tensor in tensors)


def _sums(*parts: Tensor) -> Tensor:
    """The sums over the voxels of each part (N, C, *), side by side: (N, C, parts)."""
    return torch.stack([part.reshape(*part.shape[:2], -1).sum(dim=-1) for part in parts], dim=-1)


def summed(values: Tensor) -> Tensor:
    """Sum and number of each column's values that are not nan: (N, K) -> (K, 2)."""
    values = wide(values)
    return torch.stack([values.nansum(dim=0), wide((~values.isnan()).sum(dim=0))], dim=-1)
