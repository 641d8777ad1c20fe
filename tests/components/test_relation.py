"""Relation attention: the paper's formula, what must not change its result, and rows of teeth that need relations."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from dtrain.components.datasets.tooth_arch import SIZES, ToothArch
from dtrain.components.models.relation_attention import RelationAttention

SMALL = dict(feature_dim=8, num_classes=5, heads=4, key_dim=6, depth=2)
SPACE = {4: 16, 6: 24}  # box_dim -> geometry_dim


def small(box_dim: int = 6, **changes) -> RelationAttention:
    torch.manual_seed(1)
    settings = SMALL | dict(box_dim=box_dim, geometry_dim=SPACE[box_dim]) | changes
    return RelationAttention(**settings).double()


def objects(box_dim: int = 6, images: int = 3, number: int = 7):
    torch.manual_seed(2)
    low = 100 * torch.rand(images, number, box_dim // 2, dtype=torch.float64)
    boxes = torch.cat((low, low + 1 + 20 * torch.rand_like(low)), dim=-1)
    mask = torch.ones(images, number, dtype=torch.bool)
    mask[1:2, 5:], mask[2:3, 2] = False, False
    return torch.randn(images, number, 8, dtype=torch.float64), boxes, mask


def real(logits, mask):
    return logits.transpose(1, 2)[mask]


def geometry_of_the_paper(n, m, waves, wave_length=1000.0):
    """E of object m as seen from n, boxes as lists (all smallest coordinates, then all largest)."""
    axes = range(len(n) // 2)
    side_n, side_m = [[box[len(axes) + axis] - box[axis] for axis in axes] for box in (n, m)]
    centre_n, centre_m = [[(box[len(axes) + axis] + box[axis]) / 2 for axis in axes] for box in (n, m)]
    terms = [math.log(max(abs(centre_m[a] - centre_n[a]) / side_m[a], 1e-3)) for a in axes]
    terms += [math.log(side_n[a] / side_m[a]) for a in axes]
    angles = [100 * term / wave_length ** (wave / waves) for term in terms for wave in range(waves)]
    return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)


@pytest.mark.parametrize("box_dim", [4, 6])
def test_a_layer_is_the_papers_formula_object_by_object(box_dim):
    model = small(box_dim, depth=1)
    features, boxes, _ = objects(box_dim, images=1, number=4)
    relation = model.relations[0]
    x = F.relu(model.layers[0](features[0]))
    key, query, value = (part(x) for part in (relation.key, relation.query, relation.value))
    rows = []
    for n in range(4):
        added = []
        for head in range(4):
            scores = []
            for m in range(4):
                pair = geometry_of_the_paper(boxes[0, n].tolist(), boxes[0, m].tolist(), waves=2)
                weight = (relation.geometry.weight[head] @ pair + relation.geometry.bias[head]).clamp(min=1e-6)
                part = slice(6 * head, 6 * head + 6)
                scores.append(weight.log() + key[m, part] @ query[n, part] / math.sqrt(6))
            added.append(torch.stack(scores).softmax(0) @ value[:, 2 * head : 2 * head + 2])
        rows.append(x[n] + torch.cat(added))
    expected = model.classifier(torch.stack(rows)).T
    torch.testing.assert_close(model(features, boxes)[0], expected, rtol=1e-4, atol=1e-5)  # frequencies are float32


@pytest.mark.parametrize("box_dim", [4, 6])
def test_the_logits_have_the_shape_that_cross_entropy_takes(box_dim):
    features, boxes, mask = objects(box_dim)
    logits = small(box_dim)(features, boxes, mask)
    assert logits.shape == (3, 5, 7)
    label = torch.where(mask, 2, -100)
    expected = F.cross_entropy(real(logits, mask), label[mask])
    torch.testing.assert_close(torch.nn.CrossEntropyLoss(ignore_index=-100)(logits, label), expected)


@pytest.mark.parametrize("box_dim", [4, 6])
def test_the_result_follows_the_objects_when_they_change_places(box_dim):
    model, (features, boxes, mask) = small(box_dim), objects(box_dim)
    order = torch.tensor([4, 0, 6, 2, 1, 5, 3])
    moved = model(features[:, order], boxes[:, order], mask[:, order])
    torch.testing.assert_close(moved, model(features, boxes, mask)[:, :, order])


@pytest.mark.parametrize("box_dim", [4, 6])
def test_moving_or_scaling_all_boxes_changes_nothing(box_dim):
    model, (features, boxes, mask) = small(box_dim), objects(box_dim)
    expected = real(model(features, boxes, mask), mask)
    shift = torch.tensor([300.0, -20.0, 7.0], dtype=torch.float64)[: box_dim // 2].repeat(2)
    torch.testing.assert_close(real(model(features, boxes + shift, mask), mask), expected)
    torch.testing.assert_close(real(model(features, 0.01 * boxes, mask), mask), expected)
    # Along one axis only, too: each axis is measured in the boxes' own sides.
    stretched = boxes.clone()
    stretched[..., [0, box_dim // 2]] *= 3
    torch.testing.assert_close(real(model(features, stretched, mask), mask), expected)


def test_moving_one_box_changes_the_others_result():
    model, (features, boxes, _) = small(), objects()
    moved = boxes.clone()
    moved[:, 0] += 30
    difference = (model(features, moved) - model(features, boxes)).abs().amax(dim=1)
    assert (difference > 1e-6).all()


@pytest.mark.parametrize("filling", [0.0, 1e30, math.nan, math.inf])
def test_padding_does_not_matter_whatever_it_holds(filling):
    model, (features, boxes, mask) = small(), objects()
    expected = real(model(features, boxes, mask), mask)
    features[~mask], boxes[~mask] = filling, filling
    logits = model(features, boxes, mask)
    torch.testing.assert_close(real(logits, mask), expected)
    longer = [F.pad(item, (0, 0, 0, 3), value=filling) for item in (features, boxes)]
    torch.testing.assert_close(real(model(*longer, F.pad(mask, (0, 3)))[:, :, :7], mask), expected)
    shorter = model(features[1:2, :5], boxes[1:2, :5])  # the second image's objects alone, without a mask
    torch.testing.assert_close(shorter[0].T, logits[1, :, :5].T)
    logits.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_an_image_that_is_nothing_but_padding_gives_finite_numbers():
    model, (features, boxes, mask) = small(), objects()
    expected = real(model(features[1:], boxes[1:], mask[1:]), mask[1:])
    mask[0] = False
    logits = model(features, boxes, mask)
    assert logits.isfinite().all()
    torch.testing.assert_close(real(logits[1:], mask[1:]), expected)


def test_a_box_without_extent_or_on_top_of_another_gives_finite_numbers():
    model, (features, boxes, _) = small(), objects()
    boxes[0, 0, 3:] = boxes[0, 0, :3]
    boxes[0, 1] = boxes[0, 2]
    assert model(features, boxes).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sees_the_same_geometry(dtype):
    model, (features, boxes, mask) = small().float(), objects()
    features, boxes = features.float(), boxes.float()
    mask[0] = False
    exact = model(features, boxes, mask)
    with torch.autocast("cpu", dtype=dtype):
        half = model(features, boxes, mask)
    assert half.isfinite().all()
    torch.testing.assert_close(real(half.float(), mask), real(exact, mask), rtol=0.1, atol=0.05)


def test_without_relations_an_object_is_told_by_its_own_features():
    torch.manual_seed(0)
    model, (features, boxes, mask) = small(relations=False), objects()
    logits = model(features, boxes, mask)
    torch.testing.assert_close(real(logits, mask), real(model(features, boxes + torch.rand_like(boxes), mask), mask))
    torch.testing.assert_close(model(features[:, 3:4], boxes[:, 3:4])[:, :, 0], logits[:, :, 3])


def test_every_parameter_gets_a_gradient():
    model = small()
    model(*objects()).square().sum().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []  # DistributedDataParallel would wait for them


def test_the_width_of_the_layers_is_its_own():
    assert small(hidden_dim=12)(*objects()).shape == (3, 5, 7)
    assert small(depth=0)(*objects()).shape == (3, 5, 7)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (dict(box_dim=5), ["box_dim is 5", "4", "6"]),
        (dict(geometry_dim=64), ["64", "multiple of 12", "nearest is 60"]),
        (dict(geometry_dim=0), ["multiple of 12", "nearest is 12"]),
        (dict(heads=3), ["8 (feature_dim", "3 heads"]),
        (dict(heads=4, hidden_dim=10), ["10", "4 heads"]),
        (dict(wave_length=0), ["wave_length is 0"]),
    ],
)
def test_a_wrong_number_says_what_is_possible(changes, parts):
    with pytest.raises(ValueError) as error:
        RelationAttention(**SMALL | dict(box_dim=6, geometry_dim=24) | changes)
    assert [part for part in parts if part not in str(error.value)] == []


def test_shapes_that_do_not_fit_are_named():
    model, (features, boxes, mask) = small(), objects()
    with pytest.raises(ValueError, match=r"boxes of shape \(3, 7, 4\).*\(N, K, 6\)"):
        model(features, boxes[..., :4], mask)
    with pytest.raises(ValueError, match=r"mask of shape \(3, 6\)"):
        model(features, boxes, mask[:, :6])


# Rows of teeth


def teeth_by_number(item):
    """The centres and sides of a row's boxes in the order of their numbers."""
    (_, boxes, mask), label = item
    order = label[mask].argsort()
    low, high = boxes[mask][order].chunk(2, dim=-1)
    return label[mask][order], (low + high) / 2, high - low


