"""Deep supervision: what the U-Nets return, what the loss makes of it, by hand, and MONAI's networks with it."""

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from whole_runs import Place, figures, last

from dtrain.components.losses.combined import WeightedSum
from dtrain.components.losses.deep_supervision import DeepSupervision, nearest
from dtrain.components.losses.dice import DiceLoss
from dtrain.components.models.unet import ResidualUNet2D, ResidualUNet3D, ResidualUNetSE3D, UNet2D, UNet3D
from dtrain.data import rng

SMALL = {"in_channels": 1, "out_channels": 3, "f_maps": 4, "num_levels": 3, "num_groups": 2}


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(1)


def cross_entropy(output: Tensor, label: Tensor) -> float:
    """The mean over voxels of -log softmax, in numpy."""
    values = output.detach().double().numpy()
    values = values - values.max(1, keepdims=True)
    log = values - np.log(np.exp(values).sum(1, keepdims=True))
    return float(-np.take_along_axis(log, label.numpy()[:, None], 1).mean())


@pytest.mark.parametrize("model", [UNet2D, ResidualUNet2D, UNet3D, ResidualUNet3D, ResidualUNetSE3D])
def test_a_unet_returns_each_level_in_train_mode_and_the_main_one_in_eval_mode(model: Any) -> None:
    rng.seed_all(0)
    plain = model(**SMALL)
    rng.seed_all(0)
    deep = model(**SMALL, deep_supervision=True)
    names = [name for name in deep.state_dict() if not name.startswith("deep_heads.")]
    assert names == list(plain.state_dict()) and len(names) == len(deep.state_dict()) - 2
    assert all(torch.equal(deep.state_dict()[name], value) for name, value in plain.state_dict().items())
    sides = (9, 8, 12)[-model.dims :]
    image = torch.randn(2, 1, *sides)
    outputs = deep(image)
    assert [item.shape for item in outputs] == [(2, 3, *sides), (2, 3, *(side // 2 for side in sides))]
    assert torch.equal(outputs[0], plain(image))
    assert torch.equal(deep.eval()(image), plain.eval()(image))
    sum(item.sum() for item in outputs).backward()
    assert all(value.grad is not None for value in deep.parameters())


def test_as_many_outputs_as_levels_on_the_way_up_also_of_flat_volumes() -> None:
    outputs = UNet2D(**SMALL | {"num_levels": 5}, deep_supervision=True)(torch.randn(1, 1, 1, 32, 48))
    assert [item.shape[2:] for item in outputs] == [(1, 32, 48), (1, 16, 24), (1, 8, 12), (1, 4, 6)]


def test_the_loss_is_the_weighted_sum_over_targets_of_each_size() -> None:
    outputs = [torch.randn(2, 3, 8, 6), torch.randn(2, 3, 4, 3), torch.randn(2, 3, 2, 2)]
    label = torch.randint(0, 3, (2, 8, 6))
    # A voxel's centre lies at (i + 1/2) times the ratio: 1, 3, 5, 7 of 8; 2, 6 of 8; 1, 3, 5 of 6; 1, 4 of 6.
    small = [label, label[:, [1, 3, 5, 7]][:, :, [1, 3, 5]], label[:, [2, 6]][:, :, [1, 4]]]
    values = [cross_entropy(output, target) for output, target in zip(outputs, small, strict=True)]
    found = float(DeepSupervision(nn.CrossEntropyLoss())(outputs, label))
    assert found == pytest.approx((values[0] * 4 + values[1] * 2 + values[2]) / 7, rel=1e-6)
    found = float(DeepSupervision(nn.CrossEntropyLoss(), weights=[1, 0.5, 0])(tuple(outputs), label))
    assert found == pytest.approx(values[0] + values[1] / 2, rel=1e-6)


def test_outputs_can_be_resampled_instead() -> None:
    outputs, label = [torch.randn(1, 1, 4), torch.randn(1, 1, 2)], torch.tensor([[[0.0, 1, 1, 0]]])
    low, high = outputs[1][0, 0].tolist()
    enlarged = torch.tensor([[[low, 0.75 * low + 0.25 * high, 0.25 * low + 0.75 * high, high]]])
    found = DeepSupervision(nn.MSELoss(), resample="output", weights=[0, 1])(outputs, label)
    assert float(found) == pytest.approx(float((enlarged - label).square().mean()), rel=1e-5)


def test_a_single_output_has_the_inner_loss_and_terms_stay_terms() -> None:
    output, label = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    loss = DeepSupervision(WeightedSum([nn.CrossEntropyLoss(), DiceLoss()], [1, 2]))
    plain = WeightedSum([nn.CrossEntropyLoss(), DiceLoss()], [1, 2])(output, label)
    assert all(torch.equal(value, plain[name]) for name, value in loss(output, label).items())
    terms = loss([output, output], label)  # the weights 2/3 and 1/3 make the same of twice the same
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(
        {name: float(value) for name, value in plain.items()}
    )
    with pytest.raises(ValueError, match="the target has the label 7"):
        loss.check_target([output, output], torch.full((2, 4, 4), 7))


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64, torch.bool, torch.float16], ids=str)
def test_a_target_keeps_its_type_and_its_values(kind: torch.dtype) -> None:
    target = torch.tensor([[0, 1, 1, 0, 1, 0]]).to(kind)
    assert torch.equal(nearest(target, [3]), target[:, [1, 3, 5]])
    assert torch.equal(nearest(target, [12]), target.repeat_interleave(2, 1))
    assert nearest(target, [6]) is target


@pytest.mark.parametrize(
    ("output", "target", "heads"),
    [
        ((2, 2, 3, 8, 8), (2, 8, 8), 2),  # images with labels
        ((2, 2, 3, 8, 8), (2, 1, 8, 8), 2),
        ((2, 2, 3, 4, 8, 8), (2, 4, 8, 8), 2),  # volumes
        ((2, 2, 1, 4, 8, 8), (2, 1, 4, 8, 8), 2),
        ((2, 3, 8, 8), (2, 8, 8), 1),  # not stacked
        ((2, 3, 4, 8, 8), (2, 3, 4, 8, 8), 1),
    ],
    ids=str,
)
def test_stacked_outputs_are_told_by_their_shape(output: Any, target: Any, heads: int) -> None:
    seen: list[torch.Size] = []
    loss = DeepSupervision(lambda output, target: seen.append(output.shape) or output.mean())
    loss(torch.zeros(output), torch.zeros(target))
    assert seen == [torch.Size((output[0], *output[2:])) if heads > 1 else torch.Size(output)] * heads
    seen.clear()
    loss.eval()(torch.zeros(output), torch.zeros(target))
    assert seen == [torch.Size(output)]


def test_what_only_the_user_can_tell_is_asked() -> None:
    output, target = torch.zeros(2, 2, 1, 8, 8), torch.zeros(2, 1, 8, 8)
    loss = nn.BCEWithLogitsLoss()
    with pytest.raises(ValueError, match="may be one of volumes or several of images; say stacked: false"):
        DeepSupervision(loss)(output, target)
    assert float(DeepSupervision(loss, stacked=True)(output, target)) == pytest.approx(np.log(2))
    with pytest.raises(ValueError, match="2 weights for the model's 3 outputs"):
        DeepSupervision(loss, weights=[1, 1])([target] * 3, target)
    with pytest.raises(ValueError, match="expected one per output, none below 0"):
        DeepSupervision(loss, weights=[1, -1])


@pytest.mark.slow
def test_monais_networks_learn_with_it() -> None:
    nets = importlib.import_module("monai.networks.nets")
    sides = {"kernel_size": [3, 3, 3, 3], "strides": [1, 2, 2, 2], "upsample_kernel_size": [2, 2, 2]}
    stacked = nets.DynUNet(2, 1, 3, **sides, filters=[4, 8, 8, 8], deep_supervision=True, deep_supr_num=2)
    listed = nets.SegResNetDS(2, init_filters=8, in_channels=1, out_channels=3, blocks_down=(1, 1, 1), dsdepth=2)
    image, label = torch.randn(2, 1, 16, 16), torch.randint(0, 3, (2, 16, 16))
    for model, sizes in ((stacked, [16, 16, 16]), (listed, [16, 8])):
        outputs = model(image)
        outputs = list(outputs.unbind(1)) if isinstance(outputs, Tensor) else outputs
        weights = [0.5**level for level in range(len(sizes))]
        value = sum(
            weight * cross_entropy(output, label if side == 16 else label[:, 1::2, 1::2])
            for weight, output, side in zip(weights, outputs, sizes, strict=True)
        )
        loss = DeepSupervision(nn.CrossEntropyLoss())
        assert float(loss(model(image), label).detach()) == pytest.approx(value / sum(weights), rel=1e-5)
        main = model.eval()(image)
        assert float(loss.eval()(main, label).detach()) == pytest.approx(cross_entropy(main, label), rel=1e-5)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_training_measures_the_main_output(place: Place, ranks: int) -> None:
    data = {"name": "DigitsScene", "batch_size": 4 // ranks, "shuffle": False, "size": [32, 32], "per_image": [1, 2]}
    loaders = data | {"train": {"split": "train", "length": 8}, "val": {"split": "val", "length": 5}}
    changes = {"model": {"name": "UNet2D", **SMALL, "out_channels": 11, "deep_supervision": True}, "loaders": loaders}
    changes |= {"loss": {"name": "DeepSupervision", "loss": {"name": "CrossEntropyLoss"}}, "trainer.max_epochs": 1}
    changes["metrics"] = {"name": "Accuracy", "task": "multiclass", "num_classes": 11, "multidim_average": "global"}
    name = f"deep-{ranks}"
    place.run(place.config(name, **changes), ranks=ranks)
    found = figures(place.path(name))
    from dtrain.components.datasets.digits_scene import DigitsScene

    rng.seed_all(0)
    model = UNet2D(**SMALL | {"out_channels": 11}, deep_supervision=True)
    options = {key: value for key, value in data.items() if key in ("size", "per_image")}
    samples = DigitsScene(split="train", length=8, **options)
    image, label = (torch.stack([torch.as_tensor(samples[index][part]) for index in range(4)]) for part in (0, 1))
    large, small = model(image)
    value = 2 / 3 * cross_entropy(large, label) + 1 / 3 * cross_entropy(small, label[:, 1::2, 1::2])
    assert found["train/loss"][1] == pytest.approx(value, rel=1e-5)
    model.load_state_dict(last(place.path(name)).weights)
    unseen = DigitsScene(split="val", length=5, **options)
    image, label = (torch.stack([torch.as_tensor(unseen[index][part]) for index in range(5)]) for part in (0, 1))
    with torch.no_grad():
        main = model.eval()(image)
    assert found["val/loss"][2] == pytest.approx(float(F.cross_entropy(main, label)), rel=1e-4)
    assert found["val/Accuracy"][2] == pytest.approx(float((main.argmax(1) == label).float().mean()), abs=1e-6)
