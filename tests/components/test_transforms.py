"""The transforms: image, label and weight stay together, all follows from the generator, nothing given is changed."""

import warnings
from collections.abc import Callable
from typing import Any

import monai.transforms as monai
import numpy as np
import pytest
import torch
from scipy import ndimage

from dtrain.components import transforms
from dtrain.components.transforms.geometry import CropToFixed, RandomCrop, RandomFlip, RandomRotate90
from dtrain.components.transforms.intensity import (
    AdditiveGaussianNoise,
    AdditivePoissonNoise,
    GaussianBlur,
    RandomContrast,
    RandomGammaCorrection,
)
from dtrain.components.transforms.normalize import Normalize, PercentileNormalizer, Standardize
from dtrain.components.transforms.pipeline import Pipeline
from dtrain.components.transforms.resample import resample
from dtrain.components.transforms.targets import (
    BlobsToMask,
    LabelToAffinities,
    LabelToBoundary,
    LabelToBoundaryAndAffinities,
    LabelToMaskAndAffinities,
    LabelToZAffinities,
    RandomLabelToAffinities,
    Relabel,
    RgbToLabel,
)
from dtrain.components.transforms.warp import (
    ElasticDeformation,
    RandomRotate,
    RandomScale,
    cosines,
    rotated,
    smooth_noise,
)

Sample = dict[str, Any]
KEYS = ["image", "label"]


def sample_of(space: tuple[int, ...], channels: int = 1, seed: int = 0) -> Sample:
    """Blobs of 6 labels and an image of them with noise, all read-only; the label's values lie far apart."""
    rng = np.random.default_rng(seed)
    blobs = ndimage.gaussian_filter(rng.standard_normal(space), 1.5)
    ranks = np.digitize(blobs, np.quantile(blobs, [0.4, 0.6, 0.7, 0.8, 0.9]))
    sample = {
        "image": (ranks + rng.normal(0, 0.3, (channels, *space))).astype(np.float32),
        "label": np.array([0, 3, 50, 51, 1000, 70000])[ranks],
        "weight": rng.random(space, dtype=np.float32),
    }
    for array in sample.values():
        array.flags.writeable = False
    return sample


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def same(one: Sample, other: Sample) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


SPATIAL = {
    "flip": RandomFlip(),
    "rotate90": RandomRotate90(),
    "rotate": RandomRotate(angle_spectrum=40),
    "rotate, nearest": RandomRotate(order=0, mode="constant", axes=[[-1, -2]]),
    "rotate, cubic": RandomRotate(order=3, mode="mirror"),
    "elastic": ElasticDeformation(alpha=40, sigma=4, probability=1),
    "elastic, in planes": ElasticDeformation(alpha=40, sigma=4, probability=1, apply_3d=False, mode="nearest"),
    "elastic, cubic": ElasticDeformation(alpha=40, sigma=4, probability=1, order=3),
    "scale": RandomScale(probability=1),
    "crop": RandomCrop(size=[9, 30]),
}
INTENSITY = {
    "contrast": RandomContrast(probability=1),
    "gamma": RandomGammaCorrection(probability=1),
    "blur": GaussianBlur(probability=1),
    "gaussian": AdditiveGaussianNoise(probability=1),
    "poisson": AdditivePoissonNoise(lam=[1, 2], probability=1),
}
QUIET = {
    "standardize": Standardize(),
    "percentile": PercentileNormalizer(channelwise=True),
    "normalize": Normalize(),
    "crop": CropToFixed(size=[9, 30], centered=True),
    "boundary": LabelToBoundary(foreground=True, append_label=True),
    "blobs": BlobsToMask(boundary=True),
    "affinities": LabelToAffinities(offsets=[1, 2]),
    "relabel": Relabel(),
}
SPACES = ((12, 14), (6, 12, 12), (1, 12, 14))


# ------------------------------------------------------------------------------------------------------- of all of them


def test_every_exported_transform_is_tried_here() -> None:
    tried = {type(item).__name__ for item in (*SPATIAL.values(), *INTENSITY.values(), *QUIET.values())}
    others = {"Pipeline", "LabelToBoundaryAndAffinities", "LabelToMaskAndAffinities", "LabelToZAffinities"}
    assert tried | others | {"RandomLabelToAffinities", "RgbToLabel"} == set(transforms.__all__)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", [*SPATIAL, *INTENSITY])
def test_a_seed_gives_one_result_whatever_ran_before(name: str, space: tuple[int, ...]) -> None:
    transform = (SPATIAL | INTENSITY)[name]
    sample = sample_of(space, channels=2)
    before = {key: array.copy() for key, array in sample.items()}
    first = transform(sample, rng(1))
    transform(sample_of((5, 7), seed=3), rng(2))
    assert same(first, transform(sample, rng(1)))
    assert any(not same(first, transform(sample, rng(seed))) for seed in range(2, 12))
    assert same(sample, before)
    assert transform.random