def test_an_item_is_objects_with_padding_and_their_numbers():
    data = ToothArch("train", length=64, max_objects=20, feature_dim=7)
    assert len(data) == 64
    numbers = set()
    for (features, boxes, mask), label in data:
        assert (features.shape, boxes.shape, mask.shape, label.shape) == ((20, 7), (20, 6), (20,), (20,))
        assert (features.dtype, boxes.dtype, mask.dtype, label.dtype) == (
            torch.float32,
            torch.float32,
            torch.bool,
            torch.int64,
        )
        assert torch.equal(label == -100, ~mask)
        assert not features[~mask].any()
        assert not boxes[~mask].any()
        assert (boxes[mask][:, 3:] > boxes[mask][:, :3]).all()
        present = label[mask].tolist()
        assert len(set(present)) == len(present)
        numbers |= set(present)
    assert numbers == set(range(1, 17))


def test_a_batch_goes_into_the_model_and_the_loss():
    (features, boxes, mask), label = next(iter(DataLoader(ToothArch("val", length=4), batch_size=4)))
    model = RelationAttention(32, 17, box_dim=6, geometry_dim=72, heads=8, key_dim=16)
    assert F.cross_entropy(model(features, boxes, mask), label, ignore_index=-100).isfinite()


def test_an_item_depends_on_seed_split_and_index_alone():
    state = torch.get_rng_state()
    data = ToothArch("train", length=5)
    backwards = [data[index] for index in (4, 3, 2, 1, 0)][::-1]
    longer = ToothArch("train", length=50)
    for index in range(5):
        for one, other in zip(backwards[index][0], longer[index][0], strict=True):
            assert torch.equal(one, other)
        assert torch.equal(backwards[index][1], longer[index][1])
    assert torch.equal(torch.get_rng_state(), state)
    assert ToothArch.random is False


