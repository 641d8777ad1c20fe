"""What pytorch-3dunet's transformer lists become, against the package itself where both do the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import ndimage

from dtrain.components import transforms as ours
from dtrain.components.transforms.pipeline import Pipeline
from dtrain.components.transforms.pytorch3dunet import KINDS, REQUIRED, paired

theirs = pytest.importorskip("pytorch3dunet.augment.transforms")

CONFIGS = sorted((Path(__file__).parents[1] / "data" / "pytorch3dunet").glob("*.y*ml"))
SPACE = (6, 16, 16)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def arrays(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An image and a label of objects, (D, H, W); int32: of int64, skimage finds wrong outer boundaries."""
    blobs = ndimage.gaussian_filter(rng(seed).standard_normal(SPACE), 1.5)
    label = np.digitize(blobs, np.quantile(blobs, [0.3, 0.6, 0.8])).astype(np.int32)
    return blobs.astype(np.float32), label


def run(raw: list, label: list | None = None, seed: int = 0, **more: Any) -> dict[str, Any]:
    image, objects = arrays()
    sample = {"image": image[None]} | ({} if label is None else {"label": objects}) | more
    return Pipeline(paired(raw, label))(sample, rng(seed))


def test_every_transform_of_the_package_is_known_with_its_keys_and_defaults() -> None:
    import inspect

    there = {
        name: inspect.signature(item)
        for name, item in vars(theirs).items()
        if inspect.isclass(item) and item.__module__ == theirs.__name__
    }
    assert set(KINDS) == set(there) - {"Compose", "Transformer", "AbstractLabelToBoundary"}
    for name, signature in there.items():
        if name in KINDS:
            taken = {
                key: REQUIRED if item.default is item.empty else item.default
                for key, item in signature.parameters.items()
                if key not in ("random_state", "kwargs")
            }
            if name == "ToTensor":
                taken["dtype"] = taken["dtype"].__name__
            if name == "RandomContrast":
                taken["mean"] = None  # the file's, as the original passes it, or the patch's
            assert KINDS[name].keys == taken, name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_published_configs_become_pipelines(path: Path) -> None:
    found = 0
    for phase in yaml.safe_load(path.read_text())["loaders"].values():
        if isinstance(phase, dict) and "transformer" in phase:
            lists = phase["transformer"]
            made = Pipeline(paired(lists["raw"], lists.get("label"), lists.get("weight")))
            image, label = arrays()
            sample = {"image": image[None]} | ({"label": label} if lists.get("label") else {})
            result = made(sample, rng())
            assert result["image"].dtype == np.float32 and np.isfinite(result["image"]).all()
            found += 1
    assert found
    assert CONFIGS


# --------------------------------------------------------------------------------------- the same as the package does

RAW = {
    "Standardize": [{}, {"mean": 1.0, "std": 0.5}],
    "Normalize": [{}, {"norm01": True}, {"min_value": -0.1, "max_value": 0.2}],
    "PercentileNormalizer": [{"pmin": 2, "pmax": 90}, {}],
    "ToTensor": [{"expand_dims": True}, {"expand_dims": True, "normalize": True}],
    "RandomContrast": [{"alpha": [1.5, 1.5], "mean": 0.1, "execution_probability": 1}],
    "RandomGammaCorrection": [{"gamma": [0.7, 0.7], "execution_probability": 1}],
    "GaussianBlur3D": [{"sigma": [1.2, 1.2], "execution_probability": 1}],
    "Identity": [{}],
}


@pytest.mark.parametrize(("name", "keys"), [(name, keys) for name, several in RAW.items() for keys in several])
def test_the_image_is_what_the_package_makes_of_it(name: str, keys: dict) -> None:
    image, _ = arrays()
    more = {"random_state": np.random.RandomState(0)} if name.startswith("Random") else {}
    expected = np.asarray(getattr(theirs, name)(**keys, **more)(image.copy()))
    result = run([{"name": name, **keys}])["image"]
    assert np.allclose(result, expected.reshape(result.shape), atol=1e-5)