@pytest.mark.parametrize("name", QUIET)
def test_what_draws_nothing_leaves_the_generator_alone(name: str) -> None:
    generator = rng(1)
    result = QUIET[name](sample_of((6, 12, 12)), generator)
    assert same(result, QUIET[name](sample_of((6, 12, 12)), rng(2)))
    assert generator.random() == rng(1).random()
    assert QUIET[name].random is False


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", SPATIAL)
def test_image_label_and_weight_stay_together(name: str, space: tuple[int, ...]) -> None:
    """Three copies of the label as image, label and weight: they are the same afterwards, where the order is 0."""
    transform = SPATIAL[name]
    if hasattr(transform, "read"):
        transform = type(transform)(**settings(transform), order=0)
    sample = sample_of(space)
    label = sample["label"].astype(np.float32)
    for seed in range(3):
        result = transform({"image": label[None], "label": sample["label"], "weight": label}, rng(seed))
        assert np.array_equal(result["image"][0], result["label"])
        assert np.array_equal(result["weight"], result["label"])
        assert result["label"].shape == result["image"].shape[1:]


def settings(transform: Any) -> dict[str, Any]:
    """What a warping transform was made with, but for its order."""
    kept = {key: value for key, value in vars(transform).items() if key != "read"}
    return kept | {"mode": transform.read.mode}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", [*SPATIAL, *INTENSITY])
def test_types_stay_and_labels_are_never_mixed(name: str, space: tuple[int, ...]) -> None:
    transform = (SPATIAL | INTENSITY)[name]
    sample = sample_of(space, channels=3)
    result = transform(sample, rng(4))
    assert {key: result[key].dtype for key in result} == {key: sample[key].dtype for key in sample}
    assert result["image"].ndim == sample["image"].ndim and len(result["image"]) == 3
    assert set(np.unique(result["label"])) <= set(np.unique(sample["label"]))
    assert np.isfinite(result["image"]).all()
    if name in INTENSITY:
        assert result["label"] is sample["label"] and result["weight"] is sample["weight"]


@pytest.mark.parametrize("name", SPATIAL)
def test_labels_of_several_channels_are_moved_channel_by_channel(name: str) -> None:
    sample = sample_of((6, 12, 12))
    several = sample | {"label": np.stack([sample["label"], 2 * sample["label"]])}
    result = SPATIAL[name](several, rng(5))["label"]
    assert np.array_equal(result[0], SPATIAL[name](sample, rng(5))["label"])
    assert np.array_equal(result[1], 2 * result[0])


@pytest.mark.parametrize("name", [*SPATIAL, *INTENSITY])
def test_an_image_without_a_label_is_changed_alike(name: str) -> None:
    transform, sample = (SPATIAL | INTENSITY)[name], sample_of((6, 12, 12))
    alone = transform({"image": sample["image"]}, rng(6))
    assert alone.keys() == {"image"}
    assert np.array_equal(alone["image"], transform(sample, rng(6))["image"])


@pytest.mark.parametrize("name", [name for name, item in (SPATIAL | INTENSITY).items() if hasattr(item, "probability")])
def test_a_probability_is_how_often_it_happens(name: str) -> None:
    transform, sample = (SPATIAL | INTENSITY)[name], sample_of((4, 5))
    kind = type(transform)
    assert all(kind(probability=0)(sample, rng(seed)) is sample for seed in range(20))
    often = sum(kind(probability=0.3)(sample, rng(seed)) is not sample for seed in range(300))
    assert 60 < often < 125  # 90 are expected, 8 is the deviation


# ------------------------------------------------------------------------------------------------------------- pipeline


def test_a_pipeline_runs_in_order_and_hands_on_one_generator() -> None:
    parts = [RandomFlip(), AdditiveGaussianNoise(probability=1), RandomRotate90()]
    sample, generator = sample_of((6, 12, 12)), rng(1)
    expected = sample
    for part in parts:
        expected = part(expected, generator)
    result = Pipeline(parts)(sample, rng(1))
    assert same(result, expected)
    assert all(result[key].flags.c_contiguous for key in KEYS)
    torch.from_numpy(result["image"])


def test_without_random_keeps_the_rest_in_order() -> None:
    pipeline = Pipeline([Standardize(), RandomFlip(), Pipeline([GaussianBlur(), Normalize()])])
    assert pipeline.random and len(pipeline) == 4
    quiet = pipeline.without_random()
    assert not quiet.random
    assert repr(quiet) == "Pipeline(Standardize, Normalize)"
    assert not Pipeline().random and not Pipeline(None).random