def test_rows_of_other_splits_and_seeds_are_others():
    parts = [ToothArch(split, seed=seed, length=3) for split in ("train", "val", "test") for seed in (0, 1)]
    features = [tuple(data[index][0][0][0].tolist()) for data in parts for index in range(3)]
    assert len(set(features)) == 18


def test_the_rows_are_the_same_on_every_machine():
    (features, boxes, _), label = ToothArch("train")[0]
    found = [float(features[0, 0]), *boxes[0].tolist()]
    assert label.tolist() == [8, 1, 7, 9, 15, 2, 13, 14, 4, 11, 6, 10, 3, 5, 12, -100]
    assert found == pytest.approx([0.466, -43.878, -44.847, 18.493, -31.837, -31.68, 41.532], abs=1e-3)


def test_teeth_that_follow_one_another_stand_side_by_side():
    data = ToothArch("train", length=20, missing=0.0, rotation=0.0)
    for item in data:
        numbers, centres, sides = teeth_by_number(item)
        assert numbers.tolist() == list(range(1, 17))
        scale = float(sides[:, 2].mean()) / SIZES[:, 2].mean()
        steps = (centres[1:] - centres[:-1]).norm(dim=1) / scale
        expected = torch.from_numpy((SIZES[1:, 0] + SIZES[:-1, 0]) / 2)
        assert (steps - expected).abs().max() < 4  # millimetres, five deviations of two places
        assert (centres[1:, 0] > centres[:-1, 0]).all()  # from right to left


