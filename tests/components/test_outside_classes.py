"""Targets with values that are none of the classes: refused by every loss and metric, with sample, place and file."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dtrain.components.datasets.images import ImageMaskFolder
from dtrain.components.datasets.pidnet import PIDNetDatasetWrapper
from dtrain.components.datasets.slices import SliceBuilder
from dtrain.components.losses.combined import MaskedLoss, WeightedSum
from dtrain.components.losses.cross_entropy import CrossEntropyLossSq, WeightedCrossEntropyLoss
from dtrain.components.losses.dice import BCEDiceLoss, DiceLoss, GeneralizedDiceLoss
from dtrain.components.losses.pidnet import PIDNetLoss
from dtrain.components.metrics.instances import AdaptedRandError, AveragePrecision, BoundaryAveragePrecision
from dtrain.components.metrics.overlap import DSC, BinaryIoU, DiceCoefficient, MacroPrecision, MeanIoU, PixelAccuracy
from dtrain.components.metrics.pytorch3dunet import MeanIoU as MovedMeanIoU
from dtrain.loss import Criterion
from dtrain.modelloader import Forward

DICES = (DiceLoss, BCEDiceLoss, GeneralizedDiceLoss)
OVERLAPS = (MeanIoU, DiceCoefficient, functools.partial(DiceCoefficient, False), MovedMeanIoU)
ENTROPIES = (CrossEntropyLossSq, WeightedCrossEntropyLoss)
SIZES = {"2-D": (4, 5), "3-D": (3, 4, 5), "classification": ()}

Make = Callable[..., Any]


def of(made: Any, output: Tensor, target: Any) -> float:
    """The loss or figure of one batch."""
    if isinstance(made, nn.Module) and hasattr(made, "update"):
        made.update(output, target)
        return float(made.compute())
    value = made(output, target)
    return float(sum(value.values()) if isinstance(value, dict) else value)


def with_value(target: Tensor, value: float, sample: int = 1) -> tuple[Tensor, str]:
    """The target with that value at the last voxel of a sample, and how a message names the place."""
    target = target.clone()
    target[sample].view(-1)[-1:] = value
    place = tuple(extent - 1 for extent in target.shape[1:])
    return target, rf"sample {sample} of the batch" + (rf" at \({', '.join(map(str, place))},?\)" if place else "")


@pytest.fixture(params=list(SIZES))
def size(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return SIZES[request.param]


ONE_CHANNEL: list[Make] = [
    *DICES,
    *OVERLAPS,
    lambda **keys: MaskedLoss(nn.BCEWithLogitsLoss(), **keys),
    lambda **keys: MeanIoU(2, **keys),
    BinaryIoU,
    PixelAccuracy,
    MacroPrecision,
]


@pytest.mark.parametrize("make", ONE_CHANNEL)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.float16])
def test_a_mask_of_0_and_255_is_refused_by_what_has_one_channel(make: Make, dtype: torch.dtype, size) -> None:
    output, mask = torch.randn(2, 1, *size), torch.zeros(2, 1, *size)
    mask[0] = 1
    given, place = with_value(mask, 255)
    for target in (given.to(dtype), given[:, 0].to(dtype)):
        at = place if target is not given and target.dim() == output.dim() else r"sample 1 of the batch"
        with pytest.raises(ValueError, match=rf"{at}.*the target has the (value|label) 255; expected 0 to 1"):
            of(make(), output, target)
        right = target.clone()
        right[right == 255] = 1
        of(make(), output, right)
        ignoring = make(ignore_index=255)
        of(ignoring, output, target)
        other = target.clone()
        other[other == 1] = 2
        with pytest.raises(ValueError, match=r"has the (value|label) 2; expected 0 to 1, or 255, which is ignored"):
            of(make(ignore_index=255), output, other)


@pytest.mark.parametrize(
    "make", [*DICES, *OVERLAPS, *ENTROPIES, DSC, MacroPrecision, PixelAccuracy, lambda **keys: MeanIoU(4, **keys)]
)
@pytest.mark.parametrize("value", [4, 255, -1, -100])
def test_a_label_that_is_no_class_is_refused(make: Make, value: int, size) -> None:
    output, label = torch.randn(2, 4, *size), torch.randint(0, 4, (2, *size))
    given, place = with_value(label, value)
    loss = make(ignore_index=None) if make in ENTROPIES else make()
    for target in (given, given.short(), given.float(), given.unsqueeze(1)):
        at = place if target.dim() < output.dim() else "sample 1 of the batch"
        with pytest.raises(ValueError, match=rf"{at}.*the target has the label {value}; expected 0 to 3"):
            of(loss, output, target)
    of(make(ignore_index=value), output, given)
    with pytest.raises(ValueError, match=rf"the label {value}; expected 0 to 3, or 77, which is ignored"):
        of(make(ignore_index=77), output, given)


@pytest.mark.parametrize("make", [*DICES, *OVERLAPS, *ENTROPIES, PixelAccuracy])
def test_a_small_type_does_not_wrap_the_label_that_is_ignored(make: Make) -> None:
    """For torch, 255 as uint8 equals -1."""
    torch.manual_seed(0)
    output, label = torch.randn(2, 4, 4, 5), torch.randint(0, 4, (2, 4, 5), dtype=torch.uint8)
    expected = of(make(), output, label)
    assert of(make(ignore_index=-1), output, label) == pytest.approx(expected)
    with pytest.raises(ValueError, match="the label 255; expected 0 to 3, or -1, which is ignored"):
        of(make(ignore_index=-1), output, with_value(label, 255)[0])
    with pytest.raises(ValueError, match="the label -1; expected 0 to 3, or 255, which is ignored"):
        of(make(ignore_index=255), output, with_value(label.char(), -1)[0])
    if make not in ENTROPIES:
        mask = torch.tensor([[[[1, 0], [0, 255]]]], dtype=torch.uint8)
        with pytest.raises(ValueError, match="the label 255; expected 0 to 1, or -1, which is ignored"):
            of(make(ignore_index=-1), torch.randn(1, 1, 2, 2), mask)


@pytest.mark.parametrize("make", [*DICES, *OVERLAPS, *ENTROPIES, PixelAccuracy])
def test_a_fraction_is_no_label(make: Make, size) -> None:
    output, label = torch.randn(2, 4, *size), torch.ones(2, *size)
    with pytest.raises(ValueError, match=r"the target has the label 1.5; expected 0 to 3"):
        of(make(), output, with_value(label, 1.5)[0])
    with pytest.raises(ValueError, match=r"the target has the label nan; expected 0 to 3"):
        of(make(), output, with_value(label, float("nan"))[0])


@pytest.mark.parametrize(
    "make", [*DICES, *OVERLAPS, CrossEntropyLossSq, functools.partial(MeanIoU, activation="sigmoid")]
)
@pytest.mark.parametrize("value", [255.0, -0.5, 1.01, float("nan")])
def test_channels_outside_0_to_1_are_refused_and_soft_ones_taken(make: Make, value: float, size) -> None:
    output, channels = torch.randn(2, 4, *size), torch.rand(2, 4, *size).softmax(1)
    given, place = with_value(channels, value)
    with pytest.raises(ValueError, match=rf"{place}: the target has the value {value:g}; expected 0 to 1"):
        of(make(), output, given)
    of(make(), output, channels)


@pytest.mark.parametrize("make", [AdaptedRandError, AveragePrecision, BoundaryAveragePrecision])
@pytest.mark.parametrize("value", [-1, 0.5])
def test_what_is_no_number_of_an_instance_is_refused(make: Make, value: float) -> None:
    output, label = torch.randn(2, 1, 6, 7), torch.zeros(2, 6, 7)
    label[:, :3, :3], label[:, 4:] = 1, 300
    of(make(), output, label)
    bad, place = with_value(label, value)
    with pytest.raises(ValueError, match=rf"{place}: the target has the label {value:g}; expected the numbers of inst"):
        of(make(), output, bad)
    if value == -1:
        of(make(ignore_index=-1), output, bad)
        of(make(background=-1), output, bad)


def test_pidnets_label_and_boundary_are_looked_at() -> None:
    outputs = [torch.randn(2, channels, 4, 6, requires_grad=True) for channels in (3, 3, 1)]
    label, boundary = torch.randint(0, 3, (2, 4, 6)), torch.zeros(2, 4, 6)
    boundary[:, 1] = 1
    loss = PIDNetLoss()
    loss(outputs, (label, boundary))
    with pytest.raises(ValueError, match=r"sample 1 of the batch at \(3, 5\): .* label 3; expected 0 to 2, or 255, "):
        loss(outputs, (with_value(label, 3)[0], boundary))
    loss(outputs, (with_value(label, 255)[0], boundary))
    for target in (boundary * 255, (boundary * 255).unsqueeze(1)):
        with pytest.raises(ValueError, match=r"has the label 255; expected 0 to 1"):
            loss(outputs, (label, target))
    loss(outputs, (with_value(label, 255)[0], with_value(boundary, 255)[0]))  # unknown in both
    with pytest.raises(ValueError, match="the label 7; expected 0 to 2"):
        loss(outputs[0], with_value(label, 7)[0])


def test_sums_and_masks_look_at_what_their_losses_are_given() -> None:
    output, label = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    bad = with_value(label, 9)[0]
    summed = WeightedSum([CrossEntropyLossSq(), nn.CrossEntropyLoss()])
    of(summed, output, label)
    masked = MaskedLoss(DiceLoss(), skip_last_target=True, squeeze_channel=True)
    of(masked, output, torch.stack((label, bad), 1))  # the last channel is not the loss's
    for loss, target in ((summed, bad), (masked, torch.stack((bad, label), 1))):
        with pytest.raises(ValueError, match="the label 9; expected 0 to 2"):
            loss(output, target)
        with pytest.raises(ValueError, match="the label 9; expected 0 to 2"):
            loss.check_target(output, target)


LOSSES: dict[str, tuple[Make, int, Make]] = {  # with the output's channels, and a target of samples and voxels
    "dice": (DiceLoss, 1, lambda n: torch.ones(n, 1, 4, 8)),
    "bce dice": (BCEDiceLoss, 3, lambda n: torch.ones(n, 4, 8, dtype=torch.long)),
    "generalized": (GeneralizedDiceLoss, 3, lambda n: torch.ones(n, 4, 8, dtype=torch.long)),
    "ignoring": (lambda: DiceLoss(ignore_index=255), 3, lambda n: torch.ones(n, 4, 8, dtype=torch.long)),
    "entropy": (CrossEntropyLossSq, 3, lambda n: torch.ones(n, 4, 8, dtype=torch.long)),
    "one-hot": (CrossEntropyLossSq, 3, lambda n: torch.eye(3).long()[None, :, :, None].repeat(n, 1, 1, 8)),
    "weighted": (WeightedCrossEntropyLoss, 3, lambda n: torch.ones(n, 4, 8, dtype=torch.long)),
    "masked": (lambda: MaskedLoss(nn.BCEWithLogitsLoss(), ignore_index=7), 1, lambda n: torch.ones(n, 1, 4, 8)),
    "torch": (nn.BCEWithLogitsLoss, 1, lambda n: torch.ones(n, 1, 4, 8)),
    "sum": (lambda: WeightedSum([DiceLoss(), CrossEntropyLossSq()]), 3, lambda n: torch.ones(n, 4, 8).long()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_training_never_waits_for_a_device_and_yet_refuses(name: str) -> None:
    """The meta device has no values at all: whatever would wait for one fails."""
    make, channels, target_of = LOSSES[name]
    target = target_of(2)
    height = target.shape[-2]
    criterion = Criterion(make()).to(torch.device("meta"))
    forward = Forward(nn.Conv2d(channels, channels, 1, device="meta"), torch.device("meta"), criterion=criterion)
    image = torch.randn(2, channels, height, 8)
    loss, _, _ = forward(forward.module, (image, target))
    assert loss.device.type == "meta"
    loss.backward()
    bad = target.clone()
    bad[1, ..., -1, -1] = 9
    with pytest.raises(ValueError, match=r"sample 1 of the batch|must be one-hot") as caught:
        forward(forward.module, (image, bad))
    assert getattr(caught.value, "sample_in_batch", 1) == 1


def test_a_dataset_says_where_an_item_lies(tmp_path: Path) -> None:
    image_mask_files(tmp_path, [255])
    patches = ImageMaskFolder(
        str(tmp_path / "images"), str(tmp_path / "masks"), slice_builder=SliceBuilder([8, 8]), num_classes=256
    )
    assert patches.where(3) == f"{tmp_path}/images/0.png [8:16, 8:16]"
    assert PIDNetDatasetWrapper(patches).where(1) == f"{tmp_path}/images/0.png [0:8, 8:16]"


# --------------------------------------------------------------------------------------------- on the command line


def image_mask_files(folder: Path, highest: list[int]) -> None:
    """Images of 16 x 16 pixels with masks of 0 and each one's highest value."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, value in enumerate(highest):
        mask = np.zeros((16, 16), np.uint8)
        mask[4:9, 3:12] = value
        Image.fromarray(mask // max(1, value) * 100 + 50).save(folder / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")


CONFIG = """
model: {name: UNet2D, in_channels: 1, out_channels: 1, f_maps: [4, 8], num_groups: 2}
loaders:
  name: ImageMaskFolder
  batch_size: 2
  transforms: [{name: Standardize}]
  train: {images: a/images, masks: a/masks, shuffle: false}
  val: {images: b/images, masks: b/masks}
loss: {name: DiceLoss}
optimizer: {name: SGD, lr: 0.1}
trainer: {max_epochs: 1, checkpoint_dir: run}
mlflow: {exit_timeout_seconds: 0}
"""


def test_check_and_training_name_the_file_of_a_mask_of_0_and_255(run_cli, tmp_path: Path) -> None:
    image_mask_files(tmp_path / "a", [*[1] * 7, 255])  # the last one is in the second batch of rank 1
    image_mask_files(tmp_path / "b", [1, 255])
    (tmp_path / "c.yaml").write_text(CONFIG)
    checked = run_cli(["check", "c.yaml", "loaders.ignore_index=7"])
    assert "loss: DiceLoss has the ignore_index None (its default), the data 7" in checked.text
    assert checked.rc != 0 and "the target has the label 255; expected 0 to 1" in checked.text
    assert f"sample 1 is {tmp_path}/b/images/1.png [0:16, 0:16]" in checked.text
    trained = run_cli(["c.yaml", "loss={name: MaskedLoss, loss: {name: BCEWithLogitsLoss}}"], nproc=2)
    assert trained.rc == 1, trained.text
    card = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert (card["rank"], card["step"], card["error"]) == (1, 1, "OutsideClassesError")
    message = card["message"].splitlines()
    assert "sample 1 of the batch" in message[0] and "has the label 255; expected 0 to 1" in message[0]
    assert f"sample 7 is {tmp_path}/a/images/7.png [0:16, 0:16]" in message