def test_functions_are_transforms() -> None:
    def add(sample: Sample, rng: np.random.Generator) -> Sample:
        return sample | {"image": sample["image"] + rng.random(dtype=np.float32)}

    pipeline = Pipeline([lambda sample: sample | {"image": 2 * sample["image"]}, add])
    assert [step.random for step in pipeline.steps] == [False, True]
    sample = sample_of((4, 5))
    assert np.array_equal(pipeline(sample, rng(1))["image"], 2 * sample["image"] + rng(1).random(dtype=np.float32))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{"name": "RandomFlip"}], r"transforms\[0\] is a dict; expected an object that is called with a sample"),
        ([Standardize(), RandomFlip], r"transforms\[1\] is the class RandomFlip"),
        ("RandomFlip", "transforms is a str; expected a list"),
    ],
)
def test_what_is_no_transform_is_refused(given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Pipeline(given)


def test_an_error_says_in_which_transform() -> None:
    with pytest.raises(ValueError, match="a label of shape") as caught:
        Pipeline([Relabel()])({"image": np.zeros((1, 4, 5), np.float32), "label": np.zeros((2, 4, 5), int)}, rng())
    assert caught.value.__notes__ == ["in the transform Relabel"]


@pytest.mark.parametrize("shape", [(1, 5), (1, 2, 3, 4, 5)])
def test_an_image_of_other_dimensions_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        RandomFlip()({"image": np.zeros(shape, np.float32)}, rng())


def test_a_label_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"an image of shape \(1, 4, 5\) with a label of shape \(5, 4\)"):
        RandomFlip()({"image": np.zeros((1, 4, 5), np.float32), "label": np.zeros((5, 4), int)}, rng())


# ---------------------------------------------------------------------------------------------------------------- MONAI

MONAI: dict[str, Callable[[], Any]] = {
    "flip": lambda: monai.RandFlipd(keys=KEYS, prob=0.5, spatial_axis=[0, 1]),
    "axis flip": lambda: monai.RandAxisFlipd(keys=KEYS, prob=0.8),
    "rotate90": lambda: monai.RandRotate90d(keys=KEYS, prob=0.9),
    "rotate": lambda: monai.RandRotated(keys=KEYS, range_x=0.4, prob=0.9, mode=["bilinear", "nearest"]),
    "zoom": lambda: monai.RandZoomd(keys=KEYS, prob=0.9, mode=["trilinear", "nearest-exact"]),
    "affine": lambda: monai.RandAffined(keys=KEYS, prob=0.9, rotate_range=0.4, mode=["bilinear", "nearest"]),
    "elastic": lambda: monai.Rand3DElasticd(
        keys=KEYS, sigma_range=(1, 2), magnitude_range=(5, 9), prob=0.9, mode=["bilinear", "nearest"]
    ),
    "crop": lambda: monai.RandSpatialCropd(keys=KEYS, roi_size=[4, 8, 8], random_size=False),
    "crop by label": lambda: monai.RandCropByPosNegLabeld(keys=KEYS, label_key="label", spatial_size=[4, 8, 8]),
    "gaussian": lambda: monai.RandGaussianNoised(keys=["image"], prob=0.9),
    "contrast": lambda: monai.RandAdjustContrastd(keys=["image"], prob=0.9),
    "histogram": lambda: monai.RandHistogramShiftd(keys=["image"], prob=0.9),
    "dropout": lambda: monai.RandCoarseDropoutd(keys=["image"], holes=3, spatial_size=3, prob=0.9),
    "bias": lambda: monai.RandBiasFieldd(keys=["image"], prob=0.9),
    "compose": lambda: monai.Compose([monai.RandFlipd(keys=KEYS, prob=0.5), monai.RandRotate90d(keys=KEYS, prob=0.9)]),
    "one of": lambda: monai.OneOf([monai.RandFlipd(keys=KEYS, prob=1), monai.RandRotate90d(keys=KEYS, prob=1)]),
}


