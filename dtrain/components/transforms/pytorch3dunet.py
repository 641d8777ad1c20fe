"""Reads pytorch-3dunet's `transformer` lists as dtrain's transforms."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dtrain.components.transforms.geometry import CropToFixed, RandomFlip, RandomRotate90
from dtrain.components.transforms.intensity import (
    AdditiveGaussianNoise,
    AdditivePoissonNoise,
    GaussianBlur,
    RandomContrast,
    RandomGammaCorrection,
)
from dtrain.components.transforms.normalize import Normalize, PercentileNormalizer, Standardize
from dtrain.components.transforms.sample import Sample, spatial_dims
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
from dtrain.components.transforms.warp import ElasticDeformation, RandomRotate

REQUIRED = object()
LISTS = ("raw", "label", "weight")
INTEGERS = ("int64", "long", "int32", "int", "int16", "int8", "uint8", "uint16", "uint32")
FLOATS = ("float32", "float")  # a list without a dtype means float32


class Kind(NamedTuple):
    """One of the original's transforms: what it becomes, and its keys with their defaults."""

    make: Callable[..., Any] | None
    keys: dict[str, Any]
    where: tuple[str, ...]  # the lists in which it means something


_OFTEN = {"execution_probability": 0.1}
_MARK = {"ignore_index": None, "append_label": False}
SPATIAL = {
    "RandomFlip": Kind(RandomFlip, {"axis_prob": 0.5}, LISTS),
    "RandomRotate90": Kind(RandomRotate90, {}, LISTS),
    "RandomRotate": Kind(RandomRotate, {"angle_spectrum": 30, "axes": None, "mode": "reflect", "order": 0}, LISTS),
    "ElasticDeformation": Kind(
        ElasticDeformation,
        {"spline_order": REQUIRED, "alpha": 2000, "sigma": 50, "apply_3d": True, **_OFTEN},
        LISTS,
    ),
    "CropToFixed": Kind(CropToFixed, {"size": (256, 256), "centered": False}, LISTS),
}
ORDERS = {"RandomRotate": "order", "ElasticDeformation": "spline_order"}  # may differ between the lists
_VALUES = {
    "Standardize": Kind(Standardize, {"eps": 1e-10, "mean": None, "std": None, "channelwise": False}, LISTS[:2]),
    "PercentileNormalizer": Kind(
        PercentileNormalizer, {"pmin": 1.0, "pmax": 99.6, "channelwise": False, "eps": 1e-10}, LISTS[:2]
    ),
    "Normalize": Kind(Normalize, {"min_value": None, "max_value": None, "norm01": False, "eps": 1e-10}, LISTS[:2]),
}
_IMAGE = {
    "RandomContrast": Kind(RandomContrast, {"alpha": (0.5, 1.5), "mean": None, **_OFTEN}, LISTS[:1]),
    "RandomGammaCorrection": Kind(RandomGammaCorrection, {"gamma": (0.5, 1.5), **_OFTEN}, LISTS[:1]),
    "AdditiveGaussianNoise": Kind(AdditiveGaussianNoise, {"scale": (0.0, 1.0), **_OFTEN}, LISTS[:1]),
    "AdditivePoissonNoise": Kind(AdditivePoissonNoise, {"lam": (0.0, 1.0), **_OFTEN}, LISTS[:1]),
    "GaussianBlur3D": Kind(GaussianBlur, {"sigma": (0.1, 2.0), "execution_probability": 0.5}, LISTS[:1]),
}
_TARGET = {
    "StandardLabelToBoundary": Kind(LabelToBoundary, {"mode": "thick", "foreground": False, **_MARK}, LISTS[1:2]),
    "BlobsToMask": Kind(BlobsToMask, {"append_label": False, "boundary": False, "cross_entropy": False}, LISTS[1:2]),
    "RandomLabelToAffinities": Kind(
        RandomLabelToAffinities, {"max_offset": 10, "z_offset_scale": 2, **_MARK}, LISTS[1:2]
    ),
    "LabelToAffinities": Kind(
        LabelToAffinities, {"offsets": REQUIRED, "z_offsets": None, "aggregate_affinities": False, **_MARK}, LISTS[1:2]
    ),
    "LabelToZAffinities": Kind(LabelToZAffinities, {"offsets": REQUIRED, **_MARK}, LISTS[1:2]),
    "LabelToBoundaryAndAffinities": Kind(
        LabelToBoundaryAndAffinities,
        {"xy_offsets": REQUIRED, "z_offsets": REQUIRED, "mode": "thick", "foreground": False, **_MARK},
        LISTS[1:2],
    ),
    "LabelToMaskAndAffinities": Kind(
        LabelToMaskAndAffinities, {"xy_offsets": REQUIRED, "z_offsets": REQUIRED, "background": 0, **_MARK}, LISTS[1:2]
    ),
    "Relabel": Kind(Relabel, {"append_original": False, "run_cc": True, "ignore_label": None}, LISTS[1:2]),
    "RgbToLabel": Kind(RgbToLabel, {}, LISTS[1:2]),
}
_FORM = {
    "ToTensor": Kind(None, {"expand_dims": REQUIRED, "dtype": "float32", "normalize": False}, LISTS),
    "LabelToTensor": Kind(None, {}, LISTS[1:2]),
    "Identity": Kind(None, {}, LISTS),
}
KINDS = SPATIAL | _VALUES | _IMAGE | _TARGET | _FORM


