"""Metrics of continuous values: squared error and signal to noise.

Output and target are of one shape, (N, C, *); a target (N, *) is right for an output of one channel.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from dtrain.components.losses.targets import TargetReader
from dtrain.components.metrics.overlap import Aggregation
from dtrain.components.metrics.reading import Activation, known, main_logits, probabilities, wide


class _Squares(Metric):
    """What both need: squared errors of each sample, and a sum with the number of what was added."""

    is_differentiable = False
    full_state_update = False
    totals: Tensor

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = known(activation, "activation", Activation)
        self.add_state("totals", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")

    def _read(self, output: Any, target: Any) -> tuple[Tensor, Tensor]:
        """Squared errors and target, both (N, values)."""
        read = TargetReader().read(main_logits(output), target, "values")
        target = read.target.flatten(1)
        return (probabilities(read.output, self.activation).flatten(1) - target).square(), target

    def _add(self, values: Tensor, number: int) -> None:
        total = wide(values).sum()
        self.totals = self.totals + torch.stack([total, torch.full_like(total, number)])

    def _mean(self) -> Tensor:
        return self.totals[0] / self.totals[1]


class MSE(_Squares):
    """Mean of (output - target)^2 over all values of the data set, as torchmetrics' MeanSquaredError.

    pytorch-3dunet's metric of this name is the mean over batches of each batch's. nan if there is no value.

    Args:
        activation: none (the output itself), auto (sigmoid for one channel, softmax for several), sigmoid or softmax.

    Raises:
        ValueError: The activation is unknown.
    """

    higher_is_better = False

    def __init__(self, activation: Activation = "none") -> None:
        super().__init__(activation)

    def update(self, output: Any, target: Any) -> None:
        """Take in one batch: output and target (N, C, *)."""
        errors, _ = self._read(output, target)
        self._add(errors, errors.numel())

    def compute(self) -> Tensor:
        """The mean."""
        return self._mean()


class PSNR(_Squares):
    """10 log10(R^2 / MSE) in dB, the peak signal-to-noise ratio; R is the range of the data.

    aggregation 'sample': the mean over the samples of each one's value, as literature on denoising reports it (with
    batches of one also pytorch-3dunet's). 'global': of the MSE over all values, as torchmetrics'
    PeakSignalNoiseRatio. A sample without any error has, and gives to the mean, infinity.

    Args:
        data_range: R, the difference between the greatest and the least value possible, such as 1 or 255. Default: that
            between the greatest and the least value of all targets, also with 'sample'; then two data sets can not be
            compared. Nothing is guessed from the type of the values, as pytorch-3dunet does.
        aggregation: sample or global.
        activation: none (the output itself), auto (sigmoid for one channel, softmax for several), sigmoid or softmax.

    Raises:
        ValueError: The range is not positive, or another argument is none of the possible ones.
    """

    higher_is_better = True
    lowest: Tensor
    highest: Tensor

    def __init__(
        self,
        data_range: float | None = None,
        aggregation: Aggregation = "sample",
        activation: Activation = "none",
    ) -> None:
        super().__init__(activation)
        if data_range is not None and not data_range > 0:
            raise ValueError(f"data_range is {data_range}; expected a number greater than 0, or null")
        self.data_range, self.aggregation = data_range, known(aggregation, "aggregation", Aggregation)
        self.add_state("lowest", torch.tensor(torch.inf), dist_reduce_fx="min")
        self.add_state("highest", torch.tensor(-torch.inf), dist_reduce_fx="max")

    def update(self, output: Any, target: Any) -> None:
        """Take in one batch: output and target (N, C, *)."""
        errors, target = self._read(output, target)
        if self.aggregation == "sample":
            self._add(10 * wide(errors).mean(dim=1).log10(), len(errors))
        else:
            self._add(errors, errors.numel())
        self.lowest = torch.minimum(self.lowest, target.min())
        self.highest = torch.maximum(self.highest, target.max())

    def compute(self) -> Tensor:
        """The value in dB; nan if there was no sample, or all targets are one constant and no range is given."""
        span = self.highest - self.lowest if self.data_range is None else torch.full_like(self.lowest, self.data_range)
        signal = 20 * wide(span.where(span > 0, torch.nan)).log10()
        return signal - (self._mean() if self.aggregation == "sample" else 10 * self._mean().log10())