@pytest.mark.parametrize("name", MONAI)
def test_monai_follows_the_generator_alone(name: str) -> None:
    pipeline = Pipeline([MONAI[name]()])
    sample = sample_of((8, 12, 12))
    before = {key: array.copy() for key, array in sample.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not writable.*")
        first = pipeline(sample, rng(1))
    np.random.seed(5)
    torch.manual_seed(5)
    pipeline(sample_of((9, 9, 9), seed=3), rng(2))
    assert same({key: first[key] for key in KEYS}, {key: pipeline(sample, rng(1))[key] for key in KEYS})
    fresh = Pipeline([MONAI[name]()])(sample, rng(1))
    assert np.array_equal(first["image"], fresh["image"])
    assert any(not np.array_equal(first["image"], pipeline(sample, rng(seed))["image"]) for seed in range(2, 9))
    assert pipeline.random and not pipeline.without_random().random
    assert same(sample, before)
    for key in KEYS:
        assert type(first[key]) is np.ndarray
        assert first[key].dtype == sample[key].dtype and first[key].ndim == sample[key].ndim
    assert set(np.unique(first["label"])) <= {*np.unique(sample["label"])}


def test_monai_and_dtrain_do_the_same_in_one_pipeline() -> None:
    sample = sample_of((8, 12, 12))
    result = Pipeline([RandomFlip(axis_prob=1), monai.Flipd(keys=KEYS)])(sample, rng())
    assert same({key: result[key] for key in KEYS}, {key: sample[key] for key in KEYS})


def test_monai_mixing_label_values_is_refused() -> None:
    with pytest.raises(ValueError, match="RandRotated mixed label values; use mode:"):
        Pipeline([monai.RandRotated(keys=KEYS, range_x=0.4, prob=1)])(sample_of((8, 12, 12)), rng(1))


def test_monai_transforms_of_single_arrays_are_refused() -> None:
    for given in (monai.RandFlip(), monai.OneOf([monai.RandFlip()]), monai.Compose([monai.RandFlip()])):
        with pytest.raises(ValueError, match=r"\[0\].*: MONAI's RandFlip changes one array alone; take RandFlipd"):
            Pipeline([given])


def test_monai_giving_several_samples_is_refused() -> None:
    several = monai.RandSpatialCropSamplesd(keys=KEYS, roi_size=[4, 4, 4], num_samples=2, random_size=False)
    with pytest.raises(ValueError, match="returned 2 samples; possible: num_samples: 1"):
        Pipeline([several])(sample_of((8, 12, 12)), rng())


def test_monai_may_make_another_target_of_a_label() -> None:
    sample = sample_of((4, 6, 6)) | {"label": np.ones((4, 6, 6), int)}
    one_hot = Pipeline([monai.AsDiscreted(keys=["label"], to_onehot=3)])(sample, rng())["label"]
    assert one_hot.shape == (3, 4, 6, 6) and one_hot[1].all() and not one_hot[0].any()
    halves = Pipeline([monai.Lambdad(keys=["label"], func=lambda label: label / 2)])(sample, rng())["label"]
    assert halves.dtype == np.float32 and (halves == 0.5).all()


# ------------------------------------------------------------------------------------------------------------- geometry


def test_flip_mirrors_the_axes_that_are_named() -> None:
    sample = sample_of((4, 5, 6))
    result = RandomFlip(axes=[0, -1], axis_prob=1)(sample, rng())
    assert np.array_equal(result["image"], sample["image"][:, ::-1, :, ::-1])
    assert np.array_equal(result["label"], sample["label"][::-1, :, ::-1])
    kept = RandomFlip(axis_prob=0)(sample, rng())
    assert np.array_equal(kept["image"], sample["image"])


def test_flip_draws_for_each_axis() -> None:
    sample = {"image": np.arange(8, dtype=np.float32).reshape(1, 2, 2, 2)}
    assert len({RandomFlip()(sample, rng(seed))["image"].tobytes() for seed in range(60)}) == 8


def test_rotate90_gives_every_quarter_and_only_halves_where_the_plane_is_no_square() -> None:
    square, oblong = sample_of((3, 5, 5)), sample_of((3, 5, 6))
    found = {RandomRotate90()(square, rng(seed))["label"].tobytes() for seed in range(40)}
    assert found == {np.rot90(square["label"], turns, (1, 2)).tobytes() for turns in range(4)}
    found = {RandomRotate90()(oblong, rng(seed))["label"].tobytes() for seed in range(40)}
    assert found == {np.rot90(oblong["label"], turns, (1, 2)).tobytes() for turns in (0, 2)}
    assert RandomRotate90(axes=[0, 1])(sample_of((5, 5, 2)), rng())["label"].shape == (5, 5, 2)


def test_a_centred_crop_is_the_middle_and_a_random_one_is_anywhere() -> None:
    sample = sample_of((4, 8, 9))
    result = CropToFixed(size=[4, 5], centered=True)(sample, rng())
    assert np.array_equal(result["image"], sample["image"][:, :, 2:6, 2:7])
    places = {RandomCrop(size=[2, 7, 9])(sample, rng(seed))["label"].tobytes() for seed in range(60)}
    windows = [sample["label"][z : z + 2, y : y + 7] for z in range(3) for y in range(2)]
    assert places == {window.tobytes() for window in windows}


def test_what_is_too_small_for_a_crop_is_padded_by_reflection() -> None:
    sample = sample_of((4, 5))
    result = CropToFixed(size=[4, 8], centered=True)(sample, rng())
    assert np.array_equal(result["label"], np.pad(sample["label"], [(0, 0), (1, 2)], "reflect"))
    assert RandomCrop(size=[30, 3])(sample, rng())["image"].shape == (1, 30, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomFlip(axis_prob=2), "RandomFlip: axis_prob is 2; possible: 0 to 1"),
        (lambda: RandomFlip(axes=[3])(sample_of((4, 5, 6)), rng()), "no axis 3 in 3-D data; possible: 0 to 2"),
        (lambda: RandomRotate90(axes=[1, 1]), "RandomRotate90: axes is .* expected two different axes"),
        (lambda: RandomRotate90(axes=[1, 2])(sample_of((4, 5)), rng()), "no axis 2 in 2-D data"),
        (lambda: CropToFixed(size=[4]), "CropToFixed: size is"),
        (lambda: RandomCrop(size=[4, 0]), "RandomCrop: size is"),
        (lambda: RandomCrop(size=[2, 2, 2])(sample_of((4, 5)), rng()), "for 2-D data"),
        (lambda: RandomRotate(mode="wrap"), "RandomRotate: mode is 'wrap'; possible: reflect, mirror, nearest"),
        (lambda: RandomRotate(order=6), "RandomRotate: order is 6; possible: 0, 1, 2"),
        (lambda: RandomRotate(axes=[]), "RandomRotate: "),
        (lambda: RandomRotate(axes=[[0, 0]]), "a pair of axes"),
        (lambda: RandomRotate(label_order=1)(sample_of((4, 5)), rng()), "label_order 1 would mix a label"),
        (lambda: RandomScale(scale=[2, 1]), "RandomScale: scale is"),
        (lambda: ElasticDeformation(sigma=0), "ElasticDeformation: sigma is 0"),
        (lambda: AdditiveGaussianNoise(scale=[-1, 1]), "AdditiveGaussianNoise: scale is .* of at least 0"),
        (lambda: AdditivePoissonNoise(lam=3), "AdditivePoissonNoise: lam is 3; expected two numbers"),
        (lambda: Standardize(mean=1.0), "Standardize: mean is 1.0, std is None; give both or none"),
        (lambda: Standardize(key="weight"), "Standardize: key is 'weight'; possible: image, label"),
        (lambda: PercentileNormalizer(pmin=99, pmax=1), "PercentileNormalizer: pmin is 99"),
        (lambda: Normalize(min_value=1, max_value=0), "Normalize: min_value is 1"),
        (lambda: Standardize(mean=[1, 2, 3], std=[1, 1, 1])(sample_of((4, 5), 2), rng()), "3 values for an image of 2"),
        (
            lambda: LabelToBoundary(mode="subpixel"),
            "LabelToBoundary: mode is 'subpixel'; possible: thick, inner, outer",
        ),
        (lambda: LabelToAffinities(offsets=[1, 1]), "LabelToAffinities: offsets is"),
        (lambda: LabelToAffinities(offsets=[1], z_offsets=[1, 2]), "expected as many of both"),
        (lambda: LabelToAffinities(offsets=[1, 2], z_offsets=[1, 0]), "z_offsets is .* expected whole numbers, 1 and"),
        (lambda: LabelToZAffinities(offsets=[1])(sample_of((4, 5)), rng()), r"expected \(D, H, W\)"),
        (lambda: RandomLabelToAffinities(max_offset=0), "RandomLabelToAffinities: max_offset is 0"),
        (lambda: Relabel(ignore_label=3), "Relabel: ignore_label needs append_original"),
        (lambda: RgbToLabel()(sample_of((4, 5)), rng()), r"RgbToLabel: a label of shape \(4, 5\)"),
    ],
)
def test_a_mistake_is_told(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------------------------------------------------- resampling


@pytest.mark.parametrize("mode", ["reflect", "mirror", "nearest", "constant"])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("spread", [0, 3, 100])
def test_values_between_grid_points_are_scipys(order: int, mode: str, spread: int) -> None:
    generator = rng(1)
    for space in ((9, 13), (5, 6, 7)):
        array = generator.random((2, 2, *space)).astype(np.float32)
        grid = np.stack(np.meshgrid(*map(np.arange, space), indexing="ij"))[:, None]
        places = (grid + spread * generator.normal(size=(len(space), 2, *space))).astype(np.float32)
        words = {"order": order, "mode": "grid-constant" if mode == "constant" else mode, "cval": 0.7}
        expected = [
            [ndimage.map_coordinates(channel.astype(float), places[:, number], **words) for channel in one]
            for number, one in enumerate(array)
        ]
        assert np.allclose(resample(array, places, order, mode, 0.7), expected, atol=1e-4)


def test_labels_are_read_exactly_whatever_their_size() -> None:
    label = np.array([2**62 + 1, 2**62 + 3, 5, -7]).reshape(1, 1, 2, 2)
    places = np.array([[[[0.2, 1.1]]], [[[0.9, 0.0]]]], dtype=np.float32)
    assert resample(label, places, 0).ravel().tolist() == [2**62 + 3, 5]


@pytest.mark.parametrize("axes", [(1, 2), (0, 1), (0, 2)])
def test_a_rotation_is_scipys(axes: tuple[int, int]) -> None:
    volume = rng(3).random((6, 9, 11)).astype(np.float32)
    expected = ndimage.rotate(volume, 23.4, axes, reshape=False, order=1, mode="reflect")
    slices = np.moveaxis(volume, axes, (-2, -1))
    places = rotated(*slices.shape[-2:], 23.4)
    assert np.allclose(np.moveaxis(resample(slices[None], places, 1)[0], (-2, -1), axes), expected, atol=1e-4)


def test_a_rotation_keeps_within_its_angle_and_its_plane() -> None:
    ramp = np.broadcast_to(np.arange(21, dtype=np.float32)[:, None], (1, 5, 21, 21)).copy()
    angles = []
    for seed in range(30):
        turned = RandomRotate(angle_spectrum=20, axes=[[1, 2]])({"image": ramp}, rng(seed))["image"]
        assert np.array_equal(turned[0, 0], turned[0, 4])
        angles.append(np.degrees(np.arctan2(turned[0, 0, 10, 11] - turned[0, 0, 10, 9], 2)))
    assert np.abs(np.tan(np.radians(angles))).max() < np.tan(np.radians(20))
    assert max(angles) > 8 and min(angles) < -8


def test_a_scale_of_two_shows_the_middle() -> None:
    ramp = np.arange(9, dtype=np.float32) * np.ones((1, 9, 1), np.float32)
    doubled = RandomScale(scale=[2, 2], probability=1, axes=[1])({"image": ramp}, rng())["image"]
    assert np.allclose(doubled[0, 3], np.linspace(2, 6, 9), atol=1e-5)


@pytest.mark.parametrize(("size", "sigma"), [(64, 50.0), (40, 3.0), (17, 0.6), (1, 50.0)])
def test_the_smooth_field_has_the_covariance_of_filtered_noise(size: int, sigma: float) -> None:
    """Of white noise w, G w has the covariance G G^T; here it is C C^T with far fewer columns."""
    filtered = ndimage.gaussian_filter1d(np.eye(size), sigma, axis=0, mode="reflect")
    covariance = filtered @ filtered.T
    waves = cosines(size, sigma)
    assert np.allclose(waves @ waves.T, covariance, atol=1e-5 * covariance.max())
    assert waves.shape[1] < 6 or sigma < 10


def test_the_smooth_field_varies_along_all_axes() -> None:
    fields = np.stack([smooth_noise((8, 10, 12), 2.0, rng(seed)) for seed in range(400)])
    noise = rng(1).standard_normal((400, 8, 10, 12))
    expected = ndimage.gaussian_filter(noise, (0, 2.0, 2.0, 2.0), mode="reflect")
    assert fields.shape == expected.shape and fields.dtype == np.float32
    assert np.allclose(fields.std(0).mean(), expected.std(0).mean(), rtol=0.03)
    for axis in (1, 2, 3):
        assert np.allclose(np.diff(fields, axis=axis).std(), np.diff(expected, axis=axis).std(), rtol=0.05)


def test_elastic_in_planes_leaves_slices_where_they_are() -> None:
    depth = np.broadcast_to(np.arange(6, dtype=np.float32)[:, None, None], (1, 6, 20, 20)).copy()
    flat = ElasticDeformation(alpha=60, sigma=4, probability=1, apply_3d=False)({"image": depth}, rng())["image"]
    assert np.allclose(flat, depth, atol=1e-4)
    deep = ElasticDeformation(alpha=60, sigma=4, probability=1)({"image": depth}, rng())["image"]
    assert np.abs(deep - depth).max() > 0.1


def test_elastic_of_no_strength_changes_nothing() -> None:
    sample = sample_of((6, 12, 12))
    result = ElasticDeformation(alpha=0, probability=1, order=3)(sample, rng())
    assert np.allclose(result["image"], sample["image"], atol=1e-4)
    assert np.array_equal(result["label"], sample["label"])


# ------------------------------------------------------------------------------------------------------------ intensity


def test_contrast_turns_about_the_mean() -> None:
    sample = sample_of((6, 12, 12), channels=2)
    image = sample["image"]
    result = RandomContrast(alpha=[2, 2], probability=1)(sample, rng())["image"]
    assert np.allclose(result, image.mean() + 2 * (image - image.mean()), atol=1e-5)
    assert np.allclose(
        RandomContrast(alpha=[2, 2], mean=1, probability=1)(sample, rng())["image"], 2 * image - 1, atol=1e-5
    )
    told = sample | {"stats": {"mean": 4.0}}
    assert np.allclose(RandomContrast(alpha=[2, 2], probability=1)(told, rng())["image"], 2 * image - 4, atol=1e-5)
    clipped = RandomContrast(alpha=[2, 2], mean=0, probability=1, clip=[-1, 1])(sample, rng())["image"]
    assert clipped.min() >= -1 and clipped.max() == 1


def test_gamma_keeps_the_range_unless_told_otherwise() -> None:
    sample = sample_of((6, 12, 12))
    image = sample["image"]
    unit = (image - image.min()) / np.ptp(image)
    result = RandomGammaCorrection(gamma=[2, 2], probability=1)(sample, rng())["image"]
    assert np.allclose(result, unit**2 * np.ptp(image) + image.min(), atol=1e-5)
    left = RandomGammaCorrection(gamma=[2, 2], probability=1, keep_range=False)(sample, rng())["image"]
    assert np.allclose(left, unit**2, atol=1e-5)
    flat = {"image": np.ones((1, 4, 5), np.float32)}
    assert RandomGammaCorrection(probability=1)(flat, rng()) is flat


def test_blur_is_a_gaussian_over_space() -> None:
    sample = sample_of((6, 12, 12), channels=2)
    result = GaussianBlur(sigma=[1.3, 1.3], probability=1)(sample, rng())["image"]
    expected = np.stack([ndimage.gaussian_filter(channel, 1.3, mode="nearest") for channel in sample["image"]])
    assert np.allclose(result, expected, atol=1e-6)


def test_noise_has_the_moments_that_were_asked_for() -> None:
    sample = {"image": np.full((1, 40, 50, 50), 7, np.float32)}
    gaussian = AdditiveGaussianNoise(scale=[0.5, 0.5], probability=1)(sample, rng())["image"] - 7
    assert abs(gaussian.mean()) < 0.01 and abs(gaussian.std() - 0.5) < 0.01
    poisson = AdditivePoissonNoise(lam=[2, 2], probability=1)(sample, rng())["image"] - 7
    assert abs(poisson.mean() - 2) < 0.03 and abs(poisson.var() - 2) < 0.06
    assert set(np.unique(poisson)) <= set(range(20))
    scales = [AdditiveGaussianNoise(scale=[0, 1], probability=1)(sample, rng(seed))["image"].std() for seed in range(9)]
    assert np.ptp(scales) > 0.2


# ---------------------------------------------------------------------------------------------------------- normalizing


class Stats(dict):
    """What a dataset tells of a file."""

    def percentile(self, percent: float) -> float:
        return 2 * percent


STATS = Stats(mean=3.0, std=2.0, min=-1.0, max=9.0)


def test_standardize_takes_what_is_given_then_the_files_then_its_own() -> None:
    sample = sample_of((6, 12, 12), channels=2)
    image, told = sample["image"], sample | {"stats": STATS}
    own = Standardize()(sample, rng())["image"]
    assert np.isclose(own.mean(), 0, atol=1e-5) and np.isclose(own.std(), 1, atol=1e-5) and own.dtype == np.float32
    assert np.allclose(Standardize()(told, rng())["image"], (image - 3) / 2, atol=1e-6)
    assert np.array_equal(Standardize(use_stats=False)(told, rng())["image"], own)
    given = Standardize(mean=[1, 2], std=[3, 4])(told, rng())["image"]
    assert np.allclose(given[1], (image[1] - 2) / 4, atol=1e-6)
    each = Standardize(channelwise=True)(told, rng())["image"]
    assert np.allclose(each.mean((1, 2, 3)), 0, atol=1e-5)
    flat = {"image": np.ones((1, 4, 5), np.float32)}
    assert not Standardize()(flat, rng())["image"].any()


def test_percentiles_are_the_files_or_the_arrays() -> None:
    sample = sample_of((6, 12, 12), channels=2)
    image, told = sample["image"], sample | {"stats": STATS}
    low, high = np.percentile(image, (5, 90))
    assert np.allclose(PercentileNormalizer(pmin=5, pmax=90)(sample, rng())["image"], (image - low) / (high - low))
    assert np.allclose(PercentileNormalizer(pmin=5, pmax=90)(told, rng())["image"], (image - 10) / 170, atol=1e-6)
    untold = sample | {"stats": dict(STATS)}
    assert same_image(PercentileNormalizer()(untold, rng()), PercentileNormalizer()(sample, rng()))


def same_image(one: Sample, other: Sample) -> bool:
    return np.array_equal(one["image"], other["image"])


def test_normalize_maps_a_range_and_clips() -> None:
    sample = sample_of((6, 12, 12))
    own = Normalize()(sample, rng())["image"]
    assert own.min() == -1 and own.max() == pytest.approx(1)
    told = Normalize(norm01=True)(sample | {"stats": STATS}, rng())["image"]
    assert np.allclose(told, (sample["image"] + 1) / 10, atol=1e-6)
    given = Normalize(min_value=0, max_value=2, norm01=True)(sample | {"stats": STATS}, rng())["image"]
    assert np.allclose(given, np.clip(sample["image"] / 2, 0, 1), atol=1e-6)


def test_a_second_transform_finds_the_files_figures_rescaled() -> None:
    sample = sample_of((6, 12, 12)) | {"stats": STATS}
    twice = Pipeline([Standardize(), Normalize()])(sample, rng())
    assert np.allclose(twice["image"], np.clip((sample["image"] + 1) / 5 - 1, -1, 1), atol=1e-5)
    assert np.allclose([twice["stats"][name].item() for name in ("min", "max")], [-1, 1])
    twice = Pipeline([Standardize(mean=1, std=5), PercentileNormalizer(pmin=5, pmax=90)])(sample, rng())
    assert np.allclose(twice["image"], (sample["image"] - 10) / 170, atol=1e-5)
    assert sample["stats"] == {"mean": 3.0, "std": 2.0, "min": -1.0, "max": 9.0}


def test_a_label_of_continuous_values_is_normalized_by_its_own() -> None:
    sample = sample_of((4, 5)) | {"stats": STATS}
    result = Normalize(key="label")(sample | {"label": np.arange(20).reshape(4, 5)}, rng())
    assert np.allclose(result["label"], np.linspace(-1, 1, 20).reshape(4, 5)) and result["label"].dtype == np.float32
    assert result["image"] is sample["image"] and result["stats"] is STATS


# -------------------------------------------------------------------------------------------------------------- targets


def target(transform: Any, label: Any, seed: int = 0) -> np.ndarray:
    label = np.asarray(label)
    return transform({"image": np.zeros((1, *label.shape), np.float32), "label": label}, rng(seed))["label"]


LINE = [[0, 0, 0, 4, 4, 4, 9, 9, 9, 0]]


def test_boundaries_of_the_three_modes_on_a_line() -> None:
    found = {mode: target(LabelToBoundary(mode=mode), LINE)[0, 0].tolist() for mode in ("thick", "inner", "outer")}
    assert found == {
        "thick": [0, 0, 1, 1, 0, 1, 1, 0, 1, 1],
        "inner": [0, 0, 0, 1, 0, 1, 1, 0, 1, 0],
        "outer": [0, 0, 1, 0, 0, 1, 1, 0, 0, 1],
    }


def test_the_channels_of_a_boundary_target() -> None:
    result = target(LabelToBoundary(foreground=True, append_label=True, ignore_index=9), LINE)
    assert result[:, 0].tolist() == [
        [0, 0, 0, 1, 1, 1, 9, 9, 9, 0],
        [0, 0, 1, 1, 0, 1, 9, 9, 9, 1],
        LINE[0],
    ]
    assert result.dtype == np.int64
    assert target(LabelToBoundary(), LINE).dtype == np.int32
    assert target(LabelToBoundary(ignore_index=-1), [[-1, 0]])[0].tolist() == [[-1, 1]]


def test_masks_of_blobs() -> None:
    assert target(BlobsToMask(append_label=True), LINE)[:, 0].tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 1, 0], LINE[0]]
    assert target(BlobsToMask(boundary=True), LINE)[1, 0].tolist() == [0, 0, 1, 0, 0, 1, 1, 0, 0, 1]
    classes = target(BlobsToMask(boundary=True, cross_entropy=True), LINE)
    assert classes[:, 0].tolist() == [[0, 0, 2, 1, 1, 2, 2, 1, 1, 2]]


