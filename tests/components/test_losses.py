"""The loss components: their definitions by loops over voxels, masks, absent classes, half precision, and YAML."""

import importlib
import math
import textwrap
import types
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dtrain import ConfigError, load_config
from dtrain.components.losses.combined import MaskedLoss, WeightedSum
from dtrain.components.losses.cross_entropy import CrossEntropyLossSq, WeightedCrossEntropyLoss
from dtrain.components.losses.dice import BCEDiceLoss, DiceLoss, GeneralizedDiceLoss
from dtrain.components.losses.regression import WeightedSmoothL1Loss
from dtrain.loss import get_loss_criterion

SIZES = {"classification": (), "2-D": (5, 6), "3-D": (3, 4, 5)}
IGNORED = 255


@pytest.fixture(scope="module")
def published() -> types.ModuleType:
    """pytorch-3dunet's own losses."""
    return importlib.import_module("pytorch3dunet.unet3d.losses")


@pytest.fixture(scope="module")
def monai() -> types.ModuleType:
    return importlib.import_module("monai.losses")


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(1)


@pytest.fixture(params=list(SIZES))
def size(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return SIZES[request.param]


def logits(size: tuple[int, ...], channels: int = 3, samples: int = 2) -> Tensor:
    return torch.randn(samples, channels, *size) * 2


def labels(size: tuple[int, ...], channels: int = 3, samples: int = 2) -> Tensor:
    """Of two samples without spatial dimensions too, they are 0 and 1: the largest class is absent there."""
    drawn = torch.randint(0, channels, (samples, *size))
    return drawn if size else torch.arange(samples) % channels


def one_hot(label: Tensor, channels: int = 3) -> Tensor:
    return torch.stack([(label == channel).float() for channel in range(channels)], dim=1)


def some_ignored(label: Tensor) -> Tensor:
    """The same with about a third of the voxels ignored; of samples without voxels, the first."""
    if label.dim() == 1:
        return label.where(torch.arange(len(label)) > 0, IGNORED)
    return label.where(torch.rand(label.shape) > 0.3, IGNORED)


def voxels(output: Tensor, target: Tensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(values of the channels, target of the voxel) for each voxel of each sample, in float64."""
    values, wanted = output.detach().double().numpy(), target.numpy()
    for sample in range(values.shape[0]):
        for place in np.ndindex(values.shape[2:]):
            of_target = (sample, *place) if wanted.ndim < values.ndim else (sample, slice(None), *place)
            yield values[(sample, slice(None), *place)], wanted[of_target]


def softmax(values: np.ndarray) -> np.ndarray:
    return np.exp(values) / np.exp(values).sum()


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


def same(found: Tensor, expected: float, tolerance: float = 1e-5) -> None:
    assert found.dim() == 0
    assert float(found.detach()) == pytest.approx(expected, rel=tolerance, abs=tolerance)


# ------------------------------------------------------------------------------------------------- cross entropy


def naive_cross_entropy(output: Tensor, label: Tensor, weight: list[float], ignored: int, smoothing: float) -> float:
    total = counted = 0.0
    for values, y in voxels(output, label):
        if y != ignored:
            wanted = [(1 - smoothing) * (c == y) + smoothing / len(values) for c in range(len(values))]
            total -= sum(w * t * math.log(p) for w, t, p in zip(weight, wanted, softmax(values), strict=True))
            counted += weight[y]
    return total / counted


@pytest.mark.parametrize("weight", [None, [1, 2, 5]], ids=["equal", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_follows_its_definition_and_torchs(size, weight, smoothing):
    output, label = logits(size), some_ignored(labels(size))
    loss = CrossEntropyLossSq(weight, ignore_index=IGNORED, label_smoothing=smoothing)
    same(loss(output, label), naive_cross_entropy(output, label, weight or [1, 1, 1], IGNORED, smoothing))
    of_torch = nn.CrossEntropyLoss(None if weight is None else torch.tensor(weight).float(), None, IGNORED)
    of_torch.label_smoothing = smoothing
    same(loss(output, label), float(of_torch(output, label)))


def test_cross_entropy_takes_labels_in_every_usual_shape(size):
    output, label = logits(size), labels(size)
    expected = float(F.cross_entropy(output, label))
    loss = CrossEntropyLossSq()
    for target in (label, label.unsqueeze(1), label.to(torch.uint8), label.float().unsqueeze(1)):
        same(loss(output, target), expected)
    same(loss(output, one_hot(label)), expected)
    same(loss(output, one_hot(label).long()), expected)
    mixed = torch.rand(output.shape).softmax(dim=1)
    same(loss(output, mixed), float(F.cross_entropy(output, mixed)))


def test_a_batch_of_one_keeps_its_dimension():
    output, label = logits((4, 4), samples=1), labels((4, 4), samples=1)
    same(CrossEntropyLossSq()(output, label.unsqueeze(1)), float(F.cross_entropy(output, label)))


def test_the_first_of_several_outputs_and_targets_counts_and_a_tensor_is_never_indexed():
    output, label = logits((3, 3)), labels((3, 3))
    other, boundary = torch.zeros_like(output), torch.zeros_like(label)
    expected = float(F.cross_entropy(output, label))
    loss = CrossEntropyLossSq()
    for several in ([output, other], (output, other), {"aux": other, "out": output}, {"logits": output}, output):
        for targets in ([label, boundary], (label, boundary), ((label, boundary),), {"label": label}, label):
            same(loss(several, targets), expected)
    same(CrossEntropyLossSq(index=1)([other, output], [boundary, label]), expected)
    same(CrossEntropyLossSq(index=-1)([other, output], label), expected)
    same(CrossEntropyLossSq(index="aux")({"out": other, "aux": output}, label), expected)
    square = logits((3, 3), samples=3)  # as many samples as classes as pixels: indexing would go unnoticed
    wanted = labels((3, 3), samples=3)
    same(loss(square, wanted), float(F.cross_entropy(square, wanted)))


@pytest.mark.parametrize(
    ("index", "output", "parts"),
    [
        (2, [torch.zeros(1, 2)], ["1 elements", "index 2"]),
        ("aux", {"out": torch.zeros(1, 2)}, ["'aux'", "'out'"]),
        (0, {"main": torch.zeros(1, 2)}, ["'out'", "'logits'", "'main'", "index"]),
        ("aux", [torch.zeros(1, 2)], ["'aux'", "1 elements"]),
        (0, [None], ["NoneType"]),
    ],
)
def test_an_output_that_is_not_there_is_told(index, output, parts):
    with pytest.raises(ValueError) as error:
        CrossEntropyLossSq(index=index)(output, torch.zeros(1))
    assert [part for part in parts if part not in str(error.value)] == []


@pytest.mark.parametrize(
    ("output", "target", "parts"),
    [
        ((2, 1, 4), (2, 4), ["one channel", "BCEWithLogitsLoss"]),
        ((2, 3, 4), (2, 5), ["(2, 5)", "(2, 4)", "(2, 1, 4)", "(2, 3, 4)"]),
        ((2, 3, 4), (2, 2, 4), ["(2, 2, 4)"]),
        ((2, 3, 4), (2, 3, 4), ["one-hot", "(2, 4)"]),
    ],
)
def test_cross_entropy_refuses_what_it_could_only_guess(output, target, parts):
    with pytest.raises(ValueError) as error:
        CrossEntropyLossSq()(torch.zeros(output), torch.zeros(target, dtype=torch.long))
    assert [part for part in parts if part not in str(error.value)] == []


def predicted_weights(output: Tensor, label: Tensor) -> list[float]:
    counted = [softmax(values) for values, y in voxels(output, label) if y != IGNORED]
    return list(sum(1 - p for p in counted) / sum(counted))


def test_weighted_cross_entropy_follows_its_definition(size):
    output, label = logits(size), some_ignored(labels(size))
    expected = naive_cross_entropy(output, label, predicted_weights(output, label), IGNORED, 0.0)
    same(WeightedCrossEntropyLoss(ignore_index=IGNORED)(output, label), expected)
    same(WeightedCrossEntropyLoss(ignore_index=IGNORED)(output, label.unsqueeze(1)), expected)
    same(WeightedCrossEntropyLoss(IGNORED, True, True)(output, torch.stack([label, label * 0], dim=1)), expected)


def test_weighted_cross_entropy_stands_a_class_that_is_never_predicted():
    output = logits((4, 4)).requires_grad_()
    certain = output - torch.tensor([0.0, 0.0, 500.0]).reshape(3, 1, 1)
    value = WeightedCrossEntropyLoss()(certain, labels((4, 4)))
    value.backward()
    assert value.isfinite() and output.grad.isfinite().all()


def test_weighted_cross_entropy_equals_pytorch_3dunets_where_nothing_is_ignored(published):
    output, label = logits((3, 4, 5)), labels((3, 4, 5))
    same(WeightedCrossEntropyLoss()(output, label), float(published.WeightedCrossEntropyLoss()(output, label)))


# ------------------------------------------------------------------------------------------------- Dice


def naive_dice(output: Tensor, target: Tensor, normalize: Callable, ignored: float | None = None) -> np.ndarray:
    """d_c by loops; a target is ignored voxel by voxel (labels) or value by value."""
    channels = output.shape[1]
    overlap, size = np.zeros(channels), np.zeros(channels)
    for values, wanted in voxels(output, target):
        for c, p in enumerate(normalize(values)):
            t = float(wanted[c]) if wanted.ndim else float(wanted == c)
            if (wanted[c] if wanted.ndim else wanted) != ignored:
                overlap[c] += p * t
                size[c] += p**2 + t**2
    return 2 * overlap / np.maximum(size, 1e-6)


NORMALIZE = {"sigmoid": sigmoid, "softmax": softmax, "none": lambda values: values}


@pytest.mark.parametrize("kind", list(NORMALIZE))
def test_dice_follows_its_definition(size, kind):
    output, label = logits(size), some_ignored(labels(size))
    output = output.sigmoid() if kind == "none" else output
    scores = naive_dice(output, label, NORMALIZE[kind], IGNORED)
    loss = DiceLoss(normalization=kind, ignore_index=IGNORED)
    same(loss(output, label), 1 - scores.mean())
    same(loss(output, label.unsqueeze(1)), 1 - scores.mean())
    channels = one_hot(label).where((label != IGNORED).unsqueeze(1), IGNORED)
    same(loss(output, channels), 1 - scores.mean())
    weighted = DiceLoss([1, 2, 3], kind, IGNORED)
    same(weighted(output, label), 1 - (scores * [1, 2, 3]).sum() / 6)


def test_each_channel_can_be_ignored_where_it_is_unknown():
    output, target = logits((4, 5)), (torch.rand(2, 3, 4, 5) > 0.5).float()
    target = target.where(torch.rand(target.shape) > 0.3, -1.0)
    same(DiceLoss(ignore_index=-1)(output, target), 1 - naive_dice(output, target, sigmoid, -1).mean())


def test_one_channel_may_stand_without_its_dimension(size):
    output, target = logits(size, 1), (torch.rand(2, *size) > 0.5).long()
    for loss in (DiceLoss(), BCEDiceLoss(), GeneralizedDiceLoss(), WeightedSmoothL1Loss(0.5, 2.0)):
        same(loss(output, target), float(loss(output, target.unsqueeze(1).float())))


@pytest.mark.parametrize("ignored", [False, True])
def test_binary_cross_entropy_and_dice_follow_their_definition(size, ignored):
    output, target = logits(size), (torch.rand(2, 3, *size) > 0.5).float()
    if ignored:
        target = target.where(torch.rand(target.shape) > 0.3, -1.0)
    entropies = [
        -math.log(p if t else 1 - p)
        for values, wanted in voxels(output, target)
        for p, t in zip(sigmoid(values), wanted, strict=True)
        if t >= 0
    ]
    dice = 1 - naive_dice(output, target, sigmoid, -1).mean()
    loss = BCEDiceLoss(alpha=0.7, ignore_index=-1 if ignored else None)
    same(loss(output, target), np.mean(entropies) + 0.7 * dice)


@pytest.mark.parametrize("kind", list(NORMALIZE))
@pytest.mark.parametrize("absent", [False, True])
def test_generalized_dice_follows_its_definition(size, kind, absent):
    output, label = logits(size), some_ignored(labels(size))
    output = output.sigmoid() if kind == "none" else output
    if absent:
        label = label.where(label != 2, 1)
    there = [c for c in range(3) if (label == c).any()]
    overlap, predicted, sizes = np.zeros(3), np.zeros(3), np.zeros(3)
    for values, y in voxels(output, label):
        if y != IGNORED:
            p = NORMALIZE[kind](values)
            overlap[y] += p[y]
            sizes[y] += 1
            predicted += p
    weight = np.array([1 / sizes[c] ** 2 if c in there else 1 / min(sizes[there]) ** 2 for c in range(3)])
    expected = 1 - 2 * (weight * overlap).sum() / (weight * (predicted + sizes)).sum()
    same(GeneralizedDiceLoss(kind, ignore_index=IGNORED)(output, label), expected)


def test_generalized_dice_of_one_channel_has_two_classes():
    output, target = logits((4, 5), 1), (torch.rand(2, 1, 4, 5) > 0.7).float()
    target = target.where(torch.rand(target.shape) > 0.3, -1.0)
    both = torch.cat([output.sigmoid(), 1 - output.sigmoid()], dim=1)
    expected = GeneralizedDiceLoss("none", ignore_index=IGNORED)(both, (1 - target).where(target >= 0, IGNORED))
    same(GeneralizedDiceLoss(ignore_index=-1)(output, target), float(expected))


def test_generalized_dice_counts_large_volumes_in_full():
    """The weights of a class of V voxels are 1 / V^2, so a lower bound of the denominator must not depend on V."""
    small = torch.full((1, 1, 100), 0.9)
    half = (torch.arange(100) % 2).float().reshape(1, 1, 100)
    expected = float(GeneralizedDiceLoss("none")(small, half))
    same(GeneralizedDiceLoss("none")(small.repeat(1, 1, 60_000), half.repeat(1, 1, 60_000)), expected)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_dice_losses_equal_pytorch_3dunets_where_they_coincide(published, kind):
    output, target = logits((3, 4, 5)), one_hot(labels((3, 4, 5)))
    same(DiceLoss(normalization=kind)(output, target), float(published.DiceLoss(normalization=kind)(output, target)))
    theirs = published.GeneralizedDiceLoss(normalization=kind)
    same(GeneralizedDiceLoss(kind)(output, target), float(theirs(output, target)))
    same(BCEDiceLoss(0.3)(output, target), float(published.BCEDiceLoss(0.3)(output, target)))
    one = GeneralizedDiceLoss()(output[:, :1], target[:, :1])
    same(one, float(published.GeneralizedDiceLoss()(output[:, :1], target[:, :1])))


def test_dice_losses_equal_monais_where_they_coincide(monai):
    output, target = logits((3, 4, 5)), one_hot(labels((3, 4, 5)))
    sums = dict(sigmoid=True, batch=True, smooth_nr=0, smooth_dr=1e-6)
    same(DiceLoss()(output, target), float(monai.DiceLoss(squared_pred=True, **sums)(output, target)))
    for absent in (False, True):
        target[:, 2] *= not absent
        same(GeneralizedDiceLoss()(output, target), float(monai.GeneralizedDiceLoss(**sums)(output, target)), 1e-4)


def test_a_sum_of_cross_entropy_and_dice_equals_monais(monai):
    output, label = logits((3, 4, 5)), labels((3, 4, 5))
    sums = dict(softmax=True, squared_pred=True, batch=True, smooth_nr=0, smooth_dr=1e-6)
    theirs = monai.DiceCELoss(**sums, lambda_ce=0.3, lambda_dice=2.0)(output, one_hot(label))
    ours = WeightedSum([CrossEntropyLossSq(), DiceLoss(normalization="softmax")], [0.3, 2.0])(output, label)
    same(sum(ours.values()), float(theirs))


def test_an_absent_class_leaves_the_others_their_gradients():
    output, label = logits((4, 5)).requires_grad_(), labels((4, 5), channels=2)
    for loss in (DiceLoss(normalization="softmax"), GeneralizedDiceLoss("softmax"), GeneralizedDiceLoss()):
        output.grad = None
        value = loss(output, label)
        value.backward()
        assert 0 < value < 1
        assert (output.grad[:, :2].abs().sum(dim=(0, 2, 3)) > 1e-3).all()
    assert float(GeneralizedDiceLoss("softmax")(one_hot(label) * 20 - 10, label)) < 1e-3


@pytest.mark.parametrize("loss", [DiceLoss, GeneralizedDiceLoss])
def test_a_normalization_that_cannot_be_is_refused(loss):
    with pytest.raises(ValueError, match="normalization is 'tanh'; possible: sigmoid, softmax, none"):
        loss(normalization="tanh")
    with pytest.raises(ValueError, match="softmax of one channel"):
        loss(normalization="softmax")(torch.zeros(2, 1, 4), torch.zeros(2, 1, 4))


# ------------------------------------------------------------------------------------------------- regression


@pytest.mark.parametrize("below", [True, False])
@pytest.mark.parametrize("ignored", [False, True])
def test_weighted_smooth_l1_follows_its_definition(size, below, ignored):
    output, target = logits(size), torch.randn(2, 3, *size)
    if ignored:
        target = target.where(torch.rand(target.shape) > 0.3, -9.0)
    terms = []
    for values, wanted in voxels(output, target):
        for x, t in zip(values, wanted.astype(np.float64), strict=True):
            if not (ignored and t == -9):
                d = abs(x - t)
                weight = 4.0 if (t < 0.2) == below else 1.0
                terms.append(weight * (d**2 / 2 if d < 1 else d - 0.5))
    loss = WeightedSmoothL1Loss(0.2, 4.0, below, ignore_index=-9 if ignored else None)
    before = target.clone()
    same(loss(output, target), np.mean(terms))
    assert torch.equal(target, before)


def test_weighted_smooth_l1_equals_pytorch_3dunets(published):
    output, target = logits((3, 4)), torch.randn(2, 3, 3, 4)
    for below in (True, False):
        theirs = published.WeightedSmoothL1Loss(0.2, 4.0, below)(output, target)
        same(WeightedSmoothL1Loss(0.2, 4.0, below)(output, target), float(theirs))


# ------------------------------------------------------------------------------------------------- combinations


def test_a_weighted_sum_returns_its_weighted_terms():
    output, label = logits((4, 5)), labels((4, 5))
    cross_entropy, dice = nn.CrossEntropyLoss(), DiceLoss(normalization="softmax")
    terms = WeightedSum([cross_entropy, dice, nn.CrossEntropyLoss()], [0.5, 2, 1])(output, label)
    assert list(terms) == ["CrossEntropyLoss", "DiceLoss", "CrossEntropyLoss_2"]
    same(terms["CrossEntropyLoss"], 0.5 * float(cross_entropy(output, label)))
    same(terms["DiceLoss"], 2 * float(dice(output, label)))
    same(WeightedSum([cross_entropy])(output, label)["CrossEntropyLoss"], float(cross_entropy(output, label)))


def test_a_weighted_sum_can_hold_sums_functions_and_several_outputs():
    output, label = logits((4, 5)), labels((4, 5))

    def first_minus_second(outputs, target):
        return (outputs[0] - outputs[1]).mean()

    inner = WeightedSum([nn.CrossEntropyLoss(), first_minus_second], [1, 3])
    terms = WeightedSum([inner, F.cross_entropy], [2, 1])([output, output - 1], label)
    assert list(terms) == ["WeightedSum_CrossEntropyLoss", "WeightedSum_first_minus_second", "cross_entropy"]
    same(terms["WeightedSum_first_minus_second"], 6)
    same(terms["cross_entropy"], float(F.cross_entropy(output, label)))


def test_a_weighted_sum_moves_its_class_weights_with_it():
    loss = WeightedSum([CrossEntropyLossSq([1, 2, 3]), DiceLoss([1, 2, 3])]).to("meta")
    assert {tensor.device.type for tensor in loss.buffers()} == {"meta"}
    assert all(part.weight.device.type == "meta" for part in loss.losses)


@pytest.mark.parametrize(
    ("losses", "weights", "text"), [([], None, "empty"), ([DiceLoss()], [1, 2], "2 weights for 1")]
)
def test_a_weighted_sum_needs_a_weight_for_each_loss(losses, weights, text):
    with pytest.raises(ValueError, match=text):
        WeightedSum(losses, weights)


@pytest.mark.parametrize(
    "loss", [nn.MSELoss(), nn.L1Loss(), nn.SmoothL1Loss(beta=0.5), nn.BCEWithLogitsLoss()], ids=str
)
def test_a_masked_loss_is_the_loss_of_what_counts(loss):
    output = logits((4, 5)).requires_grad_()
    target = torch.rand(2, 3, 4, 5)
    valid = torch.rand(target.shape) > 0.3
    expected = loss(output[valid], target[valid])
    expected.backward()
    gradient = output.grad.clone()
    output.grad = None
    found = MaskedLoss(loss, ignore_index=-1)(output, target.where(valid, -1.0))
    found.backward()
    same(found, float(expected.detach()))
    torch.testing.assert_close(output.grad, gradient)
    assert loss.reduction == "mean"


def test_a_masked_loss_keeps_the_weight_of_each_channel():
    output, target = logits((4, 5)), (torch.rand(2, 3, 4, 5) > 0.5).float()
    target[0, :, 0] = -1
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1))
    by_channel = [
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor(c + 1.0))(
            output[:, c][target[:, c] >= 0], target[:, c][target[:, c] >= 0]
        )
        for c in range(3)
    ]
    same(MaskedLoss(loss, ignore_index=-1)(output, target), float(sum(by_channel)) / 3)


@pytest.mark.parametrize(
    ("loss", "parts"),
    [
        (nn.CrossEntropyLoss(), ["CrossEntropyLoss", "ignore_index itself"]),
        (nn.MSELoss(reduction="sum"), ["MSELoss", "reduction 'sum'", "mean"]),
        (F.mse_loss, ["mse_loss", "has none"]),
    ],
)
def test_a_mask_where_it_cannot_be_is_refused(loss, parts):
    with pytest.raises(ValueError) as error:
        MaskedLoss(loss, ignore_index=-1)
    assert [part for part in parts if part not in str(error.value)] == []


def test_a_loss_without_one_value_for_each_of_the_outputs_cannot_be_masked():
    with pytest.raises(ValueError, match=r"made values \(2,\) of an output of \(2, 3\)"):
        MaskedLoss(nn.MultiLabelSoftMarginLoss(), ignore_index=-1)(torch.zeros(2, 3), torch.zeros(2, 3))


# ------------------------------------------------------------------------------------------------- targets, for all


EVERY = {
    "CrossEntropyLossSq": lambda: CrossEntropyLossSq(ignore_index=IGNORED),
    "CrossEntropyLossSq-weighted": lambda: CrossEntropyLossSq([0.5, 1, 2], ignore_index=IGNORED, label_smoothing=0.1),
    "WeightedCrossEntropyLoss": lambda: WeightedCrossEntropyLoss(IGNORED),
    "DiceLoss": lambda: DiceLoss(ignore_index=IGNORED),
    "DiceLoss-softmax": lambda: DiceLoss([1, 2, 3], "softmax", IGNORED),
    "BCEDiceLoss": lambda: BCEDiceLoss(ignore_index=IGNORED),
    "GeneralizedDiceLoss": lambda: GeneralizedDiceLoss(ignore_index=IGNORED),
    "GeneralizedDiceLoss-softmax": lambda: GeneralizedDiceLoss("softmax", IGNORED),
}


@pytest.fixture(params=list(EVERY))
def loss(request: pytest.FixtureRequest) -> nn.Module:
    return EVERY[request.param]()


def test_ignored_voxels_change_neither_the_loss_nor_the_gradients(loss, size):
    """As if they had been cut out: what a masked voxel predicts does not matter, and nobody's gradient shrinks."""
    output, label = logits(size).requires_grad_(), some_ignored(labels(size))
    loss(output, label).backward()
    ignored = (label == IGNORED).unsqueeze(1)
    assert (output.grad.masked_select(ignored) == 0).all()
    kept = label.flatten() != IGNORED
    cut = output.detach().movedim(1, 0).flatten(1)[:, kept].unsqueeze(0).requires_grad_()  # (1, C, voxels that count)
    value = loss(cut, label.flatten()[kept].unsqueeze(0))
    value.backward()
    same(loss(output, label), float(value.detach()))
    torch.testing.assert_close(output.grad.movedim(1, 0).flatten(1)[:, kept], cut.grad[0])
    other = output.detach() + 7 * ignored
    same(loss(other, label), float(value.detach()))


def test_nothing_that_counts_gives_a_finite_loss_and_no_gradient(loss, size):
    output = logits(size).requires_grad_()
    value = loss(output, torch.full((2, *size), IGNORED))
    value.backward()
    assert float(value.detach()) in (0.0, 1.0)
    assert torch.equal(output.grad, torch.zeros_like(output))


def test_the_gradient_is_that_of_the_value(loss):
    output, label = logits((3, 3)).double().requires_grad_(), some_ignored(labels((3, 3)))
    value = loss
    if isinstance(loss, WeightedCrossEntropyLoss):  # its weights depend on the output, but are not differentiated
        value = CrossEntropyLossSq(predicted_weights(output.detach(), label), IGNORED)
        found, expected = (torch.autograd.grad(one(output, label), output)[0] for one in (loss, value))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.autograd.gradcheck(lambda x: value(x, label), (output,))


@pytest.mark.parametrize(
    ("make", "is_mean"),
    [
        (CrossEntropyLossSq, True),
        (lambda: MaskedLoss(nn.MSELoss()), True),
        (lambda: MaskedLoss(nn.BCEWithLogitsLoss()), True),
        (lambda: WeightedSmoothL1Loss(0.5, 2.0), True),
        (lambda: CrossEntropyLossSq([1, 2, 5]), False),
        (lambda: CrossEntropyLossSq(ignore_index=0), False),
        (lambda: MaskedLoss(nn.MSELoss(), ignore_index=0), False),
        (lambda: WeightedSmoothL1Loss(0.5, 2.0, ignore_index=0), False),
        (WeightedCrossEntropyLoss, False),
        (DiceLoss, False),
        (BCEDiceLoss, False),
        (GeneralizedDiceLoss, False),
    ],
)
def test_which_losses_are_the_mean_of_equal_parts_of_a_batch(make, is_mean):
    """These give the same on several ranks as on one; docs/losses.md says so of each."""
    output, label = logits((4, 5), samples=4), labels((4, 5), samples=4)
    label[0, :2] = 0  # so that the parts differ in what they hold
    labelled = isinstance(make(), CrossEntropyLossSq | WeightedCrossEntropyLoss)
    target = label if labelled else one_hot(label).where((label > 0).unsqueeze(1) | (torch.rand(4, 1, 4, 5) > 0.5), 0)
    whole = float(make()(output, target))
    parts = [float(make()(output[part], target[part])) for part in (slice(2), slice(2, 4))]
    assert (whole == pytest.approx(sum(parts) / 2, rel=1e-5)) is is_mean


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(loss, dtype):
    """More voxels than float16 can count."""
    output = (logits((300, 300), samples=1)).to(dtype).requires_grad_()
    label = some_ignored(labels((300, 300), samples=1))
    value = loss(output, label)
    value.backward()
    same(value, float(loss(output.detach().float(), label)), 1e-4)
    assert output.grad.dtype == dtype and output.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        same(loss(output.detach(), label), float(value.detach()), 1e-4)


def test_extreme_logits_give_finite_gradients(loss):
    output = (logits((4, 5)) * 1e4).requires_grad_()
    loss(output, labels((4, 5))).backward()
    assert output.grad.isfinite().all()


CHANNELWISE = {
    "DiceLoss": DiceLoss,
    "BCEDiceLoss": BCEDiceLoss,
    "GeneralizedDiceLoss": GeneralizedDiceLoss,
    "WeightedSmoothL1Loss": lambda **options: WeightedSmoothL1Loss(0.5, 2.0, **options),
    "MaskedLoss": lambda **options: MaskedLoss(nn.MSELoss(), **options),
}


@pytest.mark.parametrize("name", list(CHANNELWISE))
def test_the_last_target_can_be_skipped(name):
    make = CHANNELWISE[name]
    output, target = logits((4, 5)), (torch.rand(2, 4, 4, 5) > 0.5).float()
    same(make(skip_last_target=True)(output, target), float(make()(output, target[:, :3])))
    assert make(skip_last_target=True, squeeze_channel=True).target.cut(target[:, :2]).shape == (2, 4, 5)
    for shape in ((2, 1, 4, 5), (2,)):
        with pytest.raises(ValueError, match="skip_last_target would leave nothing"):
            make(skip_last_target=True)(output, torch.zeros(shape))
    with pytest.raises(ValueError, match="squeeze_channel needs one channel"):
        make(squeeze_channel=True)(output, target)


@pytest.mark.parametrize("name", list(CHANNELWISE))
def test_a_target_of_another_shape_is_refused_rather_than_stretched(name):
    loss = CHANNELWISE[name](ignore_index=-1)
    for shape in ((2, 2, 4, 5), (1, 3, 4, 5), (2, 4, 4), (2, 3, 1, 1)):
        with pytest.raises(ValueError, match=r"target of shape .* for an output of \(2, 3, 4, 5\)"):
            loss(logits((4, 5)), torch.zeros(shape))


def test_a_label_out_of_range_is_an_error():
    for loss in (CrossEntropyLossSq(), DiceLoss(), GeneralizedDiceLoss("softmax")):
        with pytest.raises(ValueError, match="the target has the label 3; expected 0 to 2"):
            loss(logits((2, 2)), torch.full((2, 2, 2), 3))


@pytest.mark.parametrize("weight", [[1, -1, 1], [0, 0, 0], [1, math.nan, 1], [[1, 2, 3]]], ids=str)
@pytest.mark.parametrize("make", [CrossEntropyLossSq, DiceLoss])
def test_weights_that_make_no_sense_are_refused(make, weight):
    with pytest.raises(ValueError, match=r"weight is .* expected a number for each class"):
        make(weight)


@pytest.mark.parametrize("make", [CrossEntropyLossSq, DiceLoss])
def test_a_weight_is_needed_for_each_class(make):
    with pytest.raises(ValueError, match=r"weight has 2 numbers for the 3 channels of \(2, 3, 4\)"):
        make([1, 2])(torch.zeros(2, 3, 4), torch.zeros(2, 4).long())


# ------------------------------------------------------------------------------------------------- YAML


@pytest.fixture
def from_yaml(tmp_path):
    """The criterion that a `loss:` section describes."""

    def build(section: str):
        text = f"""\
            model: {{name: ViT}}
            loaders: {{name: Digits, train: {{split: train}}}}
            loss: {section}
            optimizer: {{name: SGD, lr: 1e-3}}
            trainer: {{max_steps: 1}}
            """
        (tmp_path / "loss.yaml").write_text(textwrap.dedent(text))
        return get_loss_criterion(load_config(tmp_path / "loss.yaml"))

    return build


def test_losses_are_built_from_yaml(from_yaml):
    output, label = logits((4, 5)), labels((4, 5))
    loss, terms = from_yaml("{name: CrossEntropyLossSq, weight: [1, 2, 3], ignore_index: 255}")([output], [label])
    same(loss, float(F.cross_entropy(output, label, torch.tensor([1.0, 2.0, 3.0]))))
    assert terms == {}
    for section, expected in [
        ("{name: DiceLoss, normalization: softmax, weight: [1, 2.5, 3]}", DiceLoss([1, 2.5, 3], "softmax")),
        ("{name: BCEDiceLoss, alpha: 0.5, ignore_index: null}", BCEDiceLoss(0.5)),
        ("{name: GeneralizedDiceLoss, normalization: softmax}", GeneralizedDiceLoss("softmax")),
        ("{name: WeightedCrossEntropyLoss, ignore_index: null}", WeightedCrossEntropyLoss()),
    ]:
        same(from_yaml(section)(output, label)[0], float(expected(output, label)))
    skipping = from_yaml("{name: BCEDiceLoss, skip_last_target: true}")
    target = one_hot(label, 4)
    same(skipping(output, target)[0], float(BCEDiceLoss()(output, target[:, :3])))


def test_a_weighted_sum_is_built_from_yaml_and_logs_its_terms(from_yaml):
    section = (
        "{name: WeightedSum, weights: [0.3, 2], losses: ["
        "{name: CrossEntropyLoss, weight: [1.0, 2.0, 3.0]}, {name: DiceLoss, normalization: softmax}]}"
    )
    output, label = logits((4, 5)), labels((4, 5))
    loss, terms = from_yaml(section)(output, label)
    assert list(terms) == ["CrossEntropyLoss", "DiceLoss"]
    expected = 0.3 * F.cross_entropy(output, label, torch.tensor([1.0, 2.0, 3.0]))
    same(loss, float(expected + 2 * DiceLoss(normalization="softmax")(output, label)))


def test_a_masked_loss_is_built_from_yaml(from_yaml):
    criterion = from_yaml("{name: MaskedLoss, loss: {name: SmoothL1Loss, beta: 0.5}, ignore_index: -1}")
    output, target = torch.randn(2, 1, 4), torch.rand(2, 1, 4)
    target[0, 0, 0] = -1
    valid = target != -1
    same(criterion(output, target)[0], float(F.smooth_l1_loss(output[valid], target[valid], beta=0.5)))


def test_a_key_that_a_loss_does_not_take_is_refused(from_yaml):
    with pytest.raises(ConfigError, match="BCEDiceLoss got an unexpected argument 'beta'"):
        from_yaml("{name: BCEDiceLoss, alpha: 0.5, beta: 0.5}")