@pytest.mark.parametrize("value", [-3.0, 0.0, 0.1, 0.7, 1.5, 7.0, 12345.678])
@pytest.mark.parametrize(("name", "keys"), [(name, keys) for name, several in RAW.items() for keys in several])
def test_a_patch_of_one_value_is_what_the_package_makes_of_it(name: str, keys: dict, value: float) -> None:
    image = np.full(SPACE, value, np.float32)
    more = {"random_state": np.random.RandomState(0)} if name.startswith("Random") else {}
    expected = np.asarray(getattr(theirs, name)(**keys, **more)(image.copy()))
    if name == "Standardize" and not keys:
        expected = np.zeros(SPACE)  # there the mean is rounded, and what it is off by is divided by eps: 0, 1 or -1
    result = Pipeline(paired([{"name": name, **keys}], None))({"image": image[None]}, rng())["image"]
    assert np.allclose(result, expected.reshape(result.shape), rtol=1e-6, atol=1e-6)
    if name == "Normalize" and not keys:
        assert (result == -1).all()


@pytest.mark.parametrize("name", ["Standardize", "PercentileNormalizer"])
def test_channels_are_normalized_by_themselves(name: str) -> None:
    image = np.stack([arrays(seed)[0] for seed in (1, 2)])
    expected = getattr(theirs, name)(channelwise=True)(image)
    result = Pipeline(paired([{"name": name, "channelwise": True}], None))({"image": image}, rng())["image"]
    assert np.allclose(result, expected, atol=1e-5)


LABEL = {
    "StandardLabelToBoundary": [
        {},
        {"append_label": True, "foreground": True},
        {"mode": "inner"},
        {"mode": "outer", "ignore_index": 2},
    ],
    "BlobsToMask": [{}, {"boundary": True, "append_label": True}, {"boundary": True, "cross_entropy": True}],
    "LabelToAffinities": [
        {"offsets": [1, 2, 3, 4]},
        {"offsets": [1, 4], "z_offsets": [1, 2], "append_label": True, "ignore_index": 1},
        {"offsets": [1, 5], "aggregate_affinities": True},
        {"offsets": [1, 2, 4], "z_offsets": [1, 1, 2]},
    ],
    "LabelToZAffinities": [{"offsets": [1, 2, 3]}],
    "LabelToBoundaryAndAffinities": [{"xy_offsets": [1, 2], "z_offsets": [1, 3], "append_label": True}],
    "LabelToMaskAndAffinities": [{"xy_offsets": [1, 2], "z_offsets": [2, 2], "background": 1}],
    "Relabel": [{}, {"run_cc": False}, {"append_original": True}, {"append_original": True, "ignore_label": 2}],
    "Normalize": [{}],
    "LabelToTensor": [{}],
    "Identity": [{}],
    "ToTensor": [{"expand_dims": True}, {"expand_dims": False, "dtype": "int64"}],
}


