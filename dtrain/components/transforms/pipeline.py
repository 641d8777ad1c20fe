"""Runs transforms one after the other on a sample, with one generator."""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dtrain.components.transforms.sample import ARRAYS, Sample, spatial_dims

MARK = "dtrain"  # in a MetaTensor's meta: what has it knows its affine; one that MONAI made anew says the identity
NEAR = 1e-3  # by which two affines may differ, in millimetres per voxel or of origin


class Step(NamedTuple):
    """One transform as the pipeline runs it."""

    transform: Any
    random: bool
    run: Callable[[Sample, np.random.Generator], Sample]
    seeds_itself: bool = False  # from the generator that it is given, whatever its transform holds


class Pipeline:
    """Transforms in a row, each given the sample that the last one returned.

    A sample is a dict: `image` float32 (C, *spatial); `label` (*spatial) or (K, *spatial), and `weight` (*spatial),
    where there are any; spatial is (D, H, W) or (H, W). All random numbers come from the generator that is passed, so
    a sample depends on nothing that ran before. A pipeline may stand inside another.

    Three kinds of transforms are taken:

    - dtrain's own, and any other object with an attribute `random` (bool: does it draw?): `transform(sample, rng)`;
    - MONAI's dictionary transforms (`RandFlipd`, `keys: [image, label]`): called with the dict alone. One that draws is
      seeded from the generator each time. A label or weight without channels gets one for the call, as MONAI expects;
      what comes back as a tensor becomes an array, the image float32, the label of the type that it had. Where the
      sample has an `affine`, from voxels to millimetres (4, 4), the arrays are MetaTensors with it, and it becomes what
      the transform made of it;
    - any other callable: `function(sample)`, taken to draw nothing, or `function(sample, rng)`, taken to draw.

    Args:
        transforms: In the order in which they run.

    Attributes:
        random: Whether any of them draws.
        percents: Which percentiles of the whole file they take, where `stats` tells them.

    Raises:
        TypeError: One of them is not a transform.
        ValueError: One of them is a transform of MONAI's for single arrays, which would part image and label.
    """

    def __init__(self, transforms: Sequence[Any] | None = None) -> None:
        self.steps = [_step(transform, place) for place, transform in _flat(transforms or (), "transforms")]
        self.random = any(step.random for step in self.steps)
        of_steps = (getattr(step.transform, "percents_of_file", ()) for step in self.steps)
        self.percents: list[float] = [percent for percents in of_steps for percent in percents]

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample after all transforms.

        Args:
            sample: See the class. It and its arrays are not changed.
            rng: Where all randomness comes from.

        Returns:
            A new dict with contiguous arrays; where no transform changed an array, it may be the one that was given.
        """
        sample = dict(sample)
        for step in self.steps:
            try:
                sample = step.run(sample, rng)
            except Exception as error:
                error.add_note(f"in the transform {_name(step.transform)}")
                raise
        return sample | {key: np.ascontiguousarray(sample[key]) for key in ARRAYS if key in sample}

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        return f"Pipeline({', '.join(_name(step.transform) for step in self.steps)})"

    def without_random(self) -> "Pipeline":
        """The transforms that draw nothing, in their order: what prediction and pictures use."""
        return Pipeline([step.transform for step in self.steps if not step.random])


def _flat(transforms: Sequence[Any], path: str) -> Iterator[tuple[str, Any]]:
    """Each single transform with its place; what holds others is opened."""
    if isinstance(transforms, str) or not isinstance(transforms, Sequence):
        raise TypeError(f"{path} is a {type(transforms).__name__}; expected a list of transforms")
    monai = sys.modules.get("monai.transforms")  # what is not imported made no object
    for index, item in enumerate(transforms):
        place = f"{path}[{index}]"
        if isinstance(item, Pipeline):
            yield from ((place, step.transform) for step in item.steps)
        elif monai and type(item) is monai.Compose:
            yield from _flat(item.transforms, f"{place}.transforms")
        else:
            yield place, item


def _step(transform: Any, place: str) -> Step:
    """How a transform is run."""
    monai = sys.modules.get("monai.transforms")
    if isinstance(transform, type) or not callable(transform):
        found = f"the class {transform.__name__}" if isinstance(transform, type) else f"a {type(transform).__name__}"
        raise TypeError(f"{place} is {found}; expected an object that is called with a sample")
    if monai and isinstance(transform, monai.Transform | monai.Randomizable):
        if isinstance(transform, monai.Compose):
            for part in transform.transforms:
                _step(part, place)
        elif not hasattr(transform, "keys"):
            name = type(transform).__name__
            raise ValueError(f"{place}: MONAI's {name} changes one array alone; take {name}d with keys: [image, label]")
        draws = hasattr(transform, "set_random_state")
        return Step(transform, draws, lambda sample, rng: _monai(transform, sample, rng), seeds_itself=True)
    random = getattr(transform, "random", None)
    if isinstance(random, bool):
        return Step(transform, random, transform)
    if _takes_two(transform):
        return Step(transform, True, transform)
    return Step(transform, False, lambda sample, rng: transform(sample))


def _takes_two(function: Callable[..., Any]) -> bool:
    """Whether a function must be given a second argument."""
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return True
    except ValueError:  # compiled, without a signature
        return False
    return False


def _monai(transform: Any, sample: Sample, rng: np.random.Generator) -> Sample:
    """A sample through a dictionary transform of MONAI's."""
    dims = spatial_dims(sample)
    if hasattr(transform, "set_random_state"):
        transform.set_random_state(seed=int(rng.integers(2**32)))
    arrays = {key: sample[key] for key in ARRAYS if key in sample}
    bare = [key for key, array in arrays.items() if array.ndim == dims]
    # Copies: MONAI may write into what it is given, and torch takes neither read-only nor mirrored arrays.
    given: dict[str, Any] = {
        key: np.array(array[None] if key in bare else array, order="C") for key, array in arrays.items()
    }
    if (affine := sample.get("affine")) is not None:
        given = {key: _placed(array, affine) for key, array in given.items()}
    elif _needs_a_place(transform):
        why = (
            "the transforms before it moved them: put it in front" if "affine" in sample else "only NIfTI files say so"
        )
        raise ValueError(f"{_name(transform)} must know where in space the voxels lie, in millimetres; {why}")
    result = transform({**sample, **given})
    if isinstance(result, list):
        if len(result) != 1:
            raise ValueError(f"{_name(transform)} returned {len(result)} samples; possible: num_samples: 1")
        result = result[0]
    if affine is not None:
        result["affine"] = _common_place(given, {key: result[key] for key in arrays}, affine, _name(transform))
    result = {key: _numpy(value) for key, value in result.items()}
    for key in arrays:
        array = result[key][0] if key in bare and len(result[key]) == 1 else result[key]
        result[key] = _as_before(array, arrays[key].dtype, key, transform)
    return result