def test_affinities_along_a_line() -> None:
    result = target(LabelToAffinities(offsets=[1, 2]), LINE)
    assert result.shape == (4, 1, 10)
    assert result[0, 0].tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 1, 0]  # along x: with the next
    assert not result[1].any()  # along y
    assert result[2, 0].tolist() == [0, 0, 1, 1, 0, 1, 1, 0, 1, 1]  # the last and the next
    merged = target(LabelToAffinities(offsets=[1, 2], aggregate_affinities=True, append_label=True), LINE)
    assert merged[:, 0].tolist() == [result[0, 0].tolist(), result[2, 0].tolist(), LINE[0]]


def test_combined_targets_are_their_parts() -> None:
    label = sample_of((5, 9, 9))["label"]
    affinities = target(LabelToAffinities(offsets=[1, 3], z_offsets=[1, 2], append_label=True, ignore_index=3), label)
    both = target(
        LabelToBoundaryAndAffinities(xy_offsets=[1, 3], z_offsets=[1, 2], append_label=True, ignore_index=3), label
    )
    assert np.array_equal(both, np.concatenate([target(LabelToBoundary(ignore_index=3), label), affinities]))
    mask = target(LabelToMaskAndAffinities(xy_offsets=[1, 3], z_offsets=[1, 2], ignore_index=3), label)
    assert np.array_equal(mask[0], np.where(label == 3, 3, label > 0))
    assert np.array_equal(mask[1:], affinities[:-1])
    assert np.array_equal(target(LabelToZAffinities(offsets=[1, 2], ignore_index=3), label), affinities[[2, 5]])


