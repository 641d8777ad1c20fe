"""Losses made of other losses: sums of several, masks for those that know none."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dtrain.components.losses.targets import Kind, TargetReader, main_of, mean

Loss = Callable[[Any, Any], Any]


class WeightedSum(nn.Module):
    """sum_i weights[i] * losses[i](output, target), returned as its terms, so that each of them is logged.

    In a config, `losses` is a list of components: losses: [{name: CrossEntropyLoss}, {name: DiceLoss}]. The terms bear
    the losses' names, with _2, _3 for further ones of the same name, and are weighted already: the loss is their sum. A
    loss that returns terms itself gets them listed as name_term. torch's own losses, which know tensors only, are given
    the main one of several outputs and targets; the others all of them.

    Args:
        losses: Losses f(output, target), each of which returns one number, or a dict of such.
        weights: One for each, in the same order. Default: 1.

    Raises:
        ValueError: There are no losses, or not as many weights as losses.
    """

    def __init__(self, losses: Sequence[Loss], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if not losses:
            raise ValueError("WeightedSum: losses is empty; expected a list of losses")
        if weights is not None and len(weights) != len(losses):
            raise ValueError(f"WeightedSum: {len(weights)} weights for {len(losses)} losses; expected one for each")
        self.losses = list(losses)
        self.weights = [1.0] * len(losses) if weights is None else [float(weight) for weight in weights]
        self.names = _names(losses)
        # So that their tensors, such as class weights, go to the device together with this loss.
        self.parts = nn.ModuleList(loss for loss in losses if isinstance(loss, nn.Module))

    def check_target(self, output: Any, target: Any) -> None:
        """What the losses would refuse of a target that has not been moved to the output's device yet."""
        for loss in self.losses:
            if check := getattr(loss, "check_target", None):
                check(output, target)

    def forward(self, output: Any, target: Any) -> dict[str, Tensor]:
        """The weighted terms, each one number.

        Args:
            output: What the losses take.
            target: What the losses take.
        """
        terms: dict[str, Tensor] = {}
        for name, loss, weight in zip(self.names, self.losses, self.weights, strict=True):
            value = loss(main_of(output), main_of(target)) if _is_torchs(loss) else loss(output, target)
            if isinstance(value, Mapping):
                terms |= {f"{name}_{key}": weight * term for key, term in value.items()}
            else:
                terms[name] = weight * value
        return terms


class MaskedLoss(nn.Module):
    """Another loss over those values alone whose target is not `ignore_index`: for losses that cannot ignore.

    sum(l * valid) / sum(valid), l = the values of the loss without reduction; 0 if nothing counts. The values of the
    targets that do not count are replaced by 0 before the loss sees them. pytorch-3dunet, which sets masked outputs and
    targets to 0 and divides by all, gets another loss and smaller gradients.

    In a config: loss: {name: MaskedLoss, loss: {name: MSELoss}, ignore_index: -1}.

    Args:
        loss: A loss with one value for each of the output's, that is with an attribute `reduction`, such as torch's
            MSELoss, L1Loss, SmoothL1Loss, HuberLoss, BCEWithLogitsLoss. Without an `ignore_index`: any loss.
        ignore_index: The value of the target that does not count. Default: everything counts.
        skip_last_target: Leave out the target's last channel.
        squeeze_channel: (N, 1, *) becomes (N, *).

    Raises:
        ValueError: The loss has an `ignore_index` of its own, or no `reduction`, or another one than the mean.
    """

    def __init__(
        self,
        loss: Loss,
        ignore_index: int | None = None,
        skip_last_target: bool = False,
        squeeze_channel: bool = False,
    ) -> None:
        super().__init__()
        self.target = TargetReader(ignore_index, skip_last_target, squeeze_channel)
        self.loss: Any = loss
        self.kind: Kind = "shares" if isinstance(loss, nn.BCEWithLogitsLoss | nn.BCELoss) else "values"
        if ignore_index is not None:
            name = _name(loss)
            if hasattr(loss, "ignore_index"):
                raise ValueError(f"MaskedLoss: {name} has an ignore_index itself; give it there")
            if getattr(loss, "reduction", None) != "mean":
                found = f"reduction {loss.reduction!r}" if hasattr(loss, "reduction") else "none"
                raise ValueError(
                    f"MaskedLoss: needs a loss whose `reduction` is 'mean', such as MSELoss; {name} has {found}"
                )
            self.loss = copy.deepcopy(loss)
            self.loss.reduction = "none"

    def check_target(self, output: Any, target: Any) -> None:
        """What `forward` would refuse of a target that has not been moved to the output's device yet."""
        if check := getattr(self.loss, "check_target", None):
            check(output, self.target.cut(main_of(target)))
        elif self.kind == "shares":
            self.target.check(output, target, self.kind)

    def forward(self, output: Any, target: Any) -> Tensor:
        """The loss, one number.

        Args:
            output: (N, C, *), or several, of which the main one counts.
            target: (N, C, *), or (N, *) if C is 1; without an `ignore_index`: what the loss takes.

        Raises:
            ValueError: The shapes do not fit, the loss has not one value for each of the output's, or the target of a
                binary cross entropy is not from 0 to 1.
        """
        if self.target.ignore_index is None and self.kind == "values":
            return self.loss(main_of(output), self.target.cut(main_of(target)))
        read = self.target.read(output, target, self.kind)
        if read.valid is None:
            return self.loss(read.output, read.target)
        values = self.loss(read.output, read.target)
        if values.shape != read.output.shape:
            found = f"{tuple(values.shape)} of an output of {tuple(read.output.shape)}"
            raise ValueError(f"MaskedLoss: {_name(self.loss)} made values {found}; it cannot be masked value by value")
        return mean(values, read.valid)


def _name(loss: Loss) -> str:
    function = getattr(loss, "func", loss)  # a function with some of its arguments given
    return getattr(function, "__name__", type(function).__name__)


def _names(losses: Sequence[Loss]) -> list[str]:
    names = [_name(loss) for loss in losses]
    earlier = [names[:position].count(name) for position, name in enumerate(names)]
    return [f"{name}_{count + 1}" if count else name for name, count in zip(names, earlier, strict=True)]


def _is_torchs(loss: Loss) -> bool:
    of = getattr(loss, "func", loss)
    return str(getattr(of, "__module__", None) or type(of).__module__).partition(".")[0] == "torch"