class Entry(NamedTuple):
    """One line of a list, its defaults filled in."""

    place: str  # raw[2]: RandomRotate
    name: str
    list: str
    keys: dict[str, Any]


class LabelForm:
    """The label in the form that the original's ToTensor gives it.

    Args:
        channel: A label (*spatial) becomes (1, *spatial).
        floating: float32; otherwise int64.
    """

    random = False

    def __init__(self, *, channel: bool, floating: bool) -> None:
        self.channel, self.type = channel, np.float32 if floating else np.int64

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample with the label in that form; draws nothing."""
        label = sample["label"]
        if self.channel and label.ndim == spatial_dims(sample):
            label = label[None]
        return sample | {"label": label.astype(self.type, copy=False)}


def paired(
    raw: Sequence[Mapping[str, Any]],
    label: Sequence[Mapping[str, Any]] | None,
    weight: Sequence[Mapping[str, Any]] | None = None,
) -> list[Any]:
    """The transforms that do to image, label and weight what pytorch-3dunet's lists do, and what its pages promise.

    The original runs each list by itself, and keeps image and label in step by drawing the same numbers for both. Here
    one transform changes all of them, so the lists must hold the same spatial transforms (RandomFlip, RandomRotate90,
    RandomRotate, ElasticDeformation, CropToFixed) in the same order, with the same keys but for the spline's order.
    What stands in `raw` alone is for the image, in `label` alone for the label. A ToTensor gives the label its type
    and channel; an image has a channel anyway.

    Where this differs from the original's code, apart from the numbers that are drawn:

    - Transforms draw independently. There, all of a list begin with the same number, so that what is executed with
      probability 0.1 only ever comes together with what is executed with 0.2.
    - AdditiveGaussianNoise differs from image to image, GaussianBlur3D follows the seed and leaves channels apart.
    - RandomContrast without a mean, and PercentileNormalizer, take the file's figures with `global_normalization`, and
      the patch's without; there, they fail, or take intensities for percentages.
    - Angles are not only whole degrees. A quarter turn keeps the shape. Crops may also lie at the far end.
    - Relabel and LabelToMaskAndAffinities: see there.

    Kept as it is: RandomFlip mirrors with probability 1 - axis_prob, whatever the original's pages say;
    RandomContrast clips to [-1, 1]; RandomGammaCorrection leaves 0..1; Normalize takes the patch's own range; a
    rotation is of order 0 where none is given, for the image too.

    Args:
        raw: The list for the image.
        label: The list for the label; None or empty where there is no label, as in a prediction.
        weight: The list for the weight map.

    Returns:
        Transforms for a Pipeline.

    Raises:
        ValueError: Something that cannot be done in this way: which list, which index, what is possible.
    """
    given = {"raw": raw, "label": label, "weight": weight}
    lists = {name: _entries(name, items) for name, items in given.items() if name == "raw" or items}
    spatial = {name: [entry for entry in entries if entry.name in SPATIAL] for name, entries in lists.items()}
    _check_pairs(spatial)
    result: list[Any] = []
    single = {name: _groups(entries) for name, entries in lists.items()}
    for number in range(len(spatial["raw"]) + 1):
        for groups in single.values():
            result += [made for entry in groups[number] for made in _alone(entry)]
        if number < len(spatial["raw"]):
            result.append(_together([entries[number] for entries in spatial.values()]))
    return result


def _entries(name: str, items: Sequence[Mapping[str, Any]] | None) -> list[Entry]:
    """A list's lines, checked by themselves."""
    if isinstance(items, str) or not isinstance(items, Sequence):
        raise ValueError(
            f"transformer.{name} is {items!r}; expected a list of transforms, [{{name: Standardize}}, ...]"
        )
    entries = []
    for index, item in enumerate(items):
        place = f"transformer.{name}[{index}]"
        if not isinstance(item, Mapping) or "name" not in item:
            raise ValueError(f"{place} is {item!r}; expected a mapping with a name, {{name: Standardize}}")
        kind = KINDS.get(item["name"])
        possible = [known for known, other in KINDS.items() if name in other.where]
        if kind is None or name not in kind.where:
            what = "unknown" if kind is None else f"not for {name}, only for {' and '.join(kind.where)}"
            raise ValueError(f"{place}: {item['name']} is {what}; possible: {', '.join(possible)}")
        place += f": {item['name']}"
        given = {key: value for key, value in item.items() if key != "name"}
        if unknown := [str(key) for key in given if key not in kind.keys]:
            raise ValueError(
                f"{place} takes no {', '.join(unknown)}; possible: {', '.join(kind.keys) or 'no key at all'}"
            )
        keys = kind.keys | given
        if missing := [key for key, value in keys.items() if value is REQUIRED]:
            raise ValueError(f"{place} needs {', '.join(missing)}")
        entries.append(Entry(place, item["name"], name, keys))
    _check_forms(entries)
    return entries


