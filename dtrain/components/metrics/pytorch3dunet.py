"""pytorch-3dunet's MeanIoU, to the number, for configs that are moved over from there."""

from typing import Any

from torch import Tensor

from dtrain.components.losses.targets import main_of
from dtrain.components.metrics import overlap
from dtrain.components.metrics.reading import Activation, main_logits


class MeanIoU(overlap.MeanIoU):
    """The mean over the samples of each sample's IoU, as pytorch3dunet.unet3d.metrics.MeanIoU computes it.

    It depends on the target's form. With labels, the largest channel is the voxel's class, whatever the activation, and
    class 0 may be skipped. With channels, each counts above a probability of 0.5, by itself, and none is skipped. A
    class that neither the sample's target nor the prediction has counts 1, so a sample with few classes has a high
    score; dtrain's MeanIoU leaves it out, and reads outputs in one way.

    Args:
        skip_background: Whether class 0 is left out, of labels.
        ignore_index: The target's value that does not count; in pytorch-3dunet there is no such thing.
        activation: auto (sigmoid for one channel, softmax for several), softmax, sigmoid or none.

    Raises:
        ValueError: The activation is unknown.
    """

    higher_is_better = True

    def __init__(
        self, skip_background: bool = True, ignore_index: int | None = None, activation: Activation = "auto"
    ) -> None:
        super().__init__(ignore_index=ignore_index, aggregation="sample", activation=activation, absent="one")
        self.skip_background = skip_background

    def _counts(self, output: Any, target: Any) -> Tensor:
        output, target = main_logits(output), main_of(target)
        of_channels = target.shape == output.shape
        self.include_background = of_channels or not self.skip_background
        return (self.reader.channel_counts if of_channels else self.reader.label_counts)(output, target)