def test_a_random_affinity_is_one_of_all() -> None:
    label = sample_of((5, 9, 9))["label"]
    possible = {target(LabelToAffinities(offsets=[1, 2, 3, 4]), label)[number].tobytes() for number in range(12)}
    drawn = {target(RandomLabelToAffinities(max_offset=4), label, seed)[0].tobytes() for seed in range(60)}
    assert drawn <= possible and len(drawn) == 10  # along z only offsets of 1 and 2


def test_relabel_numbers_values_or_components() -> None:
    assert target(Relabel(run_cc=False), [[10, 10, 0, 6, 6]]).tolist() == [[2, 2, 0, 1, 1]]
    assert target(Relabel(run_cc=False), [[10, 10, 6]]).tolist() == [[2, 2, 1]]
    assert target(Relabel(), [[7, 7, 0, 7, 3]]).tolist() == [[1, 1, 0, 2, 3]]
    assert target(Relabel(), [[5, 5, 5]]).tolist() == [[1, 1, 1]]
    several = target(Relabel(append_original=True, ignore_label=3), [[3, 0, 0, 7]])
    assert several.tolist() == [[[0, 1, 1, 2]], [[3, 0, 0, 7]]]


@pytest.mark.parametrize("kind", [np.uint8, np.int64])
def test_colours_become_numbers(kind: type) -> None:
    image = np.zeros((1, 2, 1), np.float32)
    colours = np.array([[[1, 2, 3]], [[255, 255, 255]]], kind)
    last = RgbToLabel()({"image": image, "label": colours}, rng())["label"]
    first = RgbToLabel()({"image": image, "label": np.moveaxis(colours, -1, 0)}, rng())["label"]
    assert last.tolist() == first.tolist() == [[66051], [2**24 - 1]]


def test_targets_take_a_single_channel_and_refuse_several() -> None:
    image = np.zeros((1, 1, 10), np.float32)
    one = LabelToBoundary()({"image": image, "label": np.array([LINE])}, rng())["label"]
    assert np.array_equal(one, target(LabelToBoundary(), LINE))
    with pytest.raises(ValueError, match=r"LabelToBoundary: a label of shape \(2, 1, 10\); expected one number per"):
        LabelToBoundary()({"image": image, "label": np.array([LINE, LINE])}, rng())