def _check_forms(entries: list[Entry]) -> None:
    """Whether each ToTensor is the last of its list and asks for what a dataset can give."""
    for number, entry in enumerate(entries):
        if entry.name not in ("ToTensor", "LabelToTensor"):
            continue
        if number < len(entries) - 1:
            raise ValueError(f"{entry.place} must be the last of its list; {entries[number + 1].place} follows")
        types = {"raw": FLOATS[:1], "weight": FLOATS[:1], "label": FLOATS + INTEGERS}[entry.list]
        if entry.keys.get("dtype", "float32") not in types:
            raise ValueError(f"{entry.place}: dtype is {entry.keys['dtype']!r}; possible: {', '.join(types)}")
        if entry.keys.get("normalize") and entry.list != "raw":
            raise ValueError(f"{entry.place}: normalize would rescale a {entry.list}; possible: false")


def _check_pairs(spatial: dict[str, list[Entry]]) -> None:
    """Whether the spatial transforms of all lists are the same."""
    for name in [name for name in spatial if name != "raw"]:
        for number in range(max(len(spatial["raw"]), len(spatial[name]))):
            pair = [entries[number] if number < len(entries) else None for entries in (spatial["raw"], spatial[name])]
            image, other = pair
            if image is None or other is None or image.name != other.name:
                here = image or other
                there = other if image else image
                assert here is not None
                found = f"{there.place} stands there" if there else "there is none"
                raise ValueError(
                    f"{here.place} changes where things are, so transformer.raw and transformer.{name} must both have "
                    f"it, in the same order; in the other list, {found}"
                )
            for key, value in image.keys.items():
                if key != ORDERS.get(image.name) and _plain(value) != _plain(other.keys[key]):
                    raise ValueError(
                        f"{image.place} has {key} {value!r}, {other.place} {other.keys[key]!r}; they are one transform "
                        "of image and label here, which needs the same"
                    )


def _plain(value: Any) -> Any:
    """Lists as tuples, to compare them."""
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def _groups(entries: list[Entry]) -> list[list[Entry]]:
    """What is not spatial, before the first spatial transform, between the first and the second, ..."""
    groups: list[list[Entry]] = [[]]
    for entry in entries:
        if entry.name in SPATIAL:
            groups.append([])
        else:
            groups[-1].append(entry)
    return groups


def _together(entries: list[Entry]) -> Any:
    """One transform of all arrays."""
    name, keys = entries[0].name, dict(entries[0].keys)
    if order := ORDERS.get(name):
        del keys[order]
        names = {"raw": "order", "label": "label_order", "weight": "weight_order"}
        keys |= {names[entry.list]: entry.keys[order] for entry in entries}
    if name == "RandomFlip":
        keys["axis_prob"] = 1 - keys["axis_prob"]
    if name == "RandomRotate":
        # Counted from the end, as the original's images are (1, H, W) where ours are (H, W).
        pairs = keys["axes"]
        keys["axes"] = pairs and [[axis - 3 if axis >= 0 else axis for axis in pair] for pair in pairs]
        keys |= {"fill": -1, "label_fill": -1}
    return _made(entries[0], keys)


def _alone(entry: Entry) -> list[Any]:
    """The transform of one array, if it is any."""
    keys = dict(entry.keys)
    if entry.name == "ToTensor" and entry.list == "label":
        return [LabelForm(channel=bool(keys["expand_dims"]), floating=keys["dtype"] in FLOATS)]
    if entry.name == "LabelToTensor":
        return [LabelForm(channel=False, floating=False)]
    if entry.name == "ToTensor" and keys["normalize"]:
        return [Normalize(norm01=True, use_stats=False)]
    if KINDS[entry.name].make is None:
        return []
    if entry.name in _VALUES and entry.list == "label":
        keys["key"] = "label"
    if entry.name == "Normalize":
        keys["use_stats"] = False
    if entry.name == "RandomContrast":
        keys["clip"] = (-1, 1)
    if entry.name == "RandomGammaCorrection":
        keys["keep_range"] = False
    return [_made(entry, keys)]


def _made(entry: Entry, keys: dict[str, Any]) -> Any:
    """The object, with its mistakes told by their place."""
    make = KINDS[entry.name].make
    assert make is not None
    if "execution_probability" in keys:
        keys["probability"] = keys.pop("execution_probability")
    try:
        return make(**keys)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{entry.place}: {error}") from error