@pytest.mark.parametrize(("name", "keys"), [(name, keys) for name, several in LABEL.items() for keys in several])
def test_the_label_is_what_the_package_makes_of_it(name: str, keys: dict) -> None:
    _, label = arrays()
    expected = np.asarray(getattr(theirs, name)(**keys)(label.copy()))
    result = run([], [{"name": name, **keys}])["label"]
    assert result.shape == expected.shape
    assert np.allclose(result, expected, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_boundaries_are_skimages_in_two_dimensions_too(seed: int) -> None:
    from skimage.segmentation import find_boundaries

    label = arrays(seed)[1][0] * (seed + 1)
    for mode in ("thick", "inner", "outer"):
        result = ours.LabelToBoundary(mode=mode)({"image": np.zeros((1, 16, 16)), "label": label}, rng())["label"]
        assert np.array_equal(result[0], find_boundaries(label, 2, mode))


def test_flips_happen_as_often_as_in_the_package() -> None:
    image, label = arrays()
    raw = [{"name": "RandomFlip", "axis_prob": 0.9}]
    pipeline = Pipeline(paired(raw, raw))
    sample = {"image": image[None], "label": label}
    kept = sum(np.array_equal(pipeline(sample, rng(seed))["label"], label) for seed in range(300))
    state = np.random.RandomState(0)
    flip = theirs.RandomFlip(state, axis_prob=0.9)
    expected = sum(np.array_equal(flip(label), label) for _ in range(300))
    assert abs(kept - expected) < 45  # of 219, deviation 8


def test_an_elastic_deformation_is_as_strong_as_the_packages() -> None:
    """Ramps tell how far each voxel is moved; the deviation of what the two packages do is the same."""
    ramp = np.broadcast_to(np.arange(16, dtype=np.float32) * 1, SPACE).copy()
    keys = {"spline_order": 1, "alpha": 15, "sigma": 3, "execution_probability": 1}
    state = np.random.RandomState(1)
    their = theirs.ElasticDeformation(state, **keys)
    expected = np.stack([their(ramp) - ramp for _ in range(60)])[..., 4:-4]
    pipeline = Pipeline(paired([{"name": "ElasticDeformation", **keys}], None))
    found = np.stack([pipeline({"image": ramp[None]}, rng(seed))["image"][0] - ramp for seed in range(60)])[..., 4:-4]
    assert found.std() == pytest.approx(expected.std(), rel=0.2)
    assert np.diff(found, axis=2).std() == pytest.approx(np.diff(expected, axis=2).std(), rel=0.2)


# ------------------------------------------------------------------------------------------------------------- pairing

ROTATE = {"name": "RandomRotate", "axes": [[2, 1]], "angle_spectrum": 45, "mode": "reflect"}
ELASTIC = {"name": "ElasticDeformation", "execution_probability": 1}


def test_spatial_transforms_become_one_and_the_rest_keeps_its_place() -> None:
    raw = [
        {"name": "Standardize"},
        {"name": "RandomFlip"},
        {"name": "GaussianBlur3D"},
        {**ELASTIC, "spline_order": 3},
        {"name": "AdditiveGaussianNoise", "execution_probability": 0.2},
        {"name": "ToTensor", "expand_dims": True},
    ]
    label = [
        {"name": "RandomFlip"},
        {"name": "Relabel"},
        {**ELASTIC, "spline_order": 0},
        {"name": "StandardLabelToBoundary", "append_label": True},
        {"name": "ToTensor", "expand_dims": False},
    ]
    weight = [{"name": "RandomFlip"}, {**ELASTIC, "spline_order": 1}, {"name": "ToTensor", "expand_dims": False}]
    made = paired(raw, label, weight)
    assert [type(item).__name__ for item in made] == [
        *("Standardize", "RandomFlip", "GaussianBlur", "Relabel", "ElasticDeformation", "AdditiveGaussianNoise"),
        *("LabelToBoundary", "LabelForm"),
    ]
    assert made[4].read.orders == {"image": 3, "label": 0, "weight": 1}
    assert made[5].probability == 0.2
    image, objects = arrays()
    sample = {"image": image[None], "label": objects, "weight": image}
    result = Pipeline(made)(sample, rng())
    assert result["label"].shape == (2, *SPACE) and result["label"].dtype == np.float32
    assert result["weight"].shape == SPACE


def test_image_and_label_stay_together() -> None:
    lists = [{"name": "RandomFlip"}, {"name": "RandomRotate90"}, ROTATE, {**ELASTIC, "spline_order": 0, "sigma": 4}]
    _, label = arrays()
    for seed in range(5):
        result = Pipeline(paired(lists, lists))({"image": label[None].astype(np.float32), "label": label}, rng(seed))
        assert np.array_equal(result["image"][0], result["label"])


def test_planes_are_found_in_images_too() -> None:
    made = Pipeline(paired([ROTATE, {"name": "CropToFixed", "size": [8, 8]}], None))
    assert made({"image": arrays()[0][:1]}, rng())["image"].shape == (1, 8, 8)


def test_a_rotation_fills_with_what_the_package_fills() -> None:
    constant = [{**ROTATE, "mode": "constant"}]
    result = run(constant, constant)
    assert (result["label"] == -1).any() and (result["image"] == -1).any()


def test_the_patchs_own_range_is_taken_though_the_files_is_told() -> None:
    class Stats(dict):
        def percentile(self, percent: float) -> float:
            return percent

    stats = Stats(mean=1.0, std=2.0, min=-9.0, max=9.0)
    image, _ = arrays()
    for raw in ({"name": "Normalize"}, {"name": "ToTensor", "expand_dims": True, "normalize": True}):
        assert np.array_equal(run([raw], stats=stats)["image"], run([raw])["image"])
    assert np.allclose(run([{"name": "Standardize"}], stats=stats)["image"][0], (image - 1) / 2, atol=1e-6)
    told = run([{"name": "PercentileNormalizer"}], stats=stats)["image"][0]
    assert np.allclose(told, (image - 1) / 98.6, atol=1e-6)


FLIP = {"name": "RandomFlip"}
TENSOR = {"name": "ToTensor", "expand_dims": True}


@pytest.mark.parametrize(
    ("raw", "label", "weight", "message"),
    [
        (
            [FLIP, {"name": "RandomFlop"}],
            None,
            None,
            r"transformer.raw\[1\]: RandomFlop is unknown; possible: RandomFlip",
        ),
        (
            [],
            [{"name": "GaussianBlur3D"}],
            None,
            r"transformer.label\[0\]: GaussianBlur3D is not for label, only for raw",
        ),
        (
            [{"name": "Relabel"}],
            None,
            None,
            r"transformer.raw\[0\]: Relabel is not for raw, only for label; possible: .*",
        ),
        ([], [], [{"name": "Standardize"}], r"transformer.weight\[0\]: Standardize is not for weight"),
        (
            [{"name": "Standardize", "epsilon": 1}],
            None,
            None,
            r"\[0\]: Standardize takes no epsilon; possible: eps, mean",
        ),
        ([{"name": "RandomRotate90", "p": 1}], None, None, r"RandomRotate90 takes no p; possible: no key at all"),
        ([ELASTIC], None, None, r"transformer.raw\[0\]: ElasticDeformation needs spline_order"),
        ([{"name": "ToTensor"}], None, None, r"transformer.raw\[0\]: ToTensor needs expand_dims"),
        ([FLIP], [TENSOR], None, r"raw\[0\]: RandomFlip changes where things are, .*the other list, there is none"),
        (
            [TENSOR],
            [TENSOR],
            [FLIP],
            r"transformer.weight\[0\]: RandomFlip changes where .* transformer.weight must both",
        ),
        (
            [FLIP, ROTATE],
            [ROTATE, FLIP],
            None,
            r"transformer.raw\[0\]: RandomFlip .* transformer.label\[0\]: RandomRotate stands there",
        ),
        (
            [ROTATE],
            [{**ROTATE, "angle_spectrum": 30}],
            None,
            r"transformer.raw\[0\]: RandomRotate has angle_spectrum 45, transformer.label\[0\]: RandomRotate 30",
        ),
        (
            [{**ROTATE, "mode": "wrap"}],
            None,
            None,
            r"raw\[0\]: RandomRotate: RandomRotate: mode is 'wrap'; possible: ref",
        ),
        (
            [{"name": "Standardize", "mean": 1}],
            None,
            None,
            r"raw\[0\]: Standardize: Standardize: mean is 1, std is None",
        ),
        (
            [TENSOR, FLIP],
            None,
            None,
            r"raw\[0\]: ToTensor must be the last of its list; transformer.raw\[1\]: RandomFlip",
        ),
        (
            [{**TENSOR, "dtype": "long"}],
            None,
            None,
            r"transformer.raw\[0\]: ToTensor: dtype is 'long'; possible: float32",
        ),
        ([], [{**TENSOR, "normalize": True}], None, r"label\[0\]: ToTensor: normalize would rescale a label"),
        ("RandomFlip", None, None, "transformer.raw is 'RandomFlip'; expected a list"),
        (["RandomFlip"], None, None, r"transformer.raw\[0\] is 'RandomFlip'; expected a mapping with a name"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_place(raw: Any, label: Any, weight: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired(raw, label, weight)