def _needs_a_place(transform: Any) -> bool:
    """Whether one of MONAI's transforms, or one in it, means nothing without an affine: it counts in millimetres."""
    monai = sys.modules["monai.transforms"]
    kinds = (monai.Spacingd, monai.Orientationd, monai.SpatialResampled, monai.ResampleToMatchd)
    return isinstance(transform, kinds) or any(map(_needs_a_place, getattr(transform, "transforms", ())))


def _placed(array: np.ndarray, affine: np.ndarray) -> Any:
    """An array (C, *spatial) with its place in space, as MONAI's transforms expect it."""
    import torch
    from monai.data.meta_tensor import MetaTensor

    return MetaTensor(torch.from_numpy(array), affine=torch.as_tensor(affine, dtype=torch.float64), meta={MARK: True})


def _common_place(before: dict[str, Any], after: dict[str, Any], affine: np.ndarray, name: str) -> np.ndarray | None:
    """Where in space the voxels of all arrays (C, *spatial) lie now; None where that cannot be told.

    What returns another MetaTensor or none, as Lambdad does, and keeps the extent, is taken to leave the voxels there.

    Raises:
        ValueError: They no longer lie at the same place.
    """
    affines: dict[str, np.ndarray] = {}
    for key, array in after.items():
        is_tracked = MARK in getattr(array, "meta", {})
        if not is_tracked and array.shape[1:] != before[key].shape[1:]:
            return None
        affines[key] = np.asarray(array.affine) if is_tracked else affine
    first = next(iter(affines))
    for key, place in affines.items():
        if place.shape != affines[first].shape or not np.allclose(place, affines[first], atol=NEAR):
            raise ValueError(f"{name} moved the {first} and the {key} differently; name both: keys: [{first}, {key}]")
    return affines[first]


def _numpy(value: Any) -> Any:
    torch = sys.modules.get("torch")
    return value.detach().cpu().numpy() if torch and isinstance(value, torch.Tensor) else value


def _as_before(array: np.ndarray, dtype: np.dtype, key: str, transform: Any) -> np.ndarray:
    """The array in the type that it had, without losing anything of a label."""
    if key != "label" or array.dtype == dtype or np.issubdtype(dtype, np.floating):
        return array.astype(dtype, copy=False)
    if np.issubdtype(array.dtype, np.floating) and (array != np.rint(array)).any():
        if ".spatial." in type(transform).__module__ or hasattr(transform, "transforms"):
            raise ValueError(
                f"{_name(transform)} mixed label values; use mode: [bilinear, nearest] for image and label"
            )
        return array.astype(np.float32, copy=False)  # made to be no label any more, but a target of another kind
    return array.astype(dtype)


def _name(transform: Any) -> str:
    return getattr(transform, "__name__", None) or type(transform).__name__