def test_a_row_is_turned_by_up_to_its_angle():
    def angles(rotation):
        rows = [teeth_by_number(item)[1] for item in ToothArch("train", length=40, missing=0.0, rotation=rotation)]
        ends = torch.stack([centres[-1] - centres[0] for centres in rows])
        return torch.atan2(ends[:, 1], ends[:, 0]).rad2deg().abs()

    assert angles(0.0).max() < 4
    assert 20 < angles(40.0).max() < 45


def test_features_hold_a_trace_of_the_number():
    strong = ToothArch("train", length=30, signal=50.0, feature_dim=32)
    traces = torch.from_numpy(strong.traces).float()
    right = [
        torch.equal((features[mask] @ traces.T).argmax(1) + 1, label[mask]) for (features, _, mask), label in strong
    ]
    assert all(right)
    (silent, _, mask), _ = ToothArch("train", signal=0.0, feature_dim=2000)[0]
    assert float(silent[mask].mean()) == pytest.approx(0, abs=0.05)
    assert float(silent[mask].std()) == pytest.approx(1, abs=0.05)


def test_how_many_teeth_are_there():
    def counts(**arguments):
        return [int(mask.sum()) for (_, _, mask), _ in ToothArch("train", length=60, **arguments)]

    assert set(counts(missing=0.0)) == {16}
    assert set(counts(missing=1.0)) == {1}
    assert max(counts(missing=0.5, max_objects=5)) == 5
    assert 16 * 0.6 < sum(counts(missing=0.3)) / 60 < 16 * 0.8


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (dict(split="valid"), ["'valid'", "train, val, test"]),
        (dict(split="train", length=0), ["length is 0"]),
        (dict(split="train", max_objects=0), ["max_objects is 0"]),
        (dict(split="train", feature_dim=0), ["feature_dim is 0"]),
        (dict(split="train", missing=2), ["missing is 2", "0 to 1"]),
        (dict(split="train", seed=-1), ["seed is -1"]),
    ],
)
def test_a_wrong_argument_of_the_rows_says_what_is_possible(arguments, parts):
    with pytest.raises(ValueError) as error:
        ToothArch(**arguments)
    assert [part for part in parts if part not in str(error.value)] == []


def test_an_index_beyond_the_end_is_refused():
    with pytest.raises(IndexError, match="row 3 of 3"):
        ToothArch("train", length=3)[3]


@pytest.mark.slow
def test_relations_tell_more_than_features():
    """A short training on few teeth; the figures of a whole one are in the docs."""

    def accuracy(relations):
        torch.manual_seed(0)
        model = RelationAttention(32, 17, box_dim=6, geometry_dim=72, heads=8, key_dim=16, relations=relations)
        train, val = (
            next(iter(DataLoader(ToothArch(split, length=rows), batch_size=rows)))
            for split, rows in (("train", 512), ("val", 128))
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(8):
            for batch in torch.randperm(512).split(32):
                loss = F.cross_entropy(model(*(item[batch] for item in train[0])), train[1][batch], ignore_index=-100)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        (features, boxes, mask), label = val
        return float((model(features, boxes, mask).argmax(1) == label)[mask].float().mean())

    alone, together = accuracy(relations=False), accuracy(relations=True)
    assert alone < 0.65
    assert together > alone + 0.1
